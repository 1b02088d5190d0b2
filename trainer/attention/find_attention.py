"""Finds the attention layers of a denoiser, of whichever class, and says what kind each is."""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from trainer.attention.projections import layer_name, layer_of_role
from trainer.attention.softmax_calls import TAKEN, Way, names_in, way_of

if TYPE_CHECKING:
    from torch import nn

    from trainer.attention.denoiser_traits import DenoiserTraits, Kind

WHY: dict[Way, str] = {
    "hand": "it has a softmax by hand",
    "back end": "it attends by another back end than torch's own, such as flex attention",
    "other": "it has no softmax attention call that a host can take",
}
TEMPORAL_MARKS = ("motion_modules", "temp_attentions", "attn_temp", ".transformer_in.", "temporal")
# blocks in which text and image have been joined into one sequence
JOINED_MARKS = ("single_transformer_blocks", "single_stream_blocks", "single_blocks")
OF_TEXT = ("txt_attn_qkv", "txt_kv_proj")  # layers of text beside fused ones of the image
# blocks that see nothing but the text
TEXT_MARKS = ("context_refiner", "token_refiner", "text_refiner", "context_embedder", "caption")
HEADS = ("heads", "num_heads", "num_attention_heads", "n_heads")
WIDTHS = ("head_dim", "dim_head", "dim_heads", "attention_head_dim")
# norms a layer may have around its projections, which a bare processor leaves out
AROUND = ("spatial_norm", "group_norm", "norm_cross")
TEXT = ("encoder_hidden_states", "context")  # how arguments that hold the text end


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers by name, in the order in which they are registered.

    Raises:
        ValueError: one computes its attention by neither of the two calls that a host can take, and
            is no classic `Attention`, whose sites refuse ops one by one: it is named.
    """
    from diffusers.models.attention_processor import Attention

    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        # an op registered under a site may hold projections of its own: they are no site
        if not name or name.startswith(inside) or not _attends(module):
            continue
        if type(module) is not Attention:
            way = way_of(module)
            if way != "call":
                raise ValueError(_not_hosted(name, module, way))
        found[name] = module
        inside = (*inside, f"{name}.")
    return found


def _attends(module: nn.Module) -> bool:
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    if isinstance(module, (Attention, AttentionModuleMixin)) or _has_projections(module):
        return True
    if type(module).__module__ == "diffusers.models.embeddings":
        return False  # they pool a condition
    if "Attention" in type(module).__name__:
        return not any(_attends(inner) for inner in module.modules() if inner is not module)
    kind: Any = type(module)
    return _calls_itself(kind)


@cache
def _calls_itself(kind: type) -> bool:
    return bool(names_in(kind, "forward") & TAKEN)


def _has_projections(module: nn.Module) -> bool:
    return all(hasattr(module, f"to_{role}") for role in ("q", "k", "v"))


def _not_hosted(name: str, module: nn.Module, way: Way) -> str:
    kind = type(module).__name__
    own = type(getattr(module, "processor", None)).__name__
    who = kind if own == "NoneType" else f"{kind} with {own}"
    return (
        f"{who} at {name!r} is not hosted: {WHY[way]}; choose a backbone whose layers call "
        "torch's scaled_dot_product_attention, or diffusers' dispatch_attention_fn with its "
        "native back end"
    )


def own_processor(module: nn.Module) -> object:
    """The processor a layer came with, hosted by now or not."""
    processor = getattr(module, "processor", None)
    return getattr(processor, "previous", processor)


def is_classic(module: Any, traits: DenoiserTraits) -> bool:
    """Whether a hosted processor does to the bit what the layer's own processor does."""
    from diffusers.models.attention_processor import Attention

    own = traits.of_processor(own_processor(module))
    if own is None or type(module) is not Attention:
        return False
    return not own.bare or (
        all(getattr(module, name) is None for name in AROUND)
        and not module.residual_connection
        and (own.rescales or module.rescale_output_factor == 1)
    )


def attention_kind(name: str, module: nn.Module, traits: DenoiserTraits) -> Kind:
    """Self, cross, joint or temporal; joint where image and text are keys of one softmax."""
    from diffusers.models.attention_processor import Attention

    declared = traits.kind_at(name)
    if declared is not None:
        return declared
    if any(mark in f".{name}." for mark in TEMPORAL_MARKS):
        return "temporal"
    if traits.joint_at(name) is not None or any(mark in name for mark in JOINED_MARKS):
        return "joint"
    if any(hasattr(module, own) for own in OF_TEXT):
        return "joint"
    cross = _is_cross(name, module)
    if layer_name(module, "add_k") is not None and (isinstance(module, Attention) or not cross):
        return "joint"
    if not cross and _needs_text(module):
        return "joint"
    return "cross" if cross else "self"


def _is_cross(name: str, module: nn.Module) -> bool:
    own = getattr(module, "is_cross_attention", None)
    if own is not None:
        return bool(own)
    if getattr(module, "cross_attention_dim", None) not in (None, getattr(module, "query_dim", 0)):
        return True
    q, k = (layer_of_role(module, role) for role in ("q", "k"))
    if None not in (q, k) and getattr(q, "in_features", 0) != getattr(k, "in_features", 0):
        return True
    leaf = name.rpartition(".")[2]
    return leaf == "attn2" or "cross" in f"{leaf} {type(module).__name__}".lower()


def _needs_text(module: nn.Module) -> bool:
    """Whether a layer's processor cannot be called without text, which it then joins to the
    image."""
    processor = own_processor(module)
    if processor is None:
        return False
    declared = inspect.signature(type(processor).__call__).parameters
    name = text_argument(tuple(declared))
    return name is not None and declared[name].default is inspect.Parameter.empty


def text_argument(names: tuple[str, ...]) -> str | None:
    """Which of a layer's arguments holds the text; None for none."""
    return next((name for name in names if name.endswith(TEXT)), None)


def sees_text_alone(name: str) -> bool:
    return any(mark in name for mark in TEXT_MARKS)


def heads_of(name: str, module: nn.Module) -> tuple[int, int]:
    """Number and width of an attention layer's heads; ValueError where it says neither."""
    heads = next((int(getattr(module, a)) for a in HEADS if hasattr(module, a)), 0)
    inner = getattr(module, "inner_dim", None)
    if heads and isinstance(inner, int):
        return heads, inner // heads
    width = next((int(getattr(module, a)) for a in WIDTHS if hasattr(module, a)), 0)
    layer: Any = layer_of_role(module, "q")
    total = 0 if layer is None else cast(int, layer.out_features)
    heads = heads or (total // width if width else 0)
    width = width or (total // heads if heads else 0)
    if not heads or not width:
        raise ValueError(
            f"{type(module).__name__} at {name!r} is not hosted: it does not say how many heads it "
            "has; choose another backbone"
        )
    return heads, width
