"""The stages between the projections of a site, from `kv` to `output`, and the one after its block:
the same in a hosted processor and in a layer that keeps its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from trainer.attention.call import SiteCall
from trainer.attention.op import GATE
from trainer.kernels.softmax import attention_probs, attention_scores

if TYPE_CHECKING:
    from trainer.attention.context import ContextHolder
    from trainer.attention.sites import Site

Stages = Mapping[str, tuple[Any, ...]]
Plain = Callable[..., Tensor]  # (q, k, v, *, mask) -> o
AT_CALL = ("kv", "mask", "kernel", "scores", "probs", "branch", "output")


def run_stages(
    stages: Stages,
    qkv: tuple[Tensor, Tensor, Tensor],
    *,
    mask: Tensor | None,
    call: SiteCall,
    plain: Plain,
) -> Tensor:
    """o (b, h, n, d) of q (b, h, n, d), k and v (b, h, m, d); plain: what the layer computes from
    them where no op replaces it."""
    q, k, v = qkv
    for op in stages["kv"]:
        q, k, v = op.kv(q, k, v, call=call)
    for op in stages["mask"]:
        mask = op.mask(mask, q, k, call=call)
    o = _attention(stages, (q, k, v), mask=mask, call=call, plain=plain)
    for op in stages["branch"]:
        o = op.branch(o, q, call)
    for op in stages["output"]:
        o = op.output(o, call)
    return o.to(q.dtype)


def _attention(
    stages: Stages,
    qkv: tuple[Tensor, Tensor, Tensor],
    *,
    mask: Tensor | None,
    call: SiteCall,
    plain: Plain,
) -> Tensor:
    q, k, v = qkv
    if stages["kernel"]:
        (op,) = stages["kernel"]
        replaced: Tensor = op.kernel(q, k, v, mask=mask, call=call)
        return replaced
    on_scores = _open(stages, "scores", q, call=call)
    on_probs = _open(stages, "probs", q, call=call)
    if not on_scores and not on_probs:
        return plain(q, k, v, mask=mask)
    scores = attention_scores(q, k, call.scale)
    for op in on_scores:
        scores = op.scores(scores, call)
    probs = attention_probs(scores, mask).to(v.dtype)
    for op in on_probs:
        probs = op.probs(probs, call)
    return probs @ v


def _open(stages: Stages, stage: str, q: Tensor, *, call: SiteCall) -> list[Any]:
    """The ops of a stage that want to run here, see `gate` in `op.py`."""
    gated = stages[GATE]
    return [op for op in stages[stage] if op not in gated or op.gate(q, call)]


class StageHost(Protocol):
    """What hosts a site, as far as the stage after its block goes."""

    @property
    def site(self) -> Site: ...
    @property
    def holder(self) -> ContextHolder: ...
    @property
    def stages(self) -> Stages: ...


def run_block(hosted: StageHost, output: Any, block: object) -> Any:
    """The output of the block around a site after the ops that change it."""
    ops, call = hosted.stages["block"], SiteCall(hosted.site, hosted.holder.ctx)
    if not isinstance(output, Tensor) or output.ndim != 3:
        raise ValueError(
            f"{type(block).__name__} around {call.site.name!r} does not return tokens alone; "
            f"op {ops[0].name!r} needs sites inside transformer blocks"
        )
    for op in ops:
        output = op.block(output, call)
    return output
