"""Hosts a layer that keeps its own processor: ops act in the attention call which that makes.

    tokens -> [ context -> project -> kv -> mask -> kernel -> branch -> output ] -> restore

What is in brackets runs inside the layer, the rest around it.

While an op is installed, the hosted layer stands in the place of the layer's forward and takes the
softmax attention call inside it (`attention_calls.py`), after norms and rotary positions; ops see
(b, h, n, d) whatever the layer's own layout. Without an op nothing at all is in its way. `context`
is what the layers of keys and values get, those of the text where text has its own; `tokens` and
`restore` see the image tokens, where image and text come as one sequence too.

Under torch.compile, a layer with ops runs uncompiled, and the rest of its block compiled.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.attention.attention_calls import AttentionCalls
from trainer.attention.context import ContextHolder
from trainer.attention.layer_run import LayerRun
from trainer.attention.op import Op, by_stage, has_stage, label
from trainer.attention.stages import AT_CALL, run_block, run_stages

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from trainer.attention.call import SiteCall
    from trainer.attention.sites import Site

HOSTED = "_hosted_layer"  # where a layer keeps the host of its own


class HostedLayer:
    """One attention layer of any class, with the ops installed there.

    It refers to its site and to the context holder only, so that copying one block does not copy
    the rest of the denoiser; the copy of a layer has a host of its own.
    """

    def __init__(self, site: Site, holder: ContextHolder) -> None:
        self.site = site
        self.holder = holder
        self.reached = False
        self.hooks: list[RemovableHandle] = []  # of the block around, where an op has its stages
        self.placed = False  # as the layer's forward, or inside what has replaced that since
        self.inner: Any = None  # another's replacement of the layer's forward, called by this one
        site.module.__dict__[HOSTED] = self
        self.set_ops(())

    def set_ops(self, ops: tuple[Op, ...]) -> None:
        self.ops = ops
        self.stages = by_stage(ops)
        self.reached = False
        own = self.site.module.__dict__
        if ops and not self.placed:
            self.inner, own["forward"] = own.get("forward"), self
            self.placed = True
        elif not ops and own.get("forward") is self:
            del own["forward"]
            self.placed = False
            if self.inner is not None:
                own["forward"], self.inner = self.inner, None

    def release(self) -> None:
        """Leaves the layer as it was before it was hosted."""
        self.set_ops(())
        self.site.module.__dict__.pop(HOSTED, None)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the layer's forward."""
        module = self.site.module
        forward = self.inner or partial(type(module).forward, module)
        if not self.ops:
            return forward(*args, **kwargs)
        run = LayerRun(self.site, self.stages, ctx=self.holder.ctx, args=args, kwargs=kwargs)
        run.enter()
        with ExitStack() as stack:
            if self.stages["context"]:
                stack.enter_context(run.contexts())
            if self.stages["project"]:
                stack.enter_context(run.projections())
            stack.enter_context(AttentionCalls(partial(self._take, run.call)))
            output = forward(*run.args, **run.kwargs)
        self.reached = self.reached or run.call.part >= 0
        return run.leave(output)

    def after_block(self, block: object, args: object, output: Any) -> Any:
        """A forward hook of the block around the site."""
        return run_block(self, output, block)

    def _take(
        self,
        call: SiteCall,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Softmax attention as the layer calls it, with the stages of the ops around it."""
        call.part += 1
        call.scale = scale
        if not any(self.stages[stage] for stage in AT_CALL):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
        self._refuse(call, query, dropout_p)
        if is_causal:
            shape = (query.shape[-2], key.shape[-2])
            attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()

        def plain(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale
            )

        groups = query.shape[1] // key.shape[1] if enable_gqa else 1
        if attn_mask is not None and attn_mask.ndim < 4:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
        k, v = (x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in (key, value))
        return run_stages(self.stages, (query, k, v), mask=attn_mask, call=call, plain=plain)

    def _refuse(self, call: SiteCall, query: Tensor, dropout: float) -> None:
        """Refuses calls in which an op could not know what it sees."""
        who = self._first_at(AT_CALL)
        if query.ndim != 4:
            raise ValueError(
                f"{who} needs queries of each head (b, h, n, d), and {self.site.name!r} "
                f"attends with {query.ndim} axes; choose other sites"
            )
        if call.lengths is not None and query.shape[0] < call.lengths.rows:
            raise ValueError(
                f"{who} acts on whole batches, and {self.site.name!r} attends row by row; "
                "choose other sites"
            )
        if dropout and (who := self._first_at(("kernel", "scores", "probs"))):
            raise ValueError(
                f"{who} computes attention without dropout, and {self.site.name!r} drops "
                f"{dropout} of it; set the model's attention dropout to 0"
            )

    def _first_at(self, stages: tuple[str, ...]) -> str:
        """The first op here that has one of these stages, as a user knows it; empty for none."""
        return next((label(op) for op in self.ops if any(has_stage(op, s) for s in stages)), "")
