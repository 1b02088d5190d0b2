"""A whole run, top to bottom: recipe -> backbone -> data -> plan -> module -> trainer ->
adapter."""

from __future__ import annotations

import random
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import yaml
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from trainer.backbones.backbone import Backbone
from trainer.common.exit_codes import LeaveError
from trainer.config.header import file_of
from trainer.config.schema import Recipe
from trainer.data.loader import Planned, loader
from trainer.data.source import Dataset, shape_of_clips
from trainer.methods import apply
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_base, save_adapter, start_from
from trainer.runs.run_folder import (
    differing_keys,
    folder_for,
    is_finished,
    locked,
    note_event,
    recipe_header,
    write_text,
)
from trainer.training.build import checks, latents, looker, module_of, needs, step_plan
from trainer.training.callbacks.checkpoints import Checkpoints
from trainer.training.callbacks.ema import EMA
from trainer.training.callbacks.hang import HangGuard, vanish
from trainer.training.callbacks.preview import Preview
from trainer.training.callbacks.progress import Bar
from trainer.training.callbacks.ran import Ran
from trainer.training.callbacks.signals import Signals, keep_lightning_out
from trainer.training.callbacks.trackers import make_trackers
from trainer.training.callbacks.watch import Watch
from trainer.training.checkpoint import Checkpoint, newest_checkpoint
from trainer.training.console import console, first_rank, say
from trainer.training.plan_report import describe_plan, report_backends, save_plan, show_plan


def fit(recipe: Recipe, folder: Path | None = None) -> Path:
    """Trains what the recipe says and returns the run folder, with `adapter.safetensors` in it.

    folder: where, instead of `runs.folder_of`'s choice. A run that is there goes on from its last
    whole checkpoint; one that is finished is left as it is.

    Raises:
        LeaveError: it ended early, with what it has reached on disk; see `exits.py`.
        ValueError: what the user can correct, such as another program training in that folder, or a
            recipe with `continual.concepts`, which needs a run for each.
    """
    if recipe.continual.concepts:
        raise ValueError(
            f"{recipe.name} learns {len(recipe.continual.concepts)} concepts in a run each; train "
            "it with `python -m trainer fit`, or from Python with trainer.continual.run_continual"
        )
    folder = folder or folder_for(recipe)
    if is_finished(folder, recipe):
        say(f"{folder}: this run is finished; another run.id or run= starts a new one")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) if first_rank() else nullcontext():
        _fit(recipe, folder)
    return folder


def _fit(recipe: Recipe, folder: Path) -> None:
    """The run itself, from its last whole checkpoint on."""
    run, found = recipe.run, last_checkpoint(recipe, folder)
    random.seed(run.seed)
    np.random.seed(run.seed % 2**32)
    torch.manual_seed(run.seed)  # parts made from scratch, dropout of methods
    backbone = load_base(recipe.backbone, recipe.backbone_name)
    train, held_out = recipe.data.open(needs(recipe, backbone))
    plan = apply_methods(backbone, recipe.methods, run.seed, frozen=recipe.optim.frozen)
    if run.start_from is not None:
        start_from(file_of(run.start_from), backbone, plan)
    if run.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    if run.channels_last:
        backbone.denoiser.to(memory_format=torch.channels_last)
    if run.compile:
        backbone.compile_blocks()
    module = module_of(recipe, backbone, plan)
    ema = EMA(recipe.optim.ema) if recipe.optim.ema else None
    signals = Signals(first_rank())
    ran = Ran(partial(report_backends, plan, folder, console))
    own = callbacks(recipe, folder, ema, found, signals, train)
    trainer = make_trainer(recipe, folder, [ran, *own])
    if trainer.is_global_zero:
        announce(recipe, backbone, plan, train, folder)
    cached, order = latents(recipe, backbone, train), step_plan(recipe, train)
    look = looker(module, Planned(train, order, cached, 0, 1))
    if found is None:
        for edit in plan.edits.values():
            if edit.prepare is not None:
                edit.prepare(look)
    batches = loader(
        Planned(train, order, cached, trainer.global_rank, trainer.world_size),
        run.steps * run.accumulate,
        found.micro_step if found else 0,
        run.workers,
    )
    with signals:
        try:
            trainer.fit(module, batches, checks(recipe, backbone, held_out))
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
                    f"{str(error).strip()}; that is often want of memory: fewer run.workers need "
                    "less, run.workers=0 has none. The same command goes on from the last "
                    f"checkpoint in {folder}",
                ) from error
            raise
    if trainer.is_global_zero:
        path = folder / "adapter.safetensors"
        with ema.swapped(module) if ema else nullcontext():
            for edit in plan.edits.values():
                if edit.finish is not None:
                    edit.finish(look)
            save_adapter(path, module.stored(), recipe_header(recipe), backbone.identity())
        note_event(folder, "finished", step=run.steps)
        say(f"adapter: {path}")


def last_checkpoint(recipe: Recipe, folder: Path) -> Checkpoint | None:
    """Where a run goes on; damaged checkpoints and another recipe than it began with are told."""

    def passed_over(text: str) -> None:
        say(text, "bold red")
        if first_rank():
            note_event(folder, "fallback", reason=text)

    found = newest_checkpoint(folder / "checkpoints", passed_over, tidy=first_rank())
    if found is not None:
        say(f"{folder}: goes on after step {found.step}")
        for key in differing_keys(found.manifest["recipe"], recipe):
            say(f"{folder}: goes on with another {key} than it began with", "yellow")
    if first_rank():
        note_event(folder, "started", step=found.step if found else 0, steps=recipe.run.steps)
    return found


def callbacks(
    recipe: Recipe,
    folder: Path,
    ema: EMA | None,
    found: Checkpoint | None,
    signals: Signals,
    train: Dataset,
) -> list[lightning.Callback]:
    """In the order they act at the end of a step: what a checkpoint holds is done before it is
    saved, what only looks comes after."""
    run, preview = recipe.run, recipe.preview
    hang = HangGuard({str(key): limit for key, limit in run.timeouts.items()}, folder)
    saver = Checkpoints(
        folder, run.checkpoint_every, run.checkpoint_keep, found,
        {"recipe": recipe_header(recipe)}, run.on_disk_full, hang, ema, partial(say, style="red"),
    )  # fmt: skip
    watch = Watch(
        signals, saver, run.on_nonfinite, run.nonfinite_in_a_row, run.nonfinite_total,
        recipe.optim.clip, partial(say, style="yellow"),
    )  # fmt: skip
    saver.parts["watch"] = watch
    bar = Bar(run.batch_size * run.accumulate, max(1, run.steps // 20), console)
    chosen: list[lightning.Callback] = [*([ema] if ema else []), bar, saver, watch]
    if preview.prompts and preview.every:
        chosen.append(
            Preview(
                folder / "previews", preview.prompts, preview.every, preview.steps,
                preview.guidance, preview.seed,
                preview.negative, preview.maps, ema, hang, *shape_of_clips(train),
            )
        )  # fmt: skip
    return [*chosen, hang]


def make_trainer(
    recipe: Recipe, folder: Path, callbacks: list[lightning.Callback]
) -> lightning.Trainer:
    run = recipe.run
    # requeueing from Lightning's signal handler trains on and rewinds finished runs
    plugins: Any = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    trainer = lightning.Trainer(
        plugins=plugins,
        accelerator=run.accelerator,
        devices=run.devices,
        num_nodes=run.nodes,
        strategy="ddp" if run.devices * run.nodes > 1 else "auto",
        precision="bf16-mixed" if run.precision == "bf16" else "32-true",
        max_steps=run.steps,
        accumulate_grad_batches=run.accumulate,
        val_check_interval=run.validate_every * run.accumulate if run.validate_every else None,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=run.log_every,
        callbacks=callbacks,
        logger=make_trackers(recipe.tracker, folder, recipe.tree, partial(say, style="yellow")),
        use_distributed_sampler=False,
        enable_checkpointing=False,  # `Checkpoints` does that
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    keep_lightning_out(trainer)
    return trainer


def is_child(trainer: lightning.Trainer) -> bool:
    """Whether this rank was started by the first one."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and trainer.local_rank > 0


def announce(
    recipe: Recipe, backbone: Backbone, plan: apply.Plan, train: Dataset, folder: Path
) -> None:
    """Prints the plan and keeps it, with the resolved recipe, in the run folder."""
    facts = describe_plan(recipe, backbone, plan, None)
    show_plan(facts, recipe.methods, console)
    save_plan(facts, folder)
    text = yaml.safe_dump(
        {"recipe": recipe.name, **recipe.tree}, sort_keys=False, allow_unicode=True
    )
    write_text(folder / "recipe.yaml", text)
    for skipped in train.skipped:
        console.print(f"skipped {skipped}", style="yellow", highlight=False, markup=False)
