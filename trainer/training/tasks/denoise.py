"""Denoising, the task of every diffusion model: predict the target from noisy latents.

    loss = w(t) * |f(x_t, t, text) - target|^2,    the mean over the latents that count

A sample is an image or a clip, which has one text, timestep and seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trainer.attention.condition import Condition
from trainer.attention.context import StepContext
from trainer.attention.further_conditions import FurtherCondition, told_further
from trainer.attention.input_channels import ChannelInputs, values_of
from trainer.attention.rows import Rows
from trainer.attention.step_result import StepResult
from trainer.backbones.backbone import Backbone
from trainer.backbones.family import Encoder
from trainer.backbones.noise_levels import Extent
from trainer.common.seeds import seed_of
from trainer.data.latent_cache import as_stored
from trainer.data.latent_store import LatentStore
from trainer.data.loader import Batch
from trainer.diffusion.guidance import COND
from trainer.diffusion.objective import (
    Objective,
    add_noise,
    draw_timesteps,
    loss_weight,
    target_of,
    to_noise,
    to_x0,
)
from trainer.diffusion.predict import predict_groups
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.training.tasks.task import Purpose

Seed = tuple[int, str, int, int]
SAMPLED_STEPS = 50  # where the shift of a pipeline depends on the number of steps


@dataclass(frozen=True, eq=False)
class Encoded:
    """A batch in latents: x0, noise and x_t (b f, c, h, w) in fp32, the `frames` latent frames of a
    clip adjacent; t (b,) of each sample; condition of each row; channels: the values of further
    input channels by name, see `attention/input_channels.py`."""

    batch: Batch
    x0: Tensor
    noise: Tensor
    x_t: Tensor
    t: Tensor
    condition: Condition
    frames: int = 1
    channels: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def row_t(self) -> Tensor:
        """The timestep of each row (b f,)."""
        return self.t.repeat_interleave(self.frames)


@dataclass(frozen=True)
class Denoise:
    """The default task. seed: of the run; caption_dropout: the share of captions that are left
    empty in training; as_sampled: timesteps are shifted as those of a sampler in `SAMPLED_STEPS`
    steps at the size of each batch, in place of the objective's shift; texts: what encodes captions
    in place of the backbone's own encoder; store: where latents of pictures are kept by content."""

    backbone: Backbone
    objective: Objective
    seed: int = 0
    caption_dropout: float = 0.0
    as_sampled: bool = False
    texts: Encoder | None = None
    store: LatentStore | None = None

    def encode(self, batch: Batch, purpose: Purpose = "train") -> Encoded:
        """Latents, noise, timesteps and text; random numbers depend on the seed, the purpose and
        each sample's position in its step alone."""
        seeds = seeds_of(batch, self.seed, purpose)
        moments = batch.moments
        if moments is None:
            assert batch.pixels is not None, "a batch has pixels or moments"
            moments = as_stored(self.backbone.moments(batch.pixels, batch.frames))
            if self.store is not None and batch.contents:
                self.store.keep(batch.contents, moments)
        frames = self.backbone.clip_frames.latent(batch.frames)
        shape = (frames, moments.shape[1] // 2, *moments.shape[2:])
        normals = torch.stack([three_normals(seed_of(*seed), shape) for seed in seeds], 1)
        posterior, noise, offset = normals.to(moments).flatten(1, 2)  # (b f) c h w
        x0 = self.backbone.latents(moments, posterior)
        noise = noise + self.objective.offset_noise * offset[..., :1, :1]
        extent = (frames, x0.shape[-2], x0.shape[-1])
        t = self._timesteps(batch, seeds, extent).to(moments.device)
        x_t = add_noise(self.objective, x0, noise, t=t.repeat_interleave(frames))
        dropout = self.caption_dropout if purpose == "train" else 0.0
        condition = self._condition(batch, kept_captions(batch.captions, seeds, dropout))
        condition = self._told(condition, batch, seeds=seeds, drops=purpose == "train")
        return Encoded(
            batch,
            x0,
            noise=noise,
            x_t=x_t,
            t=t,
            condition=condition.per_frame(frames),
            frames=frames,
            channels=self._channels(batch, x0, seeds),
        )

    def loss(self, state: Encoded) -> StepResult:
        """The losses of one forward; a clip's is the mean over its frames."""
        batch, x_t, t = state.batch, state.x_t, state.row_t
        fps = None if batch.fps is None else torch.tensor(batch.fps, device=state.x0.device)
        ctx = StepContext(
            step=0,
            num_steps=1,
            timestep=t,
            frames=state.frames,
            groups=Rows.of((COND,), len(x_t)),
            training=self.backbone.denoiser.training,
            fps=fps,
            channels=state.channels,
        )
        outputs = predict_groups(self.backbone, {"target": x_t}, condition=state.condition, ctx=ctx)
        output = outputs[COND]
        target = target_of(self.objective, state.x0, state.noise, t=t)
        error = (output.float() - target.float()).square()
        weights = loss_weight(self.objective, state.t)
        losses = mean_per_sample(error, batch.masks, state.frames) * weights
        return StepResult(
            losses,
            x_t=x_t,
            output=output,
            t=t,
            batch=batch,
            convert=self._to_x0,
            levels=state.t / self.objective.num_timesteps,
        )

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], settings: Sampling) -> Tensor:
        """Pictures (b, 3, H, W) in [-1, 1], or the frames of clips (b f, 3, H, W)."""
        return sample(self.backbone, prompts, seeds, settings=settings)

    @torch.no_grad()
    def score(self, batch: Batch, levels: Sequence[float]) -> Tensor:
        """Losses (levels, b) at timesteps that are `levels` of their range, in [0, 1): of the
        captions without dropout, with noise that is the same in every call and at every level.

        They are the plain squared error in the units that the backbone was trained in, whatever
        weighting, target, offset noise and timesteps the recipe trains with: those of two recipes
        on one backbone can be compared.
        """
        if batch.moments is None:
            assert batch.pixels is not None, "a batch has pixels or moments"
            moments = as_stored(self.backbone.moments(batch.pixels, batch.frames))
            batch = replace(batch, moments=moments, pixels=None)
        count = len(batch.positions)
        found = [self._plain(replace(batch, u=[level] * count)) for level in levels]
        return torch.stack(found)

    def _plain(self, batch: Batch) -> Tensor:
        """The plain losses (b,) at the timesteps `batch.u`."""
        chosen = replace(self.objective, weighting="none", offset_noise=0.0)
        task = replace(self, objective=chosen)
        state = task.encode(batch, "validate")
        result = task.loss(state)
        target, flow = self.backbone.published_target
        if target == chosen.target or flow != (chosen.alphas_cumprod is None):
            return result.losses  # on another path no units are the same
        usual = replace(chosen, target=target)
        x0, t = result.x0_hat, state.row_t
        noise = to_noise(chosen, result.output.float(), state.x_t, t=t)
        error = target_of(usual, x0 - state.x0, noise - state.noise, t=t).float().square()
        return mean_per_sample(error, batch.masks, state.frames)

    def _timesteps(self, batch: Batch, seeds: Sequence[Seed], extent: Extent) -> Tensor:
        """Random ones, distributed as the objective asks. A validation batch brings quantiles of
        its own, taken as they are, so that losses of different objectives can be compared. extent:
        of the latents of a sample."""
        if batch.u is not None:
            uniform = replace(self.objective, timesteps="uniform", shift=1.0)
            return draw_timesteps(uniform, torch.tensor(batch.u))
        u = torch.tensor([uniform_of(seed_of(*seed, "u")) for seed in seeds])
        if not self.as_sampled:
            return draw_timesteps(self.objective, u)
        shift = self.backbone.shift(SAMPLED_STEPS, extent)
        return draw_timesteps(replace(self.objective, shift=shift), u)

    @torch.no_grad()
    def _channels(self, batch: Batch, x0: Tensor, seeds: Sequence[Seed]) -> dict[str, Tensor]:
        """The values of the backbone's further input channels, none where it has none."""
        if not self.backbone.input_channels:
            return {}
        given = ChannelInputs(
            (x0.shape[0], x0.shape[1], x0.shape[2], x0.shape[3]),
            frames=len(x0) // len(seeds),
            seeds=[seed_of(*seed, "channels") for seed in seeds],
            inputs=batch.inputs,
            x0=x0,
        )
        return values_of(self.backbone, given)

    def _condition(self, batch: Batch, captions: Sequence[str]) -> Condition:
        """Of each sample: the captions, and the extra inputs that the backbone has an encoder
        for."""
        encoders = self.backbone.encoders
        given = {name: value for name, value in batch.inputs.items() if name in encoders}
        inputs = {"text": captions, **given}
        if self.texts is None:
            return self.backbone.encode(inputs)
        return self.backbone.encode(inputs, {"text": self.texts})

    def _told(
        self, condition: Condition, batch: Batch, *, seeds: Sequence[Seed], drops: bool
    ) -> Condition:
        """The condition with those that methods own. drops: whether some samples are told of none,
        as each condition's `dropout` says."""

        def present(own: FurtherCondition) -> Tensor:
            share = own.dropout if drops else 0.0
            kept = [uniform_of(seed_of(*seed, own.name)) >= share for seed in seeds]
            return torch.tensor(kept, device=batch.inputs[own.reads[0]].device)

        with self.backbone.computing():
            return told_further(self.backbone, condition, batch.inputs, present=present)

    def _to_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return to_x0(self.objective, output, x_t, t=t)


def seeds_of(batch: Batch, seed: int, purpose: Purpose) -> list[Seed]:
    """What the random numbers of each sample are made from; seed: of the run."""
    return [(seed, purpose, batch.step, position) for position in batch.positions]


def kept_captions(captions: Sequence[str], seeds: Sequence[Seed], dropout: float) -> list[str]:
    """The captions after dropout, empty where they are dropped."""
    return [
        "" if dropout and uniform_of(seed_of(*seed, "caption")) < dropout else caption
        for seed, caption in zip(seeds, captions, strict=True)
    ]


def mean_per_sample(error: Tensor, masks: Tensor | None, frames: int) -> Tensor:
    """Squared errors (b f, c, h, w) to their means over the latents that count and over the frames
    of a clip (b,)."""
    if masks is None:
        rows = error.mean(dim=(1, 2, 3))
    else:
        rows = (error * masks).sum(dim=(1, 2, 3)) / (masks.sum(dim=(1, 2, 3)) * error.shape[1])
    return rows.unflatten(0, (-1, frames)).mean(1) if frames > 1 else rows


def three_normals(seed: int, shape: Sequence[int]) -> Tensor:
    """Three standard normal tensors (3, *shape) from one seed: posterior, noise, offset. Made on
    the CPU, so that a run is the same on every device."""
    return torch.randn((3, *shape), generator=torch.Generator().manual_seed(seed))


def uniform_of(seed: int) -> float:
    """A number in [0, 1) from a seed of `seed_of`."""
    return seed / 2**63
