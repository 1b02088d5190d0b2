"""A device that is not the CPU and needs no hardware: tensors on it are computed on the CPU, and an
operation that gets tensors of both devices is refused, as a GPU would refuse it. Like Apple's GPUs
(mps) it has no float64.

    with far_device() as far:
        model.to(FAR)
        model(x.to(FAR))     # model(x) raises
    far.missed               # the modules that ran on the CPU

It stands under a number of torch's `meta` device that nothing else uses, since that type needs no
driver; the tensors are a subclass that holds the values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FAR = torch.device("meta", 1)
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Far(Tensor):
    """A tensor on the device; near: its values, on the CPU."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        if near.dtype == torch.float64:  # the words of PyTorch
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
                "float64. Please use float32 instead."
            )
        made: Far = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=FAR,
        )
        made.near = near
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # lets `Module.to` keep its parameters
        return ["near"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> Far:
        return Far(inner["near"])

    def __repr__(self, **_: Any) -> str:
        return f"far {self.near}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the values, its result where the operands are, or where `device` sends it."""
    tensors = list(_tensors((*args, *kwargs.values())))
    far, target = any(isinstance(value, Far) for value in tensors), kwargs.get("device")
    if not far and (target is None or torch.device(target) != FAR):
        return func(*args, **kwargs)
    if far and func not in MOVES:
        shapes = [tuple(t.shape) for t in tensors if not isinstance(t, Far) and t.ndim]
        if shapes:
            raise RuntimeError(f"{func}: operands of {shapes} are on the CPU, others are not")
    if target is not None:
        far = torch.device(target) == FAR
        kwargs = {**kwargs, "device": "cpu" if far else target}
    near = {name: _each(_near, value) for name, value in kwargs.items()}
    result = func(*_each(_near, args), **near)
    if func._schema.is_mutable and args and isinstance(args[0], Tensor):
        name = func._schema.name
        if name.endswith("_") or "out" in kwargs:
            return kwargs.get("out", args[0])
    return _each(_far, result) if far else result


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those of an operation, which takes them alone and in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _each(change: Any, value: Any) -> Any:
    """Several times faster than torch's `tree_map`, for what operations take and return."""
    if isinstance(value, list | tuple):
        return type(value)([_each(change, item) for item in value])
    return change(value) if isinstance(value, Tensor) else value


def _near(value: Tensor) -> Tensor:
    return value.near if isinstance(value, Far) else value


def _far(value: Tensor) -> Far:
    return value if isinstance(value, Far) else Far(value)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class _Values(TorchFunctionMode):
    """`torch.tensor([...], device=FAR)` and `tolist`, which torch makes of no operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == FAR:
            return func(*args, **{**kwargs, "device": "cpu"}).to(FAR)
        if func is Tensor.tolist and isinstance(args[0], Far):
            return args[0].near.tolist()
        return func(*args, **kwargs)


class Seen:
    """The modules with weights of their own that have run: on the device, and on the CPU."""

    def __init__(self) -> None:
        self.placed: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()

    def note(self, module: nn.Module, _: Any) -> None:
        own = [value for value in module._parameters.values() if value is not None]
        if own:
            where = self.placed if all(isinstance(value, Far) for value in own) else self.missed
            where[type(module).__name__] += 1


@contextmanager
def _without_autocast() -> Iterator[None]:
    """torch knows no autocast for this type of device, and refuses to say that it is off."""
    enabled = torch.is_autocast_enabled

    def asked(device: str = "cuda") -> bool:
        return device != FAR.type and enabled(device)

    torch.is_autocast_enabled = asked  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.is_autocast_enabled = enabled


@contextmanager
def far_device() -> Iterator[Seen]:
    """The device exists inside, and every module that runs is noted."""
    seen = Seen()
    AcceleratorRegistry.register(FAR.type, FarAccelerator)
    hook = register_module_forward_pre_hook(seen.note)
    try:
        with _without_autocast(), _Mode(), _Values():
            yield seen
    finally:
        hook.remove()
        AcceleratorRegistry.remove(FAR.type)


class FarAccelerator(Accelerator):
    """The device for Lightning."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [FAR]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return FAR.type
