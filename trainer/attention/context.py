"""The step context gives attention ops what they need to know of the run: step, timestep, frames,
groups of batch rows.

Code that runs a denoiser sets it; ops read it:

    groups = Rows.of(("target/uncond", "target/cond"), count=2)
    with use(StepContext(step=3, num_steps=50, timestep=t, groups=groups)):
        denoiser(x_t, t, encoder_hidden_states=text)

Gradient checkpointing runs a block a second time in the backward pass, outside the `with`, on CUDA
even in another thread. So sites never read the context variable. A hook before each forward of the
denoiser writes the context to a `ContextHolder`, which the sites share and which outlives the
forward, and `BoundCheckpoint` makes the second run of a block see what its first run saw, also when
the denoiser was called with another context before the backward pass (for a prior image or a
distillation teacher).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trainer.attention.condition import Condition
from trainer.attention.kept_text import KeptText
from trainer.attention.rows import Rows


@dataclass(frozen=True, eq=False)
class StepContext:
    """One call of the denoiser. Frozen, since a later change must not affect a recompute.

    `timestep` is what the denoiser was called with, `groups` names the groups of batch rows,
    `latent_size` is the (height, width) of the denoiser's input; left None it is filled in from the
    call. The rows are clips times `frames`, the frames of a clip adjacent: those of its latents,
    where the VAE compresses time; `fps` (clips,) are its frames a second as a player shows them,
    None where that is unknown. `channels` are the values (rows, n, h, w) of further input channels
    by name, see `input_channels.py`. `condition` is the condition of all rows, None where the
    caller gives none. `text_tokens` is how many tokens of text the denoiser was called with, filled
    in from the call where it is None.
    """

    step: int
    num_steps: int
    timestep: Tensor
    frames: int = 1
    groups: Rows = field(default_factory=Rows)
    training: bool = False
    latent_size: tuple[int, int] | None = None
    fps: Tensor | None = None
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    condition: Condition | None = None
    text_tokens: int | None = None

    def rows(self, role: str) -> slice:
        """The batch rows of a group, such as `target/cond`, or of a branch or text role that one
        group alone has; a `ValueError` where none or several have it."""
        return self.groups.find(role)


_current: ContextVar[StepContext | None] = ContextVar("step_context", default=None)


@contextmanager
def use(ctx: StepContext) -> Iterator[StepContext]:
    """Every denoiser that is called inside runs with `ctx`; the innermost `use` counts."""
    token = _current.set(ctx)
    try:
        yield ctx
    finally:
        _current.reset(token)


def current() -> StepContext | None:
    """The context in use. For code that calls denoisers; ops get theirs as an argument."""
    return _current.get()


def completed(ctx: StepContext | None, call: Mapping[str, Any], training: bool) -> StepContext:
    """`ctx` with its latent size and number of text tokens filled in; without a `ctx`, a context
    made of the denoiser's own arguments.

    `call` maps argument names of the denoiser's forward to values.
    """
    sample = _sample(call)  # b c h w, or b c f h w; b n c where the tokens come packed
    size: tuple[int, int] | None = None
    if isinstance(sample, Tensor) and sample.ndim > 3:
        size = (sample.shape[-2], sample.shape[-1])
    words = call.get("encoder_hidden_states")
    tokens = words.shape[1] if isinstance(words, Tensor) and words.ndim == 3 else None
    if ctx is not None:
        size = size if ctx.latent_size is None else ctx.latent_size
        tokens = tokens if ctx.text_tokens is None else ctx.text_tokens
        if (size, tokens) == (ctx.latent_size, ctx.text_tokens):
            return ctx
        return replace(ctx, latent_size=size, text_tokens=tokens)
    frames = sample.shape[2] if isinstance(sample, Tensor) and sample.ndim == 5 else 1
    timestep = torch.as_tensor(call.get("timestep", 0))
    return StepContext(
        step=0,
        num_steps=1,
        timestep=timestep,
        frames=frames,
        training=training,
        latent_size=size,
        text_tokens=tokens,
    )


def _sample(call: Mapping[str, Any]) -> Any:
    """The latents a denoiser is called with; of a list of pictures, the first, (c, f, h, w)."""
    found = next((call[name] for name in ("sample", "hidden_states", "x") if name in call), None)
    return found[0] if isinstance(found, (list, tuple)) and found else found


class ContextHolder:
    """Holds the context of the running forward for all sites of a denoiser.

    Before the first forward it holds step 0 of 1 at timestep 0, so a block can be called by itself.
    """

    def __init__(self) -> None:
        self.ctx = StepContext(0, 1, torch.zeros(()))
        self._made_of, self._made = self.ctx, dict[Hashable, Any]()
        self.kept: KeptText | None = None  # while a sampler runs

    @contextmanager
    def keeping_text(self) -> Iterator[None]:
        """Inside, keys and values of the text are made once for all steps."""
        before, self.kept = self.kept, KeptText()
        try:
            yield
        finally:
            self.kept = before

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once for all who ask for `key` under the context held. Compiled
        code makes it every time: it would compile again wherever other keys were asked before."""
        if torch.compiler.is_compiling():
            return make()
        if self._made_of is not self.ctx:
            self._made_of, self._made = self.ctx, {}
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @contextmanager
    def holding(self, ctx: StepContext) -> Iterator[None]:
        before, self.ctx = self.ctx, ctx
        try:
            yield
        finally:
            self.ctx = before


class BoundCheckpoint:
    """Wraps a checkpoint function: a block recomputes under the context of its own forward."""

    def __init__(self, holder: ContextHolder, inner: Callable[..., Any]) -> None:
        self.holder = holder
        self.inner = inner

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ctx = self.holder.ctx

        def run(*inputs: Any, **options: Any) -> Any:
            with self.holder.holding(ctx):
                return function(*inputs, **options)

        run.__wrapped__ = function  # type: ignore[attr-defined]  # for who asks which block it is
        return self.inner(run, *args, **kwargs)


def bound(function: Callable[..., Any], holder: ContextHolder) -> BoundCheckpoint:
    """`function` bound to this holder; a block copied from elsewhere may come bound to another."""
    if isinstance(function, BoundCheckpoint):
        if function.holder is holder:
            return function
        function = function.inner
    return BoundCheckpoint(holder, function)
