"""A whole run, top to bottom: recipe -> backbone -> data -> plan -> module -> trainer ->
adapter."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Sequence
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
from lightning.fabric.utilities.rank_zero import rank_zero_only
from PIL.Image import Image
from rich.console import Console
from torch.utils.data import DataLoader

from trainer import adapter, checkpoint, methods, report, runs
from trainer.backbones.base import Backbone
from trainer.callbacks.checkpoints import Checkpoints
from trainer.callbacks.ema import EMA
from trainer.callbacks.hang import HangGuard, vanish
from trainer.callbacks.preview import Preview
from trainer.callbacks.progress import Bar
from trainer.callbacks.ran import Ran
from trainer.callbacks.signals import Signals, keep_lightning_out
from trainer.callbacks.trackers import make_trackers
from trainer.callbacks.watch import Watch
from trainer.checkpoint import Checkpoint
from trainer.data import Dataset, Needs, cache, shape_of_clips
from trainer.data.buckets import Bucketed
from trainer.data.images import to_pil
from trainer.data.loader import Fixed, Planned, loader
from trainer.data.plan import Plan
from trainer.exits import LeaveError
from trainer.module import LEVELS, DiffusionModule
from trainer.objective import Objective
from trainer.optim import Optim
from trainer.resources import cache_folder
from trainer.sampler import evaluating, sample_many
from trainer.schema import Recipe

console = Console(stderr=True)
PREPARING = 16  # batches that a start which depends on the data may see


def fit(recipe: Recipe, folder: Path | None = None) -> Path:
    """Trains what the recipe says and returns the run folder, with `adapter.safetensors` in it.

    folder: where, instead of `runs.folder_of`'s choice. A run that is there goes on from its last
    whole checkpoint; one that is finished is left as it is.

    Raises:
        LeaveError: it ended early, with what it has reached on disk; see `exits.py`.
        ValueError: what the user can mend; another program training there, say.
    """
    if recipe.continual.concepts:
        from trainer import continual  # which calls this function for every concept

        return continual.run(recipe, folder)
    folder = folder or runs.folder_of(recipe)
    if runs.finished(folder, recipe):
        say(f"{folder}: this run is finished; another run.id or run= starts a new one")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with runs.held(folder) if first_rank() else nullcontext():
        _fit(recipe, folder)
    return folder


def _fit(recipe: Recipe, folder: Path) -> None:
    """The run itself, from its last whole checkpoint on."""
    run, found = recipe.run, last_checkpoint(recipe, folder)
    random.seed(run.seed)
    np.random.seed(run.seed % 2**32)
    torch.manual_seed(run.seed)  # parts made from scratch, dropout of methods
    backbone = adapter.base(recipe.backbone, recipe.backbone_name)
    train, held_out = recipe.data.open(needs(recipe, backbone))
    plan = methods.apply(backbone, recipe.methods, run.seed, held=recipe.optim.held)
    if run.start_from is not None:
        adapter.start(adapter.file_of(run.start_from), backbone, plan)
    if run.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    if run.channels_last:
        backbone.denoiser.to(memory_format=torch.channels_last)
    if run.compile:
        backbone.compile_blocks()
    module = module_of(recipe, backbone, plan)
    ema = EMA(recipe.optim.ema) if recipe.optim.ema else None
    signals = Signals(first_rank())
    ran = Ran(partial(report.ran, plan, folder, console))
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
            adapter.save(path, module.stored(), runs.header(recipe), backbone.identity())
        runs.note(folder, "finished", step=run.steps)
        say(f"adapter: {path}")


def last_checkpoint(recipe: Recipe, folder: Path) -> Checkpoint | None:
    """Where a run goes on; damaged checkpoints and another recipe than it began with are told."""

    def passed_over(text: str) -> None:
        say(text, "bold red")
        if first_rank():
            runs.note(folder, "fallback", reason=text)

    found = checkpoint.newest(folder / "checkpoints", passed_over, tidy=first_rank())
    if found is not None:
        say(f"{folder}: goes on after step {found.step}")
        for key in runs.differing(found.manifest["recipe"], recipe):
            say(f"{folder}: goes on with another {key} than it began with", "yellow")
    if first_rank():
        runs.note(folder, "started", step=found.step if found else 0, steps=recipe.run.steps)
    return found


def module_of(recipe: Recipe, backbone: Backbone, plan: methods.Plan) -> DiffusionModule:
    """What trains: the backbone as its methods have left it, the objective and the optimiser."""
    return DiffusionModule(
        backbone,
        objective(recipe, backbone),
        optim(recipe),
        plan.names,
        recipe.run.seed,
        recipe.objective.caption_dropout,
        [edit.loss for edit in plan.edits.values() if edit.loss is not None],
        plan.keeps,
        lrs(recipe, plan),
        [edit.schedule for edit in plan.edits.values() if edit.schedule is not None],
    )


def looker(module: DiffusionModule, batches: Planned) -> Callable[[], None]:
    """What methods that look at the data call: the first batches, all of every batch on every
    rank."""

    @torch.no_grad()
    def look() -> None:
        with evaluating(module):
            for step in range(PREPARING):
                module.sample_losses(batches[step], "prepare", 0.0)

    return look


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
        {"recipe": runs.header(recipe)}, run.on_disk_full, hang, ema, partial(say, style="red"),
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


def first_rank() -> bool:
    """Known from the environment, before there is a trainer."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def is_child(trainer: lightning.Trainer) -> bool:
    """Whether this rank was started by the first one."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and trainer.local_rank > 0


def say(text: str, style: str | None = None) -> None:
    """A line for the user, from the first rank."""
    if first_rank():
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def needs(recipe: Recipe, backbone: Backbone) -> Needs:
    """What the data may ask of the run; class images are painted with the recipe's preview
    sampler."""

    def paint(prompts: Sequence[str], seed: int, guidance: float | None) -> list[Image]:
        console.print(f"painting {len(prompts)} class images", highlight=False)
        seeds = [seed + i for i in range(len(prompts))]
        guidance = look.guidance if guidance is None else guidance
        size = None if recipe.run.resolution is None else (side, side)
        pictures = sample_many(backbone, prompts, seeds, 32, look.steps, guidance, size=size)
        return [to_pil(picture) for picture in pictures]

    def painter() -> str:
        return f"{backbone.fingerprint()}, {look.steps} steps, guidance {look.guidance}"

    look, side = recipe.preview, recipe.run.resolution or backbone.resolution
    return Needs(side, backbone.divisor, paint, cache_folder(), painter)


def step_plan(recipe: Recipe, data: Dataset) -> Plan:
    groups = tuple((group.start, group.stop) for group in data.groups)
    shares, weights, frames = tuple(data.shares), tuple(data.weights), tuple(data.frames)
    sizes = tuple(data.sizes) if isinstance(data, Bucketed) else ()
    return Plan(groups, shares, weights, recipe.run.batch_size, recipe.run.seed, frames, sizes)


def checks(recipe: Recipe, backbone: Backbone, held_out: Dataset | None) -> Any:
    """The batches of the validation loss, or None."""
    if held_out is None or not recipe.run.validate_every:
        return None
    fixed = Fixed(held_out, 16, LEVELS, latents(recipe, backbone, held_out))
    return DataLoader(fixed, batch_size=None)


def objective(recipe: Recipe, backbone: Backbone) -> Objective:
    """The recipe's objective on the backbone's path; target and path default to what it was trained
    with."""
    chosen = recipe.objective
    alphas = None if chosen.path == "flow" else backbone.alphas_cumprod
    if chosen.path == "vp" and alphas is None:
        raise ValueError(
            f"objective.path=vp: {backbone.name} was trained on the flow path and says nothing of "
            "another; leave objective.path out"
        )
    target = chosen.target or ("flow" if chosen.path == "flow" else backbone.target)
    return Objective(
        target, alphas, chosen.timesteps, chosen.logit_mean, chosen.logit_std, chosen.weighting,
        chosen.min_snr_gamma, chosen.offset_noise,
    )  # fmt: skip


def optim(recipe: Recipe) -> Optim:
    chosen, run = recipe.optim, recipe.run
    factor = run.batch_size * run.accumulate if chosen.scale_lr else 1
    return Optim(
        chosen.lr * factor,
        run.steps,
        chosen.betas,
        chosen.eps,
        chosen.weight_decay,
        chosen.warmup,
        chosen.schedule,
        chosen.final_lr,
        chosen.name,
        None if chosen.muon_lr is None else chosen.muon_lr * factor,
    )


def lrs(recipe: Recipe, plan: methods.Plan) -> dict[str, float]:
    """Parameters whose method has an lr of its own, by name."""
    factor = optim(recipe).lr / recipe.optim.lr  # what scale_lr makes of every lr
    return {
        name: lr * factor
        for method, lr in recipe.optim.lrs.items()
        for name in plan.edits[method].trains
    }


def latents(recipe: Recipe, backbone: Backbone, data: Dataset) -> np.ndarray | None:
    """Cached VAE posteriors where the images never change and the recipe wants them."""
    if not (recipe.run.cache_latents and data.fixed):
        return None
    side = recipe.run.resolution or backbone.resolution
    return cache.moments(
        data, backbone.moments, f"{backbone.vae_fingerprint()}-{side}", cache_folder()
    )


def announce(
    recipe: Recipe, backbone: Backbone, plan: methods.Plan, train: Dataset, folder: Path
) -> None:
    """Prints the plan and keeps it, with the resolved recipe, in the run folder."""
    facts = report.describe(recipe, backbone, plan, None)
    report.show(facts, recipe.methods, console)
    report.save(facts, folder)
    text = yaml.safe_dump(
        {"recipe": recipe.name, **recipe.tree}, sort_keys=False, allow_unicode=True
    )
    runs.write(folder / "recipe.yaml", text)
    for skipped in train.skipped:
        console.print(f"skipped {skipped}", style="yellow", highlight=False, markup=False)
