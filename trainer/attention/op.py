"""An op is one edit inside an attention site: a `name` and a method for each stage it has.

Stages in running order; b batch rows, h heads, n query tokens, m key tokens, d head_dim:

    tokens(x, site, ctx) -> x               b n c    inputs after the site's own norms; may change n
    context(k_ctx, v_ctx, site, ctx)        b m c'   what to_k and to_v get; in self attention x
        -> k_ctx, v_ctx
    kv(q, k, v, site, ctx) -> q, k, v       b h . d  after projection and qk-norm; may append keys
    mask(mask, q, k, site, ctx) -> mask     to b h n m by broadcast; bool or added; None for no mask
    kernel(q, k, v, mask, site, ctx) -> o   b h n d  replaces the softmax attention
    scores(scores, site, ctx) -> scores     b h n m  scaled, before mask and softmax
    probs(probs, site, ctx) -> probs        b h n m  after mask and softmax
    branch(o, q, site, ctx) -> o            b h n d  adds what the same queries find elsewhere
    output(o, site, ctx) -> o               b h n d  before to_out
    restore(y, site, ctx) -> y              b n c    after to_out, before the residual
    block(x, site, ctx) -> x                b n c    what the block around the site puts out

Ops of one site run in the order in which they were installed, but `restore`, which undoes `tokens`,
runs in the reverse order. An op with `scores` or `probs` costs its sites the fused kernel; with a
method `gate(q, site, ctx) -> bool` it pays only where that returns True. An op that trains is an
`nn.Module`; it is registered under its site as `name`. A stage counts only if the op's class
defines it as a method: a submodule called `mask` is none. A kernel that has no place for a mask
says so with `masks = False`; one that needs a key for each query with `more_keys = False`, and an
op whose `kv` gives more with `appends = True`; a kernel that may stand for attention other than
softmax attention, as it is trained to, with `swaps = True`. `owner` is the method an op belongs to,
for refusals that name both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from trainer.attention.errors import TakenError

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.sites import Site

STAGES = (
    "tokens",
    "context",
    "kv",
    "mask",
    "kernel",
    "scores",
    "probs",
    "branch",
    "output",
    "restore",
    "block",
)


class Op(Protocol):
    """What every op has; its stages are looked up by name, see the table above."""

    @property
    def name(self) -> str: ...


def has_stage(op: Op, stage: str) -> bool:
    return callable(getattr(type(op), stage, None))


def by_stage(ops: tuple[Op, ...]) -> dict[str, tuple[Any, ...]]:
    """The ops of each stage in running order."""
    table: dict[str, tuple[Any, ...]] = {
        stage: tuple(op for op in ops if has_stage(op, stage)) for stage in STAGES
    }
    table["restore"] = table["restore"][::-1]
    return table


def refuse_conflicts(ops: tuple[Op, ...], site: Site) -> None:
    """Raises `ValueError` where ops cannot share a site, naming both and the site: `TakenError`
    where a method has replaced the kernel already."""
    for op in ops:
        if not any(has_stage(op, stage) for stage in STAGES):
            raise ValueError(
                f"op {op.name!r} has no stage to run at; give it one of {', '.join(STAGES)}"
            )
    table = by_stage(ops)
    if not table["kernel"]:
        if site.native.linear:
            _refuse_on_linear(table, site)
        return
    first, *others = table["kernel"]
    if site.native.linear and not getattr(first, "swaps", False):
        raise ValueError(
            f"{_who(first)} computes softmax attention, and that of {site.name!r} is linear, as "
            "its model was trained; choose other sites, as in sites=cross"
        )
    if others:
        if (owner := getattr(first, "owner", None)) is not None:
            raise TakenError(site.name, "the kernel", owner)
        raise ValueError(
            f"{_who(first)} and {_who(others[0])} both replace the kernel of {site.name!r}; "
            "install one of them, or choose other sites for the second"
        )
    for op in table["scores"] + table["probs"]:
        raise ValueError(
            f"{_who(op)} asks for scores or probabilities of {site.name!r}, where the kernel of "
            f"{_who(first)} computes none; choose other sites for one of them"
        )
    for op in table["kv"]:
        if getattr(op, "appends", False) and not getattr(first, "more_keys", True):
            raise ValueError(
                f"{_who(op)} gives {site.name!r} further keys, and the kernel of {_who(first)} "
                "needs one for each query; choose other sites for one of them"
            )
    if getattr(first, "masks", True):
        return
    for op in table["mask"]:
        raise ValueError(
            f"{_who(op)} has a mask for {site.name!r}, where the kernel of {_who(first)} has no "
            "place for one; choose other sites for one of them"
        )


def _refuse_on_linear(table: dict[str, tuple[Any, ...]], site: Site) -> None:
    for stage, what in (("mask", "a mask"), ("scores", "scores"), ("probs", "probabilities")):
        for op in table[stage]:
            raise ValueError(
                f"{_who(op)} needs {what} at {site.name!r}, whose attention is linear, as its "
                "model was trained, and has none; choose other sites, as in sites=cross"
            )


def refuse_mask(mask: Tensor | None, op: Op, site: Site) -> None:
    """What a kernel without masks does about one that comes with the model's own call."""
    if mask is not None:
        raise ValueError(
            f"the model masks keys at {site.name!r}, and the kernel of {_who(op)} has no place for "
            "a mask; choose other sites, or inputs of one length"
        )


def refuse_other_keys(q: Tensor, k: Tensor, op: Op, site: Site) -> None:
    """What a kernel for which tokens have a place among each other does about further keys."""
    if k.shape[2] != q.shape[2]:
        raise ValueError(
            f"{_who(op)} needs the tokens of {site.name!r} to look at themselves, and there are "
            f"{k.shape[2]} keys for {q.shape[2]} queries; choose sites of self-attention to which "
            "no other method appends keys"
        )


def _who(op: Any) -> str:
    owner = getattr(op, "owner", None)
    return f"op {op.name!r}" if owner is None else f"methods.{owner}"
