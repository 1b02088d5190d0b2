"""What a method does while pictures or clips are sampled: hooks, as a record of functions.

In each step of the sampler, every hook in the order in which methods were applied:

    before_step(x_t, predict, ctx) -> x_t     may call the denoiser: predict(x_t)
    combine(prediction, ctx) -> output        after guidance, in each call of `predict`
    after_step(x_t, prediction, ctx) -> x_t   x_t after the scheduler's step

and once, before the first step, for the one hook that has it:

    begin(x_t, sampler) -> x_t, step          where sampling starts, and before which step that is

Around all of it, `open(sampler)` before and `close(sampler)` after, whatever happens: there a hook
reads the prompts, or installs ops for this sampling alone.

With a `SourceBranch`, rows of an edit's source run beside the others, in groups `source/uncond` and
`source/cond`. They begin where the others do, or are at each step what inversion passed
(`replays`), and no hook changes them; `prediction.source` has their latents. `sampler.replay` runs
the network over an inversion before the first step, for ops that keep what they see of it.

Latents are (b f, c, h, w), the frames of a clip adjacent. The sampler runs without gradients; a
hook that needs them, for the gradient of a loss on x0 say, enables them around its own calls:

    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        loss = distance(predict(x).x0)
    (slope,) = torch.autograd.grad(loss, x)

Where `combine` itself takes them, by the x_t of the prediction it gets, its hook `differentiates`:
each call of the denoiser then keeps what they need, and what the sampler gets of it is detached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.condition import Condition
    from trainer.attention.context import StepContext
    from trainer.attention.host import Host
    from trainer.attention.read_prompt import ReadPrompt
    from trainer.attention.rows import Rows
    from trainer.attention.sites import Site

# the aspect that a hook with `begin`, or with a source branch, claims
START = "the start of sampling"


class Sampler(Protocol):
    """A running sampler: takes `x_t` (b f, c, h, w) from before step `first` to before step `last`.
    The number of frames of a clip follows from the number of rows."""

    @property
    def steps(self) -> int: ...

    @property
    def frames(self) -> int:
        """Of latents of each clip, 1 for pictures."""
        ...

    @property
    def given(self) -> bool:
        """Whether the caller gave the latents to start from; otherwise they are noise."""
        ...

    def __call__(self, x_t: Tensor, first: int, last: int) -> Tensor: ...

    def level(self, step: int) -> tuple[float, float]:
        """alpha and sigma of the latents before a step."""
        ...

    def places(self, word: str) -> list[list[int]]:
        """Where a word is among the tokens of each clip's prompt: its first token, each time it is
        there."""
        ...

    @property
    def sites(self) -> Sequence[Site]:
        """Of the model that samples."""
        ...

    @property
    def host(self) -> Host: ...

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of rows of one call of the denoiser."""
        ...

    @property
    def prompts(self) -> Sequence[str]:
        """Of the pictures or clips that are generated, one each."""
        ...

    @property
    def source_prompt(self) -> str | None:
        """Of the source rows; None where there are none."""
        ...

    @property
    def trajectory(self) -> Mapping[int, Tensor]:
        """The latents (1, c, h, w) of an inverted source before each step, by its number, and by
        the number of all steps the clean ones; empty where the source was generated."""
        ...

    def mask(self, name: str) -> Tensor | None:
        """A mask (1, 1, H, W) of 0 to 1 that the user gave, of `source` or `target`."""
        ...

    @property
    def reference(self) -> Mapping[int, Tensor]:
        """As `trajectory`, of a second picture that was inverted; empty without one."""
        ...

    def read(self, prompt: str) -> ReadPrompt:
        """The words of a prompt, and their tokens."""
        ...

    def replay(self, steps: Sequence[int], reference: bool = False) -> None:
        """Runs the network over the inverted source at these steps, or over the reference, in rows
        `source/cond` alone.

        Raises:
            ValueError: it was not inverted.
        """
        ...


@dataclass(frozen=True, eq=False)
class Prediction:
    """The output of the denoiser at one step.

    x_t (b f, c, h, w): its input; outputs: by the name of each group of rows, as in
    `target/cond`; output: what guidance makes of them; convert: from an output and x_t to x0;
    revert: from x0 and x_t to the output that means it; find_level: gives `level`. source
    (b f, c, h, w): the latents of the source rows, where there are some; for `after_step` those
    after the step. source_output: what guidance makes of their outputs. made_source: the latents
    that the step made of the source's, where what inversion passed has taken their place.
    """

    x_t: Tensor
    outputs: Mapping[str, Tensor]
    output: Tensor
    convert: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    revert: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    find_level: Callable[[], tuple[Tensor, Tensor]] = field(repr=False)
    source: Tensor | None = None
    source_output: Tensor | None = None
    made_source: Tensor | None = None

    @cached_property
    def level(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma of x_t, each (b f, 1, 1, 1)."""
        return self.find_level()

    @cached_property
    def x0(self) -> Tensor:
        """The clean latents (b f, c, h, w) that `output` means; computed when first asked for."""
        return self.convert(self.output, self.x_t)

    def meaning(self, x0: Tensor) -> Tensor:
        """The output that means these clean latents (b f, c, h, w)."""
        return self.revert(x0, self.x_t)

    def detached(self) -> Prediction:
        """Without what gradients need."""
        outputs = {name: output.detach() for name, output in self.outputs.items()}
        x_t, output = self.x_t.detach(), self.output.detach()
        beside = None if self.source_output is None else self.source_output.detach()
        return replace(self, x_t=x_t, outputs=outputs, output=output, source_output=beside)


Predict = Callable[["Tensor"], Prediction]


@dataclass(frozen=True)
class SourceBranch:
    """That a method edits a source. prompt: of the source, None for what the sampler is given;
    needed: whether there is no sampling without a source; null_text: steps by which the
    unconditional embedding of every step is optimised for an inverted source, 0 for none; replays:
    whether the rows of an inverted source are at each step the latents that inversion passed, not
    what sampling makes of the first; inverts: whether the source must have been inverted; masks:
    those of the user's that it reads, `source` and `target`; guides: whether an inverted source is
    guided too; refers: whether it reads a second picture, inverted too; tells: what the source's
    rows are told, made of what their prompt is encoded to."""

    prompt: str | None = None
    needed: bool = False
    null_text: int = 0
    replays: bool = False
    inverts: bool = False
    masks: tuple[str, ...] = ()
    guides: bool = False
    refers: bool = False
    tells: Callable[[Condition], Condition] | None = None


@dataclass(frozen=True)
class SamplingHook:
    """Any of the functions at the top of this file, and whether the source of an edit runs along.
    differentiates: whether `combine` takes gradients. shown: the masks and maps (rows, h, w) of 0
    to 1 that the last sampling used, by a name each. tells: what all rows are told, one for each
    clip of each group, made of what their prompts are encoded to. between: whether the pictures of
    a sampling lie between the first and the last of them."""

    begin: Callable[[Tensor, Sampler], tuple[Tensor, int]] | None = None
    before_step: Callable[[Tensor, Predict, StepContext], Tensor] | None = None
    combine: Callable[[Prediction, StepContext], Tensor] | None = None
    after_step: Callable[[Tensor, Prediction, StepContext], Tensor] | None = None
    differentiates: bool = False
    open: Callable[[Sampler], None] | None = None
    close: Callable[[Sampler], None] | None = None
    source: SourceBranch | None = None
    shown: Callable[[], Mapping[str, Tensor]] | None = None
    tells: Callable[[Condition, Rows], Condition] | None = None
    between: bool = False
