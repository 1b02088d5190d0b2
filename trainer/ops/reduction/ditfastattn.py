"""Attention that repeats what it computed before: over the steps of a sampler, over the halves of
guidance, and beyond a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.attention.op import Traits, label
from trainer.attention.op_conflicts import refuse_mask, refuse_other_keys
from trainer.kernels.column_masks import sliding_window
from trainer.kernels.flashmask import FEW, blockwise, dense
from trainer.kernels.mask_spec import MaskSpec
from trainer.kernels.softmax import softmax_attention
from trainer.ops.reduction.choices import HALVES, Choice

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.hooks import Sampler
    from trainer.attention.rows import Rows

PAIR = ("target/uncond", "target/cond")


class SharedAttention:
    """An op. What a site does at a step of a sampler:

    full: all of it; half: the rows with the prompt alone, whose output those without it get;
    window: attention to near tokens, and what the others added at the last full step;
    window_half: both; reuse: the output of the step before.

    rules: for each site what it does step by step, the last word again for later steps. Outside a
    sampler, as in training, it does all. What is kept is forgotten when a sampling begins or ends.
    """

    name = "ditfastattn"
    traits = Traits(owner=name, masks=False, more_keys=False, resizes=True, classic=True)

    def __init__(self, rules: Mapping[str, Sequence[Choice]], window: float) -> None:
        self.rules = {name: list(rule) for name, rule in rules.items()}
        self.window = window
        self.keeps = True  # False while a choice is only tried
        self.always = False  # keep what every choice could need, as calibration does
        self.outputs: dict[str, Tensor] = {}
        self.residuals: dict[str, Tensor] = {}
        self.specs: dict[tuple[int, torch.device], MaskSpec] = {}

    def choice(self, call: SiteCall, later: int = 0) -> Choice:
        """What the site does at the step that runs, or some steps later."""
        rule, step = self.rules[call.site.name], call.ctx.step + later
        if call.ctx.num_steps == 1 or call.ctx.training or step == 0:
            return "full"
        return rule[min(step, len(rule) - 1)]

    def skip(self, x: Tensor, call: SiteCall) -> Tensor | None:
        if self.choice(call) != "reuse":
            return None
        known = self.outputs.get(call.site.name)
        return known if known is not None and known.shape[:2] == x.shape[:2] else None

    def tokens(self, x: Tensor, call: SiteCall) -> Tensor:
        if self.choice(call) not in HALVES:
            return x
        return x[_rows_with_prompt(call.ctx.groups, label(self))]

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: SiteCall
    ) -> Tensor:
        refuse_mask(mask, self, call)
        refuse_other_keys(q, k, op=self, call=call)
        choice, name = self.choice(call), call.site.name
        if choice.startswith("window") and name in self.residuals:
            far = self.residuals[name]
            if len(far) != len(q):
                far = far[_rows_with_prompt(call.ctx.groups, label(self))]
            return self._near(q, k, v, call=call) + far
        o = softmax_attention(q, k, v, scale=call.scale)
        if self.keeps and (self.always or self._windowed_next(call)):
            far = o - self._near(q, k, v, call=call)
            self.residuals[name] = _doubled(far, call) if choice in HALVES else far
        return o

    def restore(self, y: Tensor, call: SiteCall) -> Tensor:
        if self.choice(call) in HALVES:
            y = _doubled(y, call)
        if self.keeps and (self.always or self.choice(call, later=1) == "reuse"):
            self.outputs[call.site.name] = y
        return y

    def begin(self, sampler: Sampler) -> None:
        """Raises ValueError where the halves of guidance are shared and there are none."""
        self.forget()
        halves = any(choice in HALVES for rule in self.rules.values() for choice in rule)
        if halves and not set(PAIR) <= set(sampler.groups):
            raise ValueError(
                f"{label(self)} shares what is computed with the prompt with the rows without it, "
                "and there are none: give a guidance above 1, or a plan without half"
            )

    def forget(self, *_: object) -> None:
        self.outputs.clear()
        self.residuals.clear()

    def _windowed_next(self, call: SiteCall) -> bool:
        """Whether a later step reads the residual before it is made anew."""
        for later in range(1, call.ctx.num_steps - call.ctx.step):
            choice = self.choice(call, later)
            if choice in ("full", "half"):
                return False
            if choice.startswith("window"):
                return True
        return False

    def _near(self, q: Tensor, k: Tensor, v: Tensor, *, call: SiteCall) -> Tensor:
        """Attention of each token to those in the window around it, in the order of the tokens."""
        if self.window == 1:
            return softmax_attention(q, k, v, scale=call.scale)
        key = (q.shape[2], q.device)
        if key not in self.specs:
            side = round(self.window * q.shape[2] / 2)
            self.specs[key] = sliding_window(q.shape[2], side, side).to(q.device)
        run = dense if q.shape[2] <= FEW else blockwise
        return run(q, k, v, spec=self.specs[key], scale=call.scale)


def _rows_with_prompt(groups: Rows, who: str) -> slice:
    if {group.name for group in groups.groups} != set(PAIR):
        raise ValueError(
            f"{who} needs rows with the prompt and without, and no others; give a guidance above "
            "1, without a source, or a plan without half"
        )
    return groups.slices[PAIR[1]]


def _doubled(x: Tensor, call: SiteCall) -> Tensor:
    """Rows with the prompt, for those without it too."""
    return torch.cat([x, x]) if len(call.ctx.groups.groups) == 2 else x
