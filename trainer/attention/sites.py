"""A site is one attention layer of a denoiser, seen the same way in every backbone.

`scan` finds the sites of a model, `select` and `require` pick some of them by a selector
(`selector.py`). Importing this file does not import torch: recipes are checked before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from trainer.attention.denoiser_traits import (
    PLAIN,
    UNDECLARED,
    DenoiserTraits,
    ProcessorTraits,
)
from trainer.attention.selector import Selector, parse_selector

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Site", "parse_selector", "require", "scan", "select"]

Kind = Literal["self", "cross", "joint", "temporal"]
Place = Literal["down", "mid", "up", "block"]
Role = Literal["q", "k", "v", "out"]

ROLES: tuple[Role, ...] = ("q", "k", "v", "out")
# the layers of a text encoder: of its attention, and the first and last of its feed-forward blocks
TextRole = Literal["q", "k", "v", "out", "fc1", "fc2"]
TEXT_ROLES: tuple[TextRole, ...] = ("q", "k", "v", "out", "fc1", "fc2")
TEMPORAL_MARKS = ("motion_modules", "temp_attentions", "attn_temp", "transformer_in", "temporal")
UNET_PLACES: dict[str, Place] = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}
# `transformer_in` of the video U-Nets runs before the first down block, hence "block" first
FORWARD_ORDER: tuple[Place, ...] = ("block", "down", "mid", "up")


@dataclass(frozen=True)
class Site:
    """One attention layer: `depth` is its position in forward order, 0 for the first site and 1 for
    the last.

    `divisor` says how much coarser the token grid is than the latent (2: half the height and
    width), None where that is unknown. A temporal site has the divisor of the frames it
    attends over. native: how the layer's own processor computes.
    """

    name: str
    module: nn.Module
    kind: Kind
    place: Place
    depth: float
    divisor: int | None
    heads: int
    head_dim: int
    native: ProcessorTraits = PLAIN

    @property
    def scale(self) -> float | None:
        """What q k^T is multiplied with; None: head_dim ** -0.5, as kernels do by themselves."""
        return None if self.module.scale_qk else cast(float, self.module.scale)

    def projection(self, role: Role) -> nn.Linear:
        """The projection q, k, v or out as it is now: an adapter's wrapper where there is one."""
        if role == "out":
            return cast("nn.Linear", cast("nn.ModuleList", self.module.to_out)[0])
        return cast("nn.Linear", getattr(self.module, f"to_{role}"))

    @property
    def projections(self) -> dict[Role, nn.Linear]:
        return {role: self.projection(role) for role in ROLES}


def scan(model: nn.Module, traits: DenoiserTraits = UNDECLARED) -> list[Site]:
    """All attention sites of a denoiser in forward order; traits: what its family declares of it.

    Raises `ValueError` at a layer that is no classic self or cross attention (joint attention, the
    newer classes with a forward of their own): to skip it would silently edit half of the model.
    """
    found = _attentions(model)
    rank = _registration_order(model)
    names = sorted(found, key=lambda name: _forward_key(name, rank))
    last = max(len(names) - 1, 1)
    divisors = unet_divisors(model)
    patch = patch_size(model)
    sites = []
    for index, name in enumerate(names):
        module = found[name]
        heads = cast(int, module.heads)
        site = Site(
            name=name,
            module=module,
            kind=_kind(name, module),
            place=_place(name),
            depth=index / last,
            divisor=divisors.get(_unet_block(name), patch),
            heads=heads,
            head_dim=cast(int, module.inner_dim) // heads,
            native=traits.of_processor(own_processor(module)) or PLAIN,
        )
        sites.append(site)
    return sites


def select(sites: Sequence[Site], selector: str | Selector) -> list[Site]:
    """The sites that match, in their order; none is not an error here, see `require`."""
    chosen = parse_selector(selector) if isinstance(selector, str) else selector
    return [site for site in sites if chosen.matches(site)]


def require(sites: Sequence[Site], selector: str | Selector, who: str) -> list[Site]:
    """Like `select`, but no match is a `ValueError` that names who asked and what there is."""
    chosen = select(sites, selector)
    if not chosen:
        text = selector if isinstance(selector, str) else selector.text
        kinds = ", ".join(sorted({site.kind for site in sites})) or "none"
        places = ", ".join(sorted({site.place for site in sites})) or "none"
        grids = (
            ", ".join(f"/{d}" for d in sorted({s.divisor for s in sites if s.divisor})) or "unknown"
        )
        raise ValueError(
            f"{who}: the selector {text!r} matches no attention site; this backbone has the kinds "
            f"{kinds}, the places {places} and the grids {grids}"
        )
    return chosen


def own_processor(module: nn.Module) -> object:
    """The processor a layer came with, hosted by now or not."""
    processor = getattr(module, "processor", None)
    return getattr(processor, "previous", processor)


def _attentions(model: nn.Module) -> dict[str, nn.Module]:
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        # an op registered under a site may hold projections of its own: they are no site
        if name.startswith(inside):
            continue
        if type(module) is Attention:
            _refuse_joint(name, module)
            found[name] = module
            inside = (*inside, f"{name}.")
        elif isinstance(module, AttentionModuleMixin) or _has_projections(module):
            raise ValueError(_not_hosted(name, type(module).__name__))
    return found


def _has_projections(module: nn.Module) -> bool:
    return all(hasattr(module, f"to_{role}") for role in ("q", "k", "v"))


def _refuse_joint(name: str, module: nn.Module) -> None:
    if (
        getattr(module, "add_k_proj", None) is not None
        or getattr(module, "add_q_proj", None) is not None
    ):
        raise ValueError(
            _not_hosted(name, f"{type(module).__name__} with added projections (joint attention)")
        )


def _not_hosted(name: str, what: str) -> str:
    return (
        f"{what} at {name!r} is not hosted yet; choose a backbone whose layers are classic "
        "self- and cross-attention"
    )


def _kind(name: str, module: nn.Module) -> Kind:
    if any(mark in name for mark in TEMPORAL_MARKS):
        return "temporal"
    return "cross" if module.is_cross_attention else "self"


def _place(name: str) -> Place:
    return UNET_PLACES.get(name.split(".")[0], "block")


def _unet_block(name: str) -> str:
    """`down_blocks.1` of `down_blocks.1.attentions.0...`."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first in ("down_blocks", "up_blocks") and rest else first


def unet_divisors(model: nn.Module) -> dict[str, int]:
    """How much coarser than the latent the grid of each block of a U-Net is; nothing for others.

    A block's own down- or upsampler comes after its attention and counts for the next block."""
    divisors: dict[str, int] = {}
    if not (hasattr(model, "down_blocks") and hasattr(model, "up_blocks")):
        return divisors
    divisor = 1
    for index, block in enumerate(cast("nn.ModuleList", model.down_blocks)):
        divisors[f"down_blocks.{index}"] = divisor
        divisor *= 2 if getattr(block, "downsamplers", None) is not None else 1
    divisors["mid_block"] = divisor
    for index, block in enumerate(cast("nn.ModuleList", model.up_blocks)):
        divisors[f"up_blocks.{index}"] = divisor
        divisor //= 2 if getattr(block, "upsamplers", None) is not None else 1
    divisors["transformer_in"] = 1
    return divisors


def patch_size(model: nn.Module) -> int | None:
    """Latents along an edge of a transformer's token."""
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    return patch if isinstance(patch, int) else None


def _registration_order(model: nn.Module) -> dict[str, int]:
    return {name: index for index, (name, _) in enumerate(model.named_modules())}


def _forward_key(name: str, rank: dict[str, int]) -> tuple[tuple[int, int], ...]:
    """Sorts by block, then layer, then kind of layer.

    Registration order is not forward order: U-Nets register the up blocks before the middle, and
    all `attentions` of a block before its `motion_modules`, while the forward alternates between
    them.
    """
    parts = name.split(".")
    key = [(FORWARD_ORDER.index(_place(name)), 0)]
    path = ""
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        path = f"{path}.{part}" if path else part
        if part.isdecimal():
            continue
        key.append((int(following) if following.isdecimal() else 0, rank[path]))
    return tuple(key)
