"""The hosted processor runs one attention layer as fixed stages; `op.py` lists them.

    skip -> tokens -> context -> project q, k, v -> kv -> mask -> kernel -> branch -> output ->
    restore                                          (scores, probs: only where an op asks)

and `block` after the complete block around the layer.

With no op installed it is bit-identical to the processor of diffusers that it replaces:
`AttnProcessor2_0`, or one whose traits the model's family declares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.attention.call import SiteCall
from trainer.attention.context import ContextHolder
from trainer.attention.kept_text import Pair, keeps, same_every_step
from trainer.attention.native import attend, split_heads
from trainer.attention.op import Op, by_stage
from trainer.attention.stages import run_block, run_stages

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
    from torch.utils.hooks import RemovableHandle

    from trainer.attention.sites import Site


class HostedProcessor:
    """Processor of one classic `Attention`, self or cross, with the ops installed there.

    No `nn.Module`: `Attention.forward` filters arguments by the signature of `processor.__call__`,
    which for a module is `(*args, **kwargs)`, and `temb` would be lost. It refers to its site and
    to the context holder only, so that copying one block does not copy the rest of the denoiser.
    """

    def __init__(self, site: Site, holder: ContextHolder, previous: object) -> None:
        self.site = site
        self.holder = holder
        self.previous = previous
        self.reached = False
        self.hooks: list[RemovableHandle] = []  # of the block around, where an op has its stages
        self.set_ops(())

    def set_ops(self, ops: tuple[Op, ...]) -> None:
        self.ops = ops
        self.stages = by_stage(ops)
        self.reached = False

    def release(self) -> None:
        """Puts back the processor that was there before, unless another has taken its place."""
        module: Any = self.site.module
        if module.processor is self:
            module.set_processor(self.previous)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # b n c, or b c h w
        encoder_hidden_states: Tensor | None = None,  # b m c'
        attention_mask: Tensor | None = None,  # (b or b*heads) (1 or n) m
        temb: Tensor | None = None,
    ) -> Tensor:
        self.reached = True
        stages, call = self.stages, SiteCall(self.site, self.holder.ctx)
        x, mask = _enter(
            attn, hidden_states, encoder=encoder_hidden_states, mask=attention_mask, temb=temb
        )
        for op in stages["skip"]:
            known = op.skip(x, call)
            if known is not None:
                return _leave(attn, known, hidden_states)
        for op in stages["tokens"]:
            x = op.tokens(x, call)
        q, k, v = self._project(attn, x, encoder=encoder_hidden_states, call=call)
        o = run_stages(stages, (q, k, v), mask=mask, call=call, plain=self._plain)
        y = attn.to_out[1](attn.to_out[0](o.transpose(1, 2).flatten(2)))
        if self.site.native.linear and x.dtype == torch.float16:
            y = y.clip(-65504, 65504)
        for op in stages["restore"]:
            y = op.restore(y, call)
        return _leave(attn, y, hidden_states)

    def after_block(self, block: object, args: object, output: Any) -> Any:
        """A forward hook of the block around the site."""
        return run_block(self, output, block)

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None) -> Tensor:
        return attend(self.site, q=q, k=k, v=v, mask=mask)

    def _project(
        self, attn: Attention, x: Tensor, *, encoder: Tensor | None, call: SiteCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = attn.to_q(x)
        kept = self._kept(attn, encoder)
        if kept is not None and (found := kept.get(self.site.name)) is not None:
            return split_heads(self.site, q=q, k=found[0], v=found[1])
        k_ctx = v_ctx = x if encoder is None else encoder
        for op in self.stages["context"]:
            k_ctx, v_ctx = op.context(k_ctx, v_ctx, call)
        if encoder is not None and attn.norm_cross is not None:
            same = k_ctx is v_ctx
            k_ctx = attn.norm_encoder_hidden_states(k_ctx)
            v_ctx = k_ctx if same else attn.norm_encoder_hidden_states(v_ctx)
        k, v = attn.to_k(k_ctx), attn.to_v(v_ctx)
        for op in self.stages["project"]:
            k = op.project(k, k_ctx, role="k", call=call)
            v = op.project(v, v_ctx, role="v", call=call)
        if kept is not None:
            kept[self.site.name] = k, v
        return split_heads(self.site, q=q, k=k, v=v)

    def _kept(self, attn: Attention, encoder: Tensor | None) -> dict[str, Pair] | None:
        """Where keys and values of the text are kept from step to step; None where they may
        differ."""
        kept, condition = self.holder.kept, self.holder.ctx.condition
        if kept is None or condition is None or not keeps(encoder, condition.tokens):
            return None
        if self.stages["context"] or self.stages["project"]:
            return None
        if not (same_every_step(attn.to_k) and same_every_step(attn.to_v)):
            return None
        assert encoder is not None
        return kept.of(encoder)


def _enter(
    attn: Attention,
    hidden: Tensor,
    *,
    encoder: Tensor | None,
    mask: Tensor | None,
    temb: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Tokens after the site's own norms, (b, n, c), and mask per head, (b, heads, 1 or n, m)."""
    x = hidden if attn.spatial_norm is None else attn.spatial_norm(hidden, temb)
    x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
    if mask is not None:
        batch, length, _ = (x if encoder is None else encoder).shape
        mask = attn.prepare_attention_mask(mask, length, batch)
        mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    return x, mask


def _leave(attn: Attention, y: Tensor, hidden: Tensor) -> Tensor:
    """Back to the shape of the input, with residual and rescaling."""
    if hidden.ndim == 4:
        y = y.transpose(-1, -2).reshape(hidden.shape)
    if attn.residual_connection:
        y = y + hidden
    # dividing by 1 changes nothing and costs a pass forward and a pass backward
    return y if attn.rescale_output_factor == 1 else y / attn.rescale_output_factor
