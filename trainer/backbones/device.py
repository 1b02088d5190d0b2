"""Where a model runs and in which precision: one function, `place`, that every verb calls before a
model's first forward.

Linear layers and convolutions that do not train are held in the chosen precision; all else, what
trains and the VAE among it, stays in fp32. `Backbone` then runs its denoiser and its text encoders
under autocast, which would round those weights at every call: holding them rounded halves their
memory and changes no bit of an output computed so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trainer.backbones.four_bits import pack_layers
from trainer.backbones.held_layers import FP8, PACKED, hold_layers
from trainer.backbones.layer_casting import cast_layers, cast_narrow
from trainer.backbones.resting import rest_if_tight

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HELD = {**PRECISIONS, "fp8": FP8, "nf4": PACKED}
PIXELS = 4 * 512 * 512  # of the pictures that a model generates at once, see `pictures_at_once`
NONE: Mapping[str, str] = {}
DEVICE_NAMES = "auto, cpu, mps, cuda, or one GPU of several as in cuda:1"


@dataclass(frozen=True)
class Placement:
    """A device, and the precision to compute in: fp32, bf16, fp16, auto, fast. Frozen layers are
    held in it too, or in that of `parts`: pairs of `denoiser` or `text_encoders` and a precision,
    of which fp8 and nf4 are two more.

    lean: of a model that nothing trains. Layers that are stored in less than it computes in stay so
    and are cast at every call; and where a device has too little memory for all parts, text
    encoders and VAE rest in main memory, see `resting.py`.
    """

    device: torch.device
    precision: str = "auto"
    parts: tuple[tuple[str, str], ...] = ()
    lean: bool = False

    def dtype(self, published: torch.dtype) -> torch.dtype:
        """auto is what the weights were `published` in, and fp32 on a CPU, and where Apple's GPU
        does not know bf16. fast is bf16 where the device has instructions for it, else fp32:
        without them bf16 takes many times as long."""
        if self.precision == "fast":
            return torch.bfloat16 if has_bf16(self.device) else torch.float32
        if self.precision != "auto":
            return PRECISIONS[self.precision]
        if published == torch.bfloat16 and self.device.type == "mps" and not has_bf16(self.device):
            return torch.float32
        return torch.float32 if self.device.type == "cpu" else published

    def held(self, kind: str, published: torch.dtype) -> torch.dtype:
        """What frozen layers of the denoiser, or of the text encoders, are held in."""
        own = dict(self.parts).get(kind)
        return self.dtype(published) if own is None else HELD[own]

    def read_in(self, kind: str, published: torch.dtype, stored: torch.dtype) -> torch.dtype:
        """What a part that is stored in half precision is read in: as it is stored where its layers
        will be held so or in less, else in fp32. Not a value differs from one that was read in fp32
        and then held."""
        if self.lean or self.held(kind, published) in (stored, FP8, PACKED):
            return stored
        return torch.float32


CPU = Placement(torch.device("cpu"))


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16; of a CPU what oneDNN, which computes its
    convolutions, says of it. Apple's GPUs have them from macOS 14 on."""
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def slow_precision(model: Backbone) -> str | None:
    """A line for a user whose model computes in bf16 without instructions for it."""
    if model.computes_in != torch.bfloat16 or has_bf16(model.device):
        return None
    return (
        "bf16: this device has no instructions for it, so a step takes many times as long; "
        "run.precision=fast computes in fp32 here"
    )


def choose_placement(
    device: str = "auto",
    precision: str = "auto",
    rank: int = 0,
    *,
    parts: Mapping[Any, str] = NONE,
    lean: bool = False,
) -> Placement:
    """The placement that a user's words name. device: auto takes a CUDA GPU, then Apple's, then the
    CPU; `cuda` is the GPU numbered `rank`, the number of this process on its machine. parts, lean:
    as of `Placement`.

    Raises:
        ValueError: no such precision or device, this machine has no such device, or the device
            does not know the precision.
    """
    if precision not in ("auto", "fast", *PRECISIONS):
        raise ValueError(f"precision={precision}: there are auto, fast, {', '.join(PRECISIONS)}")
    found = Placement(_device(device, rank), precision, tuple(sorted(parts.items())), lean=lean)
    if low := {"fp8", "nf4"}.intersection(parts.values() if found.device.type == "mps" else ()):
        raise ValueError(f"run.base_precision: Apple's GPUs have no {min(low)}; give bf16")
    if precision == "bf16" and found.device.type == "mps" and not has_bf16(found.device):
        raise ValueError(
            "precision=bf16: Apple's GPUs know bf16 from macOS 14 on; give precision=fp16 or fp32"
        )
    return found


def _device(name: str, rank: int) -> torch.device:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "mps", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise ValueError(f"device={name}: no such device; there are {DEVICE_NAMES}")
    if (kind == "cuda" and not cuda) or (kind == "mps" and not mps):
        raise ValueError(
            f"device={name}: torch finds no such device on this machine; give device=cpu, or "
            "install the build of torch that is made for it"
        )
    if kind != "cuda":
        return torch.device(kind)
    index = int(number) if number else rank
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device=cuda:{index}: this machine has {torch.cuda.device_count()} GPUs, numbered "
            "from 0"
        )
    return torch.device("cuda", index)


def place(
    model: Backbone,
    placement: Placement,
    stored: Collection[str] = (),
    hold: bool = True,
) -> Backbone:
    """Puts a backbone on its device, and its frozen layers in their precision; returns it.

    To be called after a model is loaded, and again after it was edited: layers that an edit brought
    along are placed too. stored: names of the parameters that an adapter holds, which stay in fp32
    even where they do not train. hold: False where methods are still to read the exact weights;
    the model computes in the precision all the same.
    """
    dtype = placement.dtype(model.published)
    if placement.lean:
        rest_if_tight(model, placement.device)
    model.to(placement.device)
    model.computes_in = dtype
    if hold:
        own = {id(value) for name, value in model.named_parameters() if name in set(stored)}
        _hold(model, placement, own)
    return model


def _hold(model: Backbone, placement: Placement, own: Collection[int]) -> None:
    """own: ids of parameters that stay in fp32."""
    dtype = placement.dtype(model.published)
    kinds = {"denoiser": [model.denoiser], "text_encoders": list(model.text_encoders.values())}
    for kind, parts in kinds.items():
        asked = placement.held(kind, model.published)
        held = dtype if asked == PACKED else asked
        for part in parts:
            if asked == PACKED:
                pack_layers(part, dtype)
            hold_layers(part, dtype if held.itemsize < dtype.itemsize else held, own)
            if placement.lean or asked == PACKED:
                cast_narrow(part, dtype)
            casts = held.itemsize < dtype.itemsize
            if casts and not cast_layers(part, held, own, compute=dtype):
                raise ValueError(
                    f"run.base_precision.{kind}={dict(placement.parts)[kind]} is for layers that "
                    "do not train, and there are none: a method trains them all, as full does, or "
                    "stores them otherwise; leave out this key, or choose a method that keeps "
                    "layers frozen"
                )


def cast_stored(model: Backbone) -> Backbone:
    """Layers that were read in less than the model computes in are cast at every call; returns the
    model. For one that no method is still to edit, and whose weights stay as they are stored."""
    for part in (model.denoiser, *model.text_encoders.values()):
        cast_narrow(part, model.computes_in)
    return model


def place_module(module: Any, placement: Placement) -> Any:
    """Puts what is no backbone, a judge of pictures or a stock pipeline, on the device, in fp32."""
    return module.to(placement.device)


@contextmanager
def proving(model: Any, placement: Placement) -> Iterator[None]:
    """A model on the device inside the block and on the CPU after it, where weights are compared
    and written. Products of fp32 are exact inside: a GPU would round what it multiplies to 10 bits
    (TF32), which is more than a proof allows."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    moves = placement.device.type != "cpu"  # to visit every layer takes as long as a small model
    if moves:
        place_module(model, placement)
    matmul.allow_tf32 = convolution.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before
        if moves:
            place_module(model, CPU)


def pictures_at_once(most: int, pixels: int) -> int:
    """How many pictures of so many pixels (clips: with those of all frames) are generated at once:
    `most`, or fewer where they are large, since memory grows with the pixels. It does not depend on
    the memory that is free: the same numbers in the same batches give the same pictures."""
    return max(1, min(most, PIXELS // pixels))
