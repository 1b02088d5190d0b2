"""The layers of an attention layer by role: what they are called in the classes there are, and
which classes compute several roles by one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

# of image tokens, or of all tokens where text and image share them: q, k, v, out; of text tokens
# that have layers of their own: add_*; qkv: one layer that computes q, k and v, or more than these
Role = Literal["q", "k", "v", "out", "add_q", "add_k", "add_v", "add_out", "qkv"]

ROLES: tuple[Role, ...] = ("q", "k", "v", "out")
ADDED_ROLES: tuple[Role, ...] = ("add_q", "add_k", "add_v", "add_out")
ALL_ROLES: tuple[Role, ...] = (*ROLES, *ADDED_ROLES, "qkv")
NAMES: Mapping[Role, tuple[str, ...]] = {
    "q": ("to_q", "to_query", "q_linear", "query", "q_proj"),
    "k": ("to_k", "to_key", "key", "k_proj"),
    "v": ("to_v", "to_value", "value", "v_proj"),
    "out": ("to_out.0", "to_out", "out_layer", "proj", "img_attn_proj", "proj_attn", "out_proj"),
    "add_q": ("add_q_proj", "to_q_t"),
    "add_k": ("add_k_proj", "to_k_t"),
    "add_v": ("add_v_proj", "to_v_t"),
    "add_out": ("to_add_out", "to_out_t", "txt_attn_proj"),
    "qkv": ("to_qkv_mlp_proj", "to_qkv", "img_qkv_proj", "img_attn_qkv", "qkv", "qkv_proj"),
}
# layers that compute several roles and have no role of their own
FUSED_KEYS = ("to_kv", "kv_linear", "txt_kv_proj", "txt_attn_qkv", "to_added_qkv", "to_added_kv")
# what diffusers' `fuse_qkv_projections` makes, and of which layers
FUSED: Mapping[str, tuple[Role, ...]] = {
    "to_qkv": ("q", "k", "v"),
    "to_kv": ("k", "v"),
    "to_added_qkv": ("add_q", "add_k", "add_v"),
    "to_added_kv": ("add_k", "add_v"),
}


def layer_name(module: nn.Module, role: Role) -> str | None:
    """The name, inside an attention layer, of the layer that has this role; None where there is
    none, as in `to_out.0`."""
    if _fused_away(module, role):
        return None
    for name in NAMES[role]:
        if name == "to_out" and role == "out" and _mixes(module):
            return None
        layer: Any = module
        for part in name.split("."):
            layer = getattr(layer, "_modules", {}).get(part)
        if layer is not None and hasattr(layer, "weight"):
            return name
    return None


def _fused_away(module: nn.Module, role: Role) -> bool:
    """Whether diffusers' `fuse_qkv_projections` has put another layer in the place of this one,
    which stays and no longer runs."""
    if not getattr(module, "fused_projections", False):
        return False
    names = [name for name, roles in FUSED.items() if role in roles]
    return any(getattr(module, name, None) is not None for name in names)


def _mixes(module: nn.Module) -> bool:
    """Whether the output projection also takes what a feed-forward part put out."""
    layer: Any = getattr(module, "to_out", None)
    mixed = getattr(module, "mlp_hidden_dim", None)
    return mixed is not None and getattr(layer, "in_features", None) != module.inner_dim


def layer_of_role(module: nn.Module, role: Role) -> nn.Module | None:
    """The layer that has this role as it is now: an adapter's wrapper where there is one."""
    name = layer_name(module, role)
    return None if name is None else module.get_submodule(name)


def why_missing(module: nn.Module, role: Role) -> str:
    """Why an attention layer has no layer of this role, as the end of a sentence."""
    fused = layer_name(module, "qkv")
    others = [name for name in FUSED_KEYS if getattr(module, name, None) is not None]
    if role in ("q", "k", "v") and fused is not None:
        return f"computes q, k and v by one fused layer, {fused}; its role is qkv"
    if role not in ("out", "add_out", "qkv") and others:
        return f"computes some roles by a fused layer; name it in layers, as in *{others[0]}"
    if role == "out" and layer_name(module, "q") is None:
        return "has an output projection fused with the feed-forward part; name it in layers"
    if role == "out":
        return "leaves its output projection to the block around it; name that layer in layers"
    if role in ADDED_ROLES and role != "add_out":
        return "has no layers for text tokens alone"
    return "has no such layer"


def context_roles(kind: str) -> tuple[Role, Role]:
    """The layers that read the context at sites of a kind: those of the text where it has its
    own."""
    return ("add_k", "add_v") if kind == "joint" else ("k", "v")
