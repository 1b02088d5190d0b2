"""The sampler's loop: latents from one noise level to the next, over any diffusers scheduler, with
guidance and the hooks of methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trainer.attention.condition import Condition
from trainer.attention.context import StepContext
from trainer.attention.hooks import Prediction, SamplingHook
from trainer.attention.host import Host
from trainer.attention.read_prompt import ReadPrompt
from trainer.attention.rows import Rows
from trainer.attention.sites import Site
from trainer.backbones.backbone import Backbone
from trainer.backbones.noise_levels import Extent
from trainer.backbones.schedulers import set_levels, with_solver
from trainer.common.seeds import seed_of
from trainer.diffusion.edit_source import SOURCE, EditSource, groups_of
from trainer.diffusion.objective import Objective, alpha_sigma
from trainer.diffusion.predictor import Predictor
from trainer.diffusion.replay import replayed
from trainer.diffusion.sampling_settings import Sampling

CPU = torch.device("cpu")


def latent_extent(backbone: Backbone, settings: Sampling) -> Extent:
    """Frames, height and width of the latents of one picture or clip.

    Raises:
        ValueError: a size, or a number of frames, that the model cannot make.
    """
    size = settings.size or (backbone.resolution, backbone.resolution)
    if any(side < 1 or side % backbone.multiple for side in size):
        raise ValueError(
            f"size {size[0]}x{size[1]} must be a multiple of {backbone.multiple}, and above 0"
        )
    height, width = (side // backbone.divisor for side in size)
    return backbone.clip_frames.latent(settings.frames), height, width


@dataclass(frozen=True)
class Denoising:
    """A sampler at work on `clips` clips.

    text: a condition for each clip of each group in `groups`; given: whether the latents to start
    from were given; channels, on_step: as of `sample`; generators: one for each clip, for solvers
    that draw noise at every step; prompts: one for each clip, as text; completing: hooks after
    those of methods, of a clip of which a part is known; edited: the source of an edit, whose rows
    run along.
    """

    backbone: Backbone
    text: Condition
    clips: int
    settings: Sampling
    given: bool = False
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    on_step: Callable[[int, Tensor], None] | None = None
    generators: Sequence[torch.Generator] = ()
    prompts: Sequence[str] = ()
    completing: tuple[SamplingHook, ...] = ()
    edited: EditSource | None = None

    @property
    def sites(self) -> list[Site]:
        return self.backbone.sites

    @property
    def host(self) -> Host:
        return self.backbone.host

    @property
    def source_prompt(self) -> str | None:
        return None if self.edited is None else self.edited.prompt

    @property
    def trajectory(self) -> Mapping[int, Tensor]:
        return {} if self.edited is None else self.edited.trajectory

    def mask(self, name: str) -> Tensor | None:
        return None if self.edited is None else self.edited.masks.get(name)

    def read(self, prompt: str) -> ReadPrompt:
        return self.backbone.prompts.read(prompt)

    @property
    def reference(self) -> Mapping[int, Tensor]:
        return {} if self.edited is None else self.edited.reference

    def replay(self, steps: Sequence[int], reference: bool = False) -> None:
        """Runs the network over the inverted source, or the reference, at these steps."""
        assert self.edited is not None, "only a source that is edited is replayed"
        own = self.edited
        own = replace(own, trajectory=own.reference) if reference else own
        replayed(self.backbone, own, self.scheduler(0, self.backbone.device), steps=steps)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of rows of one call of the denoiser."""
        return groups_of(self.settings, self.edited)

    @property
    def steps(self) -> int:
        return self.settings.steps

    @property
    def frames(self) -> int:
        """Rows of latents of a clip: fewer than its frames where the VAE compresses time."""
        return self.backbone.clip_frames.latent(self.settings.frames)

    @property
    def hooks(self) -> tuple[SamplingHook, ...]:
        return (*self.backbone.hooks, *self.completing)

    @cached_property
    def objective(self) -> Objective:
        return Objective.of(self.backbone)

    @property
    def noise_scale(self) -> float:
        """Of what sampling starts from; a flow's scheduler starts from unit noise."""
        return float(getattr(self.scheduler(0, CPU), "init_noise_sigma", 1.0))

    @property
    def calls(self) -> int:
        """Timesteps of the scheduler: of some solvers more than the steps."""
        return len(self.scheduler(0, CPU).timesteps)

    def scheduler(self, first: int, device: torch.device) -> Any:
        """One that is at timestep number `first`. Those that count their steps are told, since two
        steps may have one timestep."""
        levels = self.backbone.noise_levels(self.steps, self.extent)
        scheduler = self._solver(levels.mu)
        set_levels(scheduler, self.steps, levels=levels, device=device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return scheduler

    @property
    def extent(self) -> Extent:
        """Of the latents of one picture or clip."""
        return latent_extent(self.backbone, self.settings)

    def _solver(self, mu: float | None) -> Any:
        own, name = self.backbone.scheduler(), self.settings.sampler
        if name is None:
            return own
        made = with_solver(own, name, mu=mu)
        if self.generators and hasattr(made, "noise_sampler_seed"):
            made.noise_sampler_seed = self._seeds()
        return made

    def _seeds(self) -> list[int]:
        """What a solver that follows one Brownian path a row takes in the place of generators: the
        seed of each picture, and seeds of their own for the further frames of a clip."""
        firsts = [own.initial_seed() for own in self.generators]
        frames = range(1, self.frames)
        return [
            s for first in firsts for s in (first, *(seed_of(first, "frame", n) for n in frames))
        ]

    def level(self, step: int) -> tuple[float, float]:
        """alpha and sigma before a step."""
        t = self.scheduler(0, CPU).timesteps[step]
        alpha, sigma = alpha_sigma(self.objective, t[None], 1)
        return float(alpha), float(sigma)

    def places(self, word: str) -> list[list[int]]:
        """Where a word is among the tokens of each clip's prompt."""
        return [self.backbone.prompts.places(prompt, word) for prompt in self.prompts]

    def run(self, x_t: Tensor) -> Tensor:
        """Clean latents from noise, or from latents given in its place, (b f, c, h, w)."""
        with self._opened():
            return self._run(x_t)

    def from_image(self, x_t: Tensor, first: int) -> Tensor:
        """Clean latents from those of a picture, noised to before step `first`."""
        with self._opened():
            return self(x_t, first, self.calls)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Between the functions `open` and `close` of hooks."""
        opened = []
        try:
            for hook in self.hooks:
                opened.append(hook)
                if hook.open is not None:
                    hook.open(self)
            yield
        finally:
            for hook in reversed(opened):
                if hook.close is not None:
                    hook.close(self)

    def _run(self, x_t: Tensor) -> Tensor:
        step = 0
        if not self.given:
            x_t = x_t * self.noise_scale
        starts = [hook.begin for hook in self.hooks if hook.begin is not None]
        assert len(starts) <= 1, "the methods that were applied claim the start of sampling once"
        for begin in starts:
            x_t, step = begin(x_t, self)
        return self(x_t, step, self.calls)

    def __call__(self, x_t: Tensor, first: int, last: int) -> Tensor:
        """x_t (b f, c, h, w) from before step `first` to before step `last`, for any number of
        frames."""
        scheduler = self.scheduler(first, x_t.device)
        text, rows = self.text, Rows.of(self.groups, self.clips)
        for tells in (hook.tells for hook in self.hooks if hook.tells is not None):
            text = tells(text, rows)
        ctx, condition = self._context(x_t), text.per_frame(len(x_t) // self.clips)
        drawing = self._drawing(scheduler, len(x_t) // self.clips)
        x_s = None if self.edited is None else x_t
        for step, t in list(enumerate(scheduler.timesteps))[first:last]:
            at_step = replace(ctx, step=step, timestep=t)
            told = condition
            if self.edited is not None and x_s is not None:
                told = self.edited.told(condition, ctx.groups, step)
                x_s = self.edited.latents(step, x_s)
            predict = Predictor(
                self.backbone,
                self.settings,
                scheduler=scheduler,
                condition=told,
                ctx=at_step,
                hooks=self.hooks,
                source=x_s,
            )
            for hook in self.hooks:
                if hook.before_step is not None:
                    x_t = hook.before_step(x_t, predict, predict.ctx)
            prediction = predict(x_t)
            x_t, x_s = self._stepped(scheduler, prediction, t=t, drawing=drawing)
            made = x_s
            if self.edited is not None and x_s is not None:
                x_s = self.edited.after(step, x_s)
            prediction = replace(prediction, source=x_s, made_source=made)
            for hook in self.hooks:
                if hook.after_step is not None:
                    x_t = hook.after_step(x_t, prediction, predict.ctx)
            if self.on_step is not None:
                self.on_step(step, x_t)
        return self._checked(x_t)

    def _stepped(
        self, scheduler: Any, made: Prediction, *, t: Tensor, drawing: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The latents after the scheduler's step, and those of the source rows. Both in one call: a
        scheduler counts its steps."""
        if made.source is None or made.source_output is None:
            return scheduler.step(made.output, t, made.x_t, **drawing).prev_sample, None
        output, x = (
            torch.cat(parts)
            for parts in ((made.output, made.source_output), (made.x_t, made.source))
        )
        after: Tensor = scheduler.step(output, t, x, **drawing).prev_sample
        x_t, x_s = after.split(len(made.x_t))
        return x_t, x_s

    def _checked(self, x_t: Tensor) -> Tensor:
        """Raises ValueError for latents that a solver has made infinite or NaN: ancestral ones do
        where the first noise level is far above the second."""
        if self.settings.sampler is not None and not torch.isfinite(x_t).all():
            raise ValueError(
                f"scheduler={self.settings.sampler} came to values that are not finite in "
                f"{self.steps} steps: its arithmetic does not go with the noise levels of this "
                "backbone; give more steps, or another scheduler"
            )
        return x_t

    def _drawing(self, scheduler: Any, frames: int) -> dict[str, Any]:
        """What a step draws its noise from: a generator for each row."""
        if not self.generators or "generator" not in inspect.signature(scheduler.step).parameters:
            return {}
        every = [own for own in self.generators for _ in range(frames)]
        return {"generator": every if self.edited is None else every * 2}

    def _context(self, x_t: Tensor) -> StepContext:
        """What the calls of every step have in common, for latents (b f, c, h, w)."""
        frames = len(x_t) // self.clips
        rows = Rows.of(self.groups, len(x_t))
        fps = self.settings.fps
        rate = None
        if fps is not None:
            rate = torch.full((self.clips * len(rows.groups),), fps, device=x_t.device)

        def of_rows(values: Tensor) -> Tensor:
            """Values of every frame of the clips for all rows: of as many frames as x_t has."""
            clips = values.to(x_t).unflatten(0, (self.clips, -1))[:, :frames].flatten(0, 1)
            return rows.join({"target": clips, SOURCE: clips})

        unset = torch.zeros((), device=x_t.device)
        return StepContext(
            0,
            self.steps,
            unset,
            frames=frames,
            groups=rows,
            fps=rate,
            channels={name: of_rows(values) for name, values in self.channels.items()},
        )
