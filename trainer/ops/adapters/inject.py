"""Adapters of peft on chosen layers of a model: which layers, peft put on them, and folded into
them again.

Through `inject_adapter_in_model`, never a model's own `add_adapter`: half of diffusers' models have
none.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from trainer.attention.errors import TakenError
from trainer.attention.insertion import move_insertions
from trainer.attention.projections import ALL_ROLES
from trainer.attention.sites import require
from trainer.backbones.four_bits import is_packed, unpacked
from trainer.kernels.softmax import HALF
from trainer.ops.adapters.fused_lora import quicken

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.attention.projections import Role
    from trainer.attention.sites import TextRole

# how CLIP, T5 and Gemma encoders of transformers call the layers of attention, and the first and
# last of the feed-forward block
TEXT_LAYERS = {
    "q": ("q_proj", "q"), "k": ("k_proj", "k"), "v": ("v_proj", "v"),
    "out": ("out_proj", "o_proj", "o"),
    "fc1": ("fc1", "wi", "wi_0", "wi_1", "gate_proj", "up_proj"), "fc2": ("fc2", "wo", "down_proj"),
}  # fmt: skip
ADAPTABLE = (nn.Linear, nn.Conv2d)
TASK = "-"  # between a method's name and the task's number; no method's name has it


@dataclass(frozen=True)
class Target:
    """One layer to adapt: `name` inside `part` (`unet`, `text_encoder`); `site` where it belongs to
    one."""

    part: str
    name: str
    site: str | None = None

    @property
    def path(self) -> str:
        return f"{self.part}.{self.name}"


def site_targets(model: AttentionModel, sites: str, roles: Sequence[Role]) -> list[Target]:
    """The projections of the sites a selector picks; of all roles, those that each site has.

    Raises:
        ValueError: the selector picks no site, a site computes a role by a fused layer that `roles`
            leaves out, or no site has a role, unless `roles` are all there are.
    """
    chosen = require(model.sites, sites, "sites")
    for role in roles:
        having = [site for site in chosen if site.has(role)]
        lacking = [site for site in chosen if not site.has(role)]
        fused = [site for site in lacking if role in ("q", "k", "v") and "qkv" not in roles]
        if fused or (lacking and not having and set(roles) != set(ALL_ROLES)):
            (fused or lacking)[0].layer_path(role)
    return [
        Target(model.denoiser_name, site.layer_path(role), site.name)
        for site in chosen
        for role in roles
        if site.has(role)
    ]


def named_targets(model: AttentionModel, patterns: Sequence[str]) -> list[Target]:
    """Linear and convolution layers of the denoiser by glob; a pattern without a match is an
    error."""
    return _named(model, [model.denoiser_name], patterns, option="layers", kinds=ADAPTABLE)


def named_text_targets(model: AttentionModel, patterns: Sequence[str]) -> list[Target]:
    """Linear layers of the text encoders by glob; a pattern without a match is an error."""
    parts = list(model.text_encoders)
    return _named(model, parts, patterns, option="text_layers", kinds=(nn.Linear,))


def _named(
    model: AttentionModel,
    parts: Sequence[str],
    patterns: Sequence[str],
    *,
    option: str,
    kinds: tuple[type[nn.Module], ...],
) -> list[Target]:
    every: list[Target] = []
    for part in parts:
        named = part_of(model, part).named_modules()
        names = [name for name, layer in named if isinstance(base_layer(layer), kinds)]
        inside = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
        every += [Target(part, name) for name in inside]
    found: list[Target] = []
    for pattern in patterns:
        matched = [target for target in every if fnmatchcase(target.name, pattern)]
        if not matched:
            what = "linear layer" if kinds == (nn.Linear,) else "linear or convolution layer"
            examples = ", ".join(target.name for target in every[:3]) or "none, as there is none"
            raise ValueError(
                f"{option}: {pattern!r} matches no {what}; they have names like {examples}"
            )
        found += matched
    return list(dict.fromkeys(found))


def text_targets(model: AttentionModel, roles: Sequence[TextRole]) -> list[Target]:
    """The layers of these roles in every text encoder."""
    found = []
    for part, encoder in model.text_encoders.items():
        for role in roles:
            for name, layer in encoder.named_modules():
                owner, _, last = name.rpartition(".")
                attention = "attn" in owner.lower() or "attention" in owner.lower()
                linear = isinstance(base_layer(layer), nn.Linear)
                fits = attention != role.startswith("fc")
                if fits and linear and last in TEXT_LAYERS[role]:
                    found.append(Target(part, name))
    if not found:
        raise ValueError(
            f"text_encoder: no layers of {', '.join(roles)} found in "
            f"{', '.join(model.text_encoders) or 'this backbone, which has no text encoder'}"
        )
    return found


def layer_of(model: AttentionModel, target: Target) -> Any:
    """A target's layer as it is now: after an earlier adapter or NF4, their wrapper."""
    return part_of(model, target.part).get_submodule(target.name)


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer under an adapter, or the layer itself."""
    found = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    assert isinstance(found, nn.Module)
    return found


def part_of(model: AttentionModel, part: str) -> nn.Module:
    return model.denoiser if part == model.denoiser_name else model.text_encoders[part]


def layer_sizes(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of the matrix a low rank would factor: a convolution counts its kernel to the
    inputs."""
    inner: Any = base_layer(layer)
    if isinstance(inner, nn.Conv2d):
        height, width = inner.kernel_size
        return inner.in_channels // inner.groups * height * width, inner.out_channels
    return int(inner.in_features), int(inner.out_features)


def inject(
    model: AttentionModel,
    targets: Sequence[Target],
    config: Callable[[Sequence[Target]], PeftConfig],
    owner: str,
) -> tuple[str, ...]:
    """Puts an adapter called `owner` on the targets and returns the names of its parameters.

    config: from the targets in one part to that part's peft configuration.

    Raises:
        TakenError: a target carries another method's adapter already.
        ValueError: peft cannot adapt one of the layers so.
    """
    for target in targets:
        layer = layer_of(model, target)
        if isinstance(layer, BaseTunerLayer):
            other = layer.active_adapters[0].partition(TASK)[0]
            raise TakenError(target.path, "the adapter", other, merges=True)
    return _add(model, targets, config=config, name=owner)


def stack(
    model: AttentionModel,
    targets: Sequence[Target],
    config: Callable[[Sequence[Target]], PeftConfig],
    owner: str,
    count: int,
) -> list[tuple[str, ...]]:
    """Puts `count` adapters on each target, one a task, called `owner-0` and on; their deltas add
    up. Returns the names of each one's parameters; raises as `inject` does."""
    tasks = [f"{owner}{TASK}{task}" for task in range(count)]
    found = [inject(model, targets, config, owner=tasks[0])]
    found += [_add(model, targets, config=config, name=task) for task in tasks[1:]]
    for target in targets:
        layer_of(model, target).set_adapter(tasks)
    return found


def _add(
    model: AttentionModel,
    targets: Sequence[Target],
    *,
    config: Callable[[Sequence[Target]], PeftConfig],
    name: str,
) -> tuple[str, ...]:
    before = {id(parameter) for _, parameter in model.named_parameters()}
    for part in dict.fromkeys(target.part for target in targets):
        own = [target for target in targets if target.part == part]
        earlier = [x for x in part_of(model, part).modules() if isinstance(x, BaseTunerLayer)]
        acting = [list(layer.active_adapters) for layer in earlier]
        try:
            with warnings.catch_warnings():
                # two methods on one model are two configurations; that is intended here
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                warnings.filterwarnings("ignore", message="You are trying to modify a model with")
                with _as_of_fp32([base_layer(layer_of(model, target)) for target in own]):
                    inject_adapter_in_model(config(own), part_of(model, part), adapter_name=name)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(f"peft cannot adapt these layers so: {error}") from error
        for target in own:
            layer = layer_of(model, target)
            quicken(layer)
            move_insertions(base_layer(layer), layer)
        for layer, adapters in zip(earlier, acting, strict=True):
            layer.set_adapter(adapters)  # peft has deactivated all but the new one
    found = [name for name, parameter in model.named_parameters() if id(parameter) not in before]
    return tuple(found)


@contextmanager
def _as_of_fp32(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Layers in half precision have one zero in fp32 in place of each weight inside: peft rounds
    what it puts beside a layer to the layer's precision. Methods that calculate with weights have
    them in fp32 already."""
    held = {
        value: value.data
        for layer in layers
        for value in layer.parameters(recurse=False)
        if value.dtype in HALF
    }
    for value, data in held.items():
        value.data = torch.zeros((), device=data.device).expand(data.shape)
    try:
        yield
    finally:
        for value, data in held.items():
            value.data = data


@torch.no_grad()
def add_copy(layer: Any, owner: str, name: str, sign: int, path: str) -> list[str]:
    """A second, frozen adapter `name` beside `owner` on a LoRA layer, with sign * B; the names of
    its parameters."""
    rank, scale = layer.r[owner], layer.scaling[owner]
    layer.update_layer(name, rank, lora_alpha=rank, config=LoraConfig(r=rank, lora_alpha=rank))
    layer.lora_A[name].weight.copy_(layer.lora_A[owner].weight)
    layer.lora_B[name].weight.copy_(sign * layer.lora_B[owner].weight)
    layer.scaling[name] = scale
    layer.set_adapter([owner, name])
    return [f"{path}.lora_{matrix}.{name}.weight" for matrix in ("A", "B")]


def exactly(targets: Sequence[Target]) -> str:
    """The targets as peft's `target_modules`. A list of names would also take every layer whose
    name ends in one of them, as those of a block that is inserted into another of its kind do."""
    return "|".join(re.escape(target.name) for target in targets)


def sites_of(targets: Sequence[Target]) -> tuple[str, ...]:
    """The sites that targets belong to, each once."""
    return tuple(dict.fromkeys(target.site for target in targets if target.site))


def claims(targets: Sequence[Target], trains: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """What an adapter on these layers claims: the layers, and its own parameters."""
    layers = [(target.path, "the adapter") for target in targets]
    return (*layers, *((name, "weight") for name in trains))


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Folds every adapter into the layer under it, in place: W <- W + the adapter's delta. Layers
    in 4 bits become plain ones.

    Raises:
        ValueError: an adapter does what no weight can do.
    """
    adapted = [item for item in model.named_modules() if isinstance(item[1], BaseTunerLayer)]
    layer: Any
    for name, layer in adapted:
        if reason := getattr(layer, "unfoldable", None):
            raise ValueError(f"{name} cannot be folded into a weight: {reason}")
        if is_packed(layer.get_base_layer()):
            layer.base_layer = _seen_through(layer)
        else:
            layer.merge(safe_merge=True)
        move_insertions(layer, layer.get_base_layer())
        model.set_submodule(name, layer.get_base_layer())
    for name, layer in list(model.named_modules()):
        if is_packed(layer):
            model.set_submodule(name, unpacked(layer))


def _seen_through(layer: Any) -> nn.Module:
    """What an adapted 4-bit linear layer computes, as a plain layer: peft merges only into 4 bits.

    Row i of layer(1) - layer(0) is column i of its matrix.
    """
    packed = layer.eval().get_base_layer()
    bias, packed.bias = packed.bias, None
    unit = torch.eye(packed.in_features, device=packed.weight.device)
    weight = (layer(unit) - layer(torch.zeros_like(unit[:1]))).T
    packed.bias = bias
    outputs, inputs = weight.shape
    plain = nn.Linear(inputs, outputs, bias=bias is not None, device=weight.device)
    plain.weight.copy_(weight)
    if bias is not None:
        plain.bias.copy_(layer(torch.zeros_like(unit[:1]))[0])
    return plain.requires_grad_(False)
