"""The one LightningModule: a backbone, a task and an optimiser. It never learns which method is in
use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from trainer.attention.step_result import StepResult
from trainer.backbones.backbone import Backbone
from trainer.backbones.held_layers import FP8
from trainer.backbones.resting import rest
from trainer.common.seeds import seed_of
from trainer.data.loader import Batch, Unread
from trainer.data.plan import quantiles
from trainer.training.console import problem_of
from trainer.training.distributed import gather_values, reshard
from trainer.training.optim import Optim, make_optimizer
from trainer.training.tasks.task import Task

QUANTILES = quantiles(8)  # of the timesteps, where the validation loss of each sample is taken


class DiffusionModule(lightning.LightningModule):
    """loss = mean over samples of weight * the task's loss, plus the extra losses of methods.

    trained: names of the parameters that train; kept: frozen tensors stored beside them; lrs:
    parameters with an lr of their own; schedules: called before every step with the share of the
    run's steps that is done; at_steps: likewise with the step's number; seed: of dropout inside the
    model.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        optim: Optim,
        *,
        trained: Sequence[str],
        kept: Sequence[str] = (),
        lrs: Mapping[str, float] | None = None,
        extra_losses: Sequence[Callable[[StepResult], Tensor]] = (),
        schedules: Sequence[Callable[[float], None]] = (),
        at_steps: Sequence[Callable[[int], None]] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone, self.task, self.optim = backbone, task, optim
        self.trained, self.kept, self.lrs = tuple(trained), tuple(kept), dict(lrs or {})
        self.extra_losses, self.schedules = tuple(extra_losses), tuple(schedules)
        self.at_steps, self.seed = tuple(at_steps), seed
        self.val_losses: dict[int, list[float]] = {}
        # of the last batch, of each sample, with the levels of `StepResult`
        self.losses: tuple[Tensor, Tensor | None] | None = None
        self.resting: Sequence[str] = ()  # parts of the backbone that training has no need of
        # parameters that DDP does not send from the first rank: every rank has read the same ones,
        # and gloo cannot send floats of 8 bits
        self._ddp_params_and_buffers_to_ignore = [
            name for name, value in self.named_parameters() if value.dtype == FP8
        ]
        self.shard: Callable[[], None] | None = None  # what shards the model over the ranks
        self.val_problem: str | None = None  # why the present validation has failed

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by the names adapters use."""
        self._settle()
        return {name: self.backbone.get_parameter(name) for name in self.trained}

    def stored(self) -> dict[str, Tensor]:
        """What the base cannot give back: the trained parameters and what methods keep beside
        them."""
        self._settle()
        return {name: self._tensor(name) for name in (*self.trained, *self.kept)}

    def _settle(self) -> None:
        """After a forward without a backward some of a sharded model is whole still."""
        if self.shard is not None:
            reshard(self.backbone.denoiser)

    def _tensor(self, name: str) -> Tensor:
        """A parameter or a buffer; going there by name is many times faster than listing all."""
        module, _, own = name.rpartition(".")
        tensor: Tensor = getattr(self.backbone.get_submodule(module), own)
        return tensor

    def configure_model(self) -> None:
        """Lightning asks this once, on every rank, before there is an optimiser."""
        if self.shard is not None:
            self.shard()

    def on_train_start(self) -> None:
        rest(self.backbone, self.resting)  # Lightning has moved all of it to the device

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        # dropout inside the model draws from the global state: it is a function of the step, too
        torch.manual_seed(seed_of(self.seed, "dropout", batch.step, *batch.positions[:1]))
        for schedule in self.schedules:
            schedule(self.global_step / self.optim.steps)
        for at_step in self.at_steps:
            at_step(self.global_step)
        result = self.task.loss(self.task.encode(batch))
        self.losses = (result.losses.detach(), result.levels)
        loss = (result.losses * batch.weights).mean()
        for extra in self.extra_losses:
            loss = loss + extra(result)
        self._note("train/loss", loss.detach(), batch_size=len(batch.positions))
        return loss

    def validation_step(self, batch: Batch | Unread, batch_index: int) -> None:
        """What fails here is noted, and what is left of the validation is passed over: the ranks
        stay in step, and training goes on; see `callbacks/side_work.py`."""
        if self.val_problem is not None:
            return
        try:
            if isinstance(batch, Unread):
                raise batch.error
            losses = self.task.score(batch, QUANTILES).tolist()
        except Exception as error:
            self.val_problem = problem_of(error)
            return
        if not batch.counts:
            return
        for level, own in zip(QUANTILES, losses, strict=True):
            self.val_losses.setdefault(round(level * 1000), []).extend(own)

    def on_validation_epoch_end(self) -> None:
        """The mean over the samples at each timestep quantile, and over all: the same noise and
        levels every time and in every run, so curves can be compared. Nothing is logged where the
        validation of one rank has failed."""
        failed = [problem for problem in gather_values(self.val_problem) if problem is not None]
        if failed:
            self.val_problem = failed[0]
            self.val_losses.clear()
            return
        parts = gather_values(self.val_losses)
        found = {
            level: [loss for part in parts for loss in part.get(level, ())] for level in parts[0]
        }
        for level, losses in sorted(found.items()):
            self._note(f"val/loss_t{level:03d}", sum(losses) / len(losses))
        every = [loss for losses in found.values() for loss in losses]
        if every:
            self._note("val/loss", sum(every) / len(every))
        self.val_losses.clear()

    def _note(self, name: str, value: Any, **options: Any) -> None:
        """Keeps the mean over all ranks for the callbacks; `callbacks/metrics.py` logs it, since
        Lightning counts the steps of trackers otherwise."""
        self.log(name, value, sync_dist=True, logger=False, **options)

    def transfer_batch_to_device(
        self, batch: Batch | Unread, device: torch.device, dataloader_idx: int
    ) -> Batch | Unread:
        return batch if isinstance(batch, Unread) else batch.to(device)

    def _blocks(self) -> list[str]:
        """How the names begin of what lies in the blocks that hold attention."""
        part = self.backbone.denoiser_name
        found = {site.name.rpartition(".")[0] for site in self.backbone.sites}
        return [f"{part}.{block}." for block in sorted(found)]

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(
            self.optim,
            self.trainable(),
            lrs=self.lrs,
            blocks=self._blocks(),
            device=self.device.type,
            scaled=self.backbone.computes_in == torch.float16,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.optim.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
