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
    JointTraits,
    Kind,
    ProcessorTraits,
)
from trainer.attention.find_attention import (
    attention_kind,
    attention_layers,
    heads_of,
    is_classic,
    own_processor,
    sees_text_alone,
)
from trainer.attention.projections import ALL_ROLES, Role, layer_name, layer_of_role, why_missing
from trainer.attention.selector import Selector, parse_selector
from trainer.attention.softmax_calls import way_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Site", "parse_selector", "require", "scan", "select"]

Place = Literal["down", "mid", "up", "block"]

# the layers of a text encoder: of its attention, and the first and last of its feed-forward blocks
TextRole = Literal["q", "k", "v", "out", "fc1", "fc2"]
TEXT_ROLES: tuple[TextRole, ...] = ("q", "k", "v", "out", "fc1", "fc2")
UNET_PLACES: dict[str, Place] = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}
# `transformer_in` of the video U-Nets runs before the first down block, hence "block" first
FORWARD_ORDER: tuple[Place, ...] = ("block", "down", "mid", "up")


@dataclass(frozen=True)
class Site:
    """One attention layer: `depth` is its position in forward order, 0 for the first site and 1 for
    the last.

    `divisor` says how much coarser the token grid is than the latent (2: half the height and
    width), None where that is unknown. A temporal site has the divisor of the frames it
    attends over. native: how the layer's own processor computes. keeps_processor: whether ops act
    in the attention call of its own processor (`dispatch.py`), not in a hosted one. joint: what is
    declared of image and text in one sequence. undeclared: whether its tokens may be others than
    the kind says, because nothing is declared of them. text_alone: whether they are all text.
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
    keeps_processor: bool = False
    joint: JointTraits | None = None
    undeclared: bool = False
    text_alone: bool = False

    @property
    def scale(self) -> float | None:
        """What q k^T is multiplied with; None: head_dim ** -0.5, as kernels do by themselves. A
        layer that keeps its processor says it at each call: see `SiteCall.scale`."""
        if self.keeps_processor or self.module.scale_qk:
            return None
        return cast(float, self.module.scale)

    def has(self, role: Role) -> bool:
        return layer_name(self.module, role) is not None

    def layer_path(self, role: Role) -> str:
        """The name of the layer of a role inside the denoiser, as in `blocks.0.attn.to_out.0`.

        Raises:
            ValueError: there is none; the message says whether a fused layer does its work.
        """
        name = layer_name(self.module, role)
        if name is None:
            raise ValueError(
                f"{self.name} has no layer of the role {role}: {type(self.module).__name__} "
                f"{why_missing(self.module, role)}"
            )
        return f"{self.name}.{name}"

    def projection(self, role: Role) -> nn.Linear:
        """The projection of a role as it is now: an adapter's wrapper where there is one;
        ValueError as `layer_path`."""
        self.layer_path(role)
        return cast("nn.Linear", layer_of_role(self.module, role))

    @property
    def projections(self) -> dict[Role, nn.Linear]:
        """Those that there are."""
        return {role: self.projection(role) for role in ALL_ROLES if self.has(role)}


def scan(model: nn.Module, traits: DenoiserTraits = UNDECLARED) -> list[Site]:
    """All attention sites of a denoiser in forward order; traits: what its family declares of it.

    Raises `ValueError` at a layer that attends in a way no host can take: to skip it would silently
    edit half of the model.
    """
    found = attention_layers(model)
    rank = _registration_order(model)
    names = sorted(found, key=lambda name: _forward_key(name, rank))
    last = max(len(names) - 1, 1)
    divisors = unet_divisors(model)
    patch = traits.patch or patch_size(model)
    sites = []
    for index, name in enumerate(names):
        module = found[name]
        heads, head_dim = heads_of(name, module)
        native = traits.of_processor(own_processor(module))
        keeps = not is_classic(module, traits) and way_of(module) == "call"
        site = Site(
            name=name,
            module=module,
            kind=attention_kind(name, module, traits),
            place=unet_place(name),
            depth=index / last,
            divisor=divisors.get(unet_block(name), patch),
            heads=heads,
            head_dim=head_dim,
            native=native or PLAIN,
            keeps_processor=keeps,
            joint=traits.joint_at(name),
            undeclared=keeps and traits.joint is None,
            text_alone=sees_text_alone(name),
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


def unet_place(name: str) -> Place:
    """Where in a denoiser a layer of this name is."""
    return UNET_PLACES.get(name.split(".")[0], "block")


def unet_block(name: str) -> str:
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
    """Latents along an edge of a transformer's token; of (frames, height, width), along the
    height."""
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    if isinstance(patch, (list, tuple)) and len(set(patch[-2:])) == 1:
        patch = patch[-1]
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
    key = [(FORWARD_ORDER.index(unet_place(name)), 0)]
    path = ""
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        path = f"{path}.{part}" if path else part
        if part.isdecimal():
            continue
        key.append((int(following) if following.isdecimal() else 0, rank[path]))
    return tuple(key)
