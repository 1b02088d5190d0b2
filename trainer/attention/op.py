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

Ops of one site run in the order in which they were installed, but `restore`, which undoes `tokens`,
runs in the reverse order. An op with `scores` or `probs` costs its sites the fused kernel; with a
method `gate(q, site, ctx) -> bool` it pays only where that returns True. An op that trains is an
`nn.Module`; it is registered under its site as `name`. A stage counts only if the op's class
defines it as a method: a submodule called `mask` is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
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
    """Raises `ValueError` where ops cannot share a site, naming both and the site."""
    for op in ops:
        if not any(has_stage(op, stage) for stage in STAGES):
            raise ValueError(
                f"op {op.name!r} has no stage to run at; give it one of {', '.join(STAGES)}"
            )
    table = by_stage(ops)
    if not table["kernel"]:
        return
    first, *others = table["kernel"]
    if others:
        raise ValueError(
            f"ops {first.name!r} and {others[0].name!r} both replace the kernel of {site.name!r}; "
            "install one of them, or choose other sites for the second"
        )
    for op in table["scores"] + table["probs"]:
        raise ValueError(
            f"op {op.name!r} asks for scores or probabilities of {site.name!r}, where the kernel "
            f"of {first.name!r} computes none; choose other sites for one of them"
        )
