"""The one LightningModule: a backbone, an objective and an optimiser. It never learns which method
is in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from trainer.attention.context import StepContext, per_frame
from trainer.attention.rows import Rows
from trainer.backbones.backbone import Backbone
from trainer.common.seeds import seed_of
from trainer.data.loader import Batch
from trainer.data.plan import quantiles
from trainer.diffusion.guidance import COND
from trainer.diffusion.objective import Objective, add_noise, draw_timesteps, loss_weight, target_of
from trainer.diffusion.predict import predict_groups
from trainer.training.optim import Optim, make_optimizer

QUANTILES = quantiles(8)  # of the timesteps, where the validation loss is taken
Seed = tuple[int, str, int, int]


class DiffusionModule(lightning.LightningModule):
    """loss = mean over samples of weight * w(t) * |f(x_t, t, text) - target|^2 over the latents
    that count. A sample is an image or a clip, which has one text, timestep and seed.

    kept: frozen tensors stored beside the trained ones; lrs: parameters with an lr of their own.
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        optim: Optim,
        trained: Sequence[str],
        seed: int = 0,
        caption_dropout: float = 0.0,
        extra_losses: Sequence[Callable[[], Tensor]] = (),
        kept: Sequence[str] = (),
        lrs: Mapping[str, float] | None = None,
        schedules: Sequence[Callable[[float], None]] = (),
    ) -> None:
        super().__init__()
        self.backbone, self.objective, self.optim = backbone, objective, optim
        self.trained, self.kept = tuple(trained), tuple(kept)
        self.seed, self.caption_dropout = seed, caption_dropout
        self.extra_losses, self.lrs = tuple(extra_losses), dict(lrs or {})
        self.schedules = tuple(schedules)
        self.val_losses: dict[int, list[float]] = {}

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by the names adapters use."""
        return {name: self.backbone.get_parameter(name) for name in self.trained}

    def stored(self) -> dict[str, Tensor]:
        """What the base cannot give back: the trained parameters and what methods keep beside
        them."""
        return {name: self._tensor(name) for name in (*self.trained, *self.kept)}

    def _tensor(self, name: str) -> Tensor:
        """A parameter or a buffer; going there by name is many times faster than listing all."""
        module, _, own = name.rpartition(".")
        tensor: Tensor = getattr(self.backbone.get_submodule(module), own)
        return tensor

    def sample_losses(self, batch: Batch, purpose: str, dropout: float) -> tuple[Tensor, Tensor]:
        """Losses (b,) before the batch's own weights, and the timesteps (b,) they were taken at; a
        clip's is the mean over its frames."""
        frames = batch.frames
        seeds = [(self.seed, purpose, batch.step, place) for place in batch.places]
        moments = (
            batch.moments if batch.moments is not None else self.backbone.moments(_pixels(batch))
        )
        shape = (frames, moments.shape[1] // 2, *moments.shape[2:])
        draws = torch.stack([_draw(seed_of(*seed), shape) for seed in seeds], 1).to(moments)
        posterior, noise, offset = draws.flatten(1, 2)  # (b f) c h w
        x0 = self.backbone.latents(moments, posterior)
        noise = noise + self.objective.offset_noise * offset[..., :1, :1]
        each = self._timesteps(batch, seeds).to(moments.device)
        t = each.repeat_interleave(frames)
        captions = [
            "" if dropout and _uniform(seed_of(*seed, "caption")) < dropout else caption
            for seed, caption in zip(seeds, batch.captions, strict=True)
        ]
        x_t = add_noise(self.objective, x0, noise, t)
        condition = per_frame(self.backbone.encode_prompts(captions), frames)
        fps = None if batch.fps is None else torch.tensor(batch.fps, device=x0.device)
        training = self.backbone.denoiser.training
        rows = Rows.of((COND,), len(x_t))
        ctx = StepContext(0, 1, t, frames, rows, training=training, fps=fps, source=x0)
        output = predict_groups(self.backbone, {"target": x_t}, condition, ctx)[COND]
        error = (output.float() - target_of(self.objective, x0, noise, t).float()).square()
        per_sample = _per_sample(error, batch.masks, frames)
        return per_sample * loss_weight(self.objective, each), each

    def _timesteps(self, batch: Batch, seeds: Sequence[Seed]) -> Tensor:
        """Drawn as the objective says; a validation batch brings its own quantiles, taken as they
        are, so that losses compare between objectives."""
        if batch.u is not None:
            return draw_timesteps(
                replace(self.objective, timesteps="uniform"), torch.tensor(batch.u)
            )
        u = torch.tensor([_uniform(seed_of(*seed, "u")) for seed in seeds])
        return draw_timesteps(self.objective, u)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        # dropout inside the model draws from the global state: it is a function of the step, too
        torch.manual_seed(seed_of(self.seed, "dropout", batch.step, *batch.places[:1]))
        for schedule in self.schedules:
            schedule(self.global_step / self.optim.steps)
        losses, _ = self.sample_losses(batch, "train", self.caption_dropout)
        loss = (losses * batch.weights).mean()
        for extra in self.extra_losses:
            loss = loss + extra()
        self.log("train/loss", loss.detach(), batch_size=len(batch.places), sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        losses, _ = self.sample_losses(batch, "validate", 0.0)
        for level, loss in zip(batch.u or [], losses.tolist(), strict=True):
            self.val_losses.setdefault(round(level * 1000), []).append(loss)

    def on_validation_epoch_end(self) -> None:
        """The mean at each timestep quantile, and over all: the same noise every time, so curves
        can be compared."""
        for level, losses in sorted(self.val_losses.items()):
            self.log(f"val/loss_t{level:03d}", sum(losses) / len(losses), sync_dist=True)
        every = [loss for losses in self.val_losses.values() for loss in losses]
        if every:
            self.log("val/loss", sum(every) / len(every), prog_bar=True, sync_dist=True)
        self.val_losses.clear()

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        return batch.to(device)

    def _blocks(self) -> list[str]:
        """How the names begin of what lies in the blocks that hold attention."""
        part = self.backbone.denoiser_name
        found = {site.name.rpartition(".")[0] for site in self.backbone.sites}
        return [f"{part}.{block}." for block in sorted(found)]

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(
            self.optim, self.trainable(), self.lrs, self._blocks(), self.device.type
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.optim.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _per_sample(error: Tensor, masks: Tensor | None, frames: int) -> Tensor:
    """Squared errors (b f, c, h, w) to their means over the latents that count and over the frames
    of a clip (b,)."""
    if masks is None:
        rows = error.mean(dim=(1, 2, 3))
    else:
        rows = (error * masks).sum(dim=(1, 2, 3)) / (masks.sum(dim=(1, 2, 3)) * error.shape[1])
    return rows.unflatten(0, (-1, frames)).mean(1) if frames > 1 else rows


def _draw(seed: int, shape: Sequence[int]) -> Tensor:
    """Three standard normal tensors (3, *shape) from one seed: posterior, noise, offset. Made on
    the CPU, so that a run is the same on every device."""
    return torch.randn((3, *shape), generator=torch.Generator().manual_seed(seed))


def _uniform(seed: int) -> float:
    return seed / 2**63


def _pixels(batch: Batch) -> Tensor:
    assert batch.pixels is not None
    return batch.pixels
