"""Lightning's trainer with the callbacks of a run, and what surrounds its loop: what is announced
at its start, how it ends early."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.plugins.precision.amp import MixedPrecision

from trainer.backbones.backbone import Backbone
from trainer.backbones.device import slow_precision
from trainer.backbones.part_digests import part_digests
from trainer.common.exit_codes import LeaveError
from trainer.config.flat_settings import flat_settings
from trainer.config.optimisers import SCHEDULE_FREE
from trainer.config.schema import Recipe
from trainer.config.sections import OptimSpec
from trainer.data.extra_inputs import extra_inputs
from trainer.data.found import found_when_opened
from trainer.data.source import Dataset, shape_of_clips
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import Plan
from trainer.runs.run_folder import recipe_header, write_text
from trainer.training.callbacks.average import Average
from trainer.training.callbacks.backend_report import BackendReport
from trainer.training.callbacks.ema import EMA
from trainer.training.callbacks.hang import HangGuard, vanish
from trainer.training.callbacks.kept_adapters import KeptAdapters
from trainer.training.callbacks.metrics import Measured, Metrics
from trainer.training.callbacks.nonfinite_and_signals import StepChecks
from trainer.training.callbacks.preview import Preview
from trainer.training.callbacks.progress import Bar
from trainer.training.callbacks.run_page import RunPage
from trainer.training.callbacks.save_and_restore import Checkpoints
from trainer.training.callbacks.schedule_free import ScheduleFree
from trainer.training.callbacks.side_work import SideWork
from trainer.training.callbacks.signal_recorder import Signals, keep_lightning_out
from trainer.training.checkpoint_files import Checkpoint
from trainer.training.console import console, first_rank, say
from trainer.training.device_defaults import auto_lines
from trainer.training.plan_report import describe_plan, report_backends, save_plan, show_plan
from trainer.training.preview_prompts import captions_of_clips, preview_prompts, shown_samples
from trainer.training.strategy import mixed_precision, strategy_of
from trainer.training.trackers.make_trackers import make_trackers


@dataclass(frozen=True)
class Launch:
    """A trainer that is ready to fit, with those of its parts that act before and after it too."""

    trainer: lightning.Trainer
    signals: Signals
    average: Average | None
    page: RunPage
    previews: tuple[Preview, ...] = ()


def launch(
    recipe: Recipe,
    folder: Path,
    *,
    found: Checkpoint | None,
    plan: Plan,
    train: Dataset,
    backbone: Backbone,
    facts: Mapping[str, Any],
) -> Launch:
    """The trainer of a run in `folder`. found: the checkpoint it resumes from; backbone: as placed,
    it decides device and precision; facts: of `run_facts`, for every manifest."""
    signals, mixed = Signals(first_rank()), mixed_precision(backbone.computes_in, backbone.device)
    average = average_of(recipe.optim)
    ran = BackendReport(partial(report_backends, plan, folder, console=console))
    scaler = None if mixed is None else mixed.scaler
    own = callbacks(
        recipe,
        folder,
        average=average,
        found=found,
        signals=signals,
        scaler=scaler,
        train=train,
        facts=facts,
        plan=plan,
    )
    trainer = make_trainer(recipe, folder, backbone.device, mixed=mixed, callbacks=[ran, *own])
    shown = tuple(each for each in own if isinstance(each, Preview))
    (page,) = [each for each in own if isinstance(each, RunPage)]
    return Launch(trainer, signals, average, page=page, previews=shown)


def average_of(optim: OptimSpec) -> EMA | ScheduleFree | None:
    """What has averaged weights for validation, previews and the adapter; None for the weights
    themselves."""
    if optim.name == SCHEDULE_FREE:
        return ScheduleFree()
    return EMA(optim.ema) if optim.ema else None


def callbacks(
    recipe: Recipe,
    folder: Path,
    *,
    average: EMA | ScheduleFree | None,
    found: Checkpoint | None,
    signals: Signals,
    scaler: torch.amp.GradScaler | None,
    train: Dataset,
    facts: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
) -> list[lightning.Callback]:
    """In the order they act at the end of a step: what a checkpoint holds is done before it is
    saved, what only looks comes after."""
    run = recipe.run
    hang = HangGuard({str(key): limit for key, limit in run.timeouts.items()}, folder)
    saver = Checkpoints(
        folder,
        every=run.checkpoint_every,
        keep=run.checkpoint_keep,
        found=found,
        facts={"recipe": recipe_header(recipe), **(facts or {})},
        on_full=run.on_disk_full,
        hang=hang,
        average=average,
        say=partial(say, style="red"),
    )
    watch = StepChecks(
        signals,
        saver,
        policy=run.on_nonfinite,
        in_a_row=run.nonfinite_in_a_row,
        total=run.nonfinite_total,
        clip=recipe.optim.clip,
        say=partial(say, style="yellow"),
        scaler=scaler,
    )
    saver.parts |= {"watch": watch} | ({"scaler": scaler} if scaler is not None else {})
    measured = measured_of(recipe, train, plan)
    bar = Bar(measured.samples, max(1, run.steps // 20), console, what=measured.what)
    metrics = Metrics(run.log_every, measured, hang=hang, watch=watch)
    first: list[lightning.Callback] = [average] if average else []
    kept = keeper(recipe, folder, average=average, hang=hang)
    side = SideWork(saver, partial(say, style="red"))
    given = any(edit.given for edit in plan.edits.values()) if plan else False
    shown = previews(recipe, folder, average, hang=hang, train=train, side=side, completes=given)
    page = RunPage(folder, partial(say, style="yellow"))
    return [*first, bar, metrics, saver, watch, *kept, side, *shown, page, hang]


def measured_of(recipe: Recipe, train: Dataset, plan: Plan | None) -> Measured:
    """What the trackers of a run are told of it. plan: names the methods that train parameters."""
    run, clips = recipe.run, [frames > 1 for frames in train.frames]
    edits = plan.edits if plan else {}
    mixed = "samples" if any(clips) else "images"
    return Measured(
        run.batch_size * run.accumulate,
        "clips" if all(clips) else mixed,
        owners={method: edit.trains for method, edit in edits.items() if edit.trains},
        settings=flat_settings(recipe),
        count=len(train),
    )


def keeper(
    recipe: Recipe, folder: Path, *, average: Average | None, hang: HangGuard
) -> list[lightning.Callback]:
    """What writes the adapters along the way, if the recipe asks for some."""
    run = recipe.run
    if not run.kept_steps:
        return []
    return [
        KeptAdapters(
            folder,
            run.kept_steps,
            tree=recipe_header(recipe),
            on_full=run.on_disk_full,
            average=average,
            hang=hang,
            say=partial(say, style="red"),
        )
    ]


def previews(
    recipe: Recipe,
    folder: Path,
    average: Average | None,
    *,
    hang: HangGuard,
    train: Dataset,
    side: SideWork,
    completes: bool = False,
) -> list[lightning.Callback]:
    """The previews, if the recipe asks for some, or trains on clips. completes: whether the model
    completes clips that are given: then clips of the data, by their captions."""
    preview, prompts = recipe.preview, preview_prompts(recipe, train, say)
    if not prompts:
        return []
    if completes:
        prompts = captions_of_clips(train) or prompts
    shown = shown_samples(train, prompts)
    return [
        Preview(
            folder / "previews",
            prompts,
            every=preview.every,
            seed=preview.seed,
            settings=preview_settings(recipe, train),
            maps=preview.maps,
            clips=[train.image(number) for number in shown] if completes else (),
            average=average,
            hang=hang,
            side=side,
            parts=partial(part_digests, recipe.backbone),
            inputs=partial(extra_inputs, train, shown),
        )
    ]


def preview_settings(recipe: Recipe, train: Dataset) -> Sampling:
    """How the previews of a run are sampled."""
    preview, (frames, fps) = recipe.preview, shape_of_clips(train)
    return Sampling(
        preview.steps,
        preview.guidance,
        preview.negative,
        size=recipe.run.size,
        frames=frames,
        fps=fps,
        sampler=preview.scheduler,
        true_guidance=preview.true_guidance,
        temporal_guidance=preview.temporal_guidance,
    )


def make_trainer(
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    *,
    mixed: MixedPrecision | None,
    callbacks: list[lightning.Callback],
) -> lightning.Trainer:
    """Lightning's trainer on a device. mixed: of `mixed_precision`."""
    run = recipe.run
    # requeueing from Lightning's signal handler trains on and rewinds finished runs
    plugins: list[Any] = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    trainer = lightning.Trainer(
        plugins=plugins if mixed is None else [*plugins, mixed],
        accelerator=device.type,
        devices=[device.index] if device.index is not None and run.devices == 1 else run.devices,
        num_nodes=run.nodes,
        strategy=strategy_of(run, device),
        max_steps=run.steps,
        accumulate_grad_batches=run.accumulate,
        val_check_interval=run.validate_every * run.accumulate if run.validate_every else None,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=0,  # `Metrics` logs
        callbacks=callbacks,
        logger=make_trackers(
            recipe.tracker, folder, flat_settings(recipe), say=partial(say, style="yellow")
        ),
        use_distributed_sampler=False,
        enable_checkpointing=False,  # `Checkpoints` does that
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    keep_lightning_out(trainer)
    return trainer


@contextmanager
def ending(trainer: lightning.Trainer, folder: Path) -> Iterator[None]:
    """How a loop that is left early ends on each rank.

    Raises:
        LeaveError: also for a data worker that died.
    """
    try:
        yield
    except LeaveError as leaving:
        if is_child(trainer):  # whose code would have Lightning kill the first rank
            leaving.code = 0
        raise
    except Exception as error:
        if trainer.global_rank:  # the others wait for it until it is gone
            traceback.print_exc()
            vanish(1)
        # it is gone; one that raised something is named otherwise
        if "DataLoader worker (pid" in str(error):
            raise LeaveError(
                1,
                f"{str(error).strip()}; often the memory is full: fewer run.workers need "
                "less, run.workers=0 has none. The same command resumes from the last "
                f"checkpoint in {folder}",
            ) from error
        raise


def is_child(trainer: lightning.Trainer) -> bool:
    """Whether this rank was started by the first one."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and trainer.local_rank > 0


def announce(
    recipe: Recipe, folder: Path, *, backbone: Backbone, plan: Plan, train: Dataset
) -> None:
    """Prints the plan and keeps it, with the resolved recipe, in the run folder."""
    facts = describe_plan(recipe, backbone, plan, memory=None)
    show_plan(facts, recipe.methods, console)
    save_plan(facts, folder)
    text = yaml.safe_dump(
        {"recipe": recipe.name, **recipe.tree}, sort_keys=False, allow_unicode=True
    )
    write_text(folder / "recipe.yaml", text)
    found = found_when_opened(recipe.data, train)
    for line in (*found, *auto_lines(recipe, backbone, backbone.device)):
        say(line)
    slow = slow_precision(backbone)
    for line in [*([slow] if slow else []), *(f"skipped {each}" for each in train.skipped)]:
        console.print(line, style="yellow", highlight=False, markup=False)
