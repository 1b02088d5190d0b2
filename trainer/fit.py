"""A whole run, top to bottom: recipe -> backbone -> data -> plan -> module -> trainer ->
adapter."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL.Image import Image
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from trainer import adapter, backbones, methods, report
from trainer.backbones.base import Backbone
from trainer.callbacks.ema import EMA
from trainer.callbacks.preview import Preview
from trainer.callbacks.progress import Bar
from trainer.callbacks.state import MicroStep, resume_point
from trainer.callbacks.trackers import make_trackers
from trainer.data import Dataset, Needs, cache
from trainer.data.images import to_pil
from trainer.data.loader import Fixed, Planned, loader
from trainer.data.plan import Plan
from trainer.module import LEVELS, DiffusionModule, Optim
from trainer.objective import Objective
from trainer.resources import cache_folder
from trainer.sampler import evaluating, sample_many
from trainer.schema import Recipe

console = Console(stderr=True)
PREPARING = 16  # batches that a start which depends on the data may see
WHERE = ("id", "out", "resume", "start_from")


def fit(recipe: Recipe, folder: Path | None = None) -> Path:
    """Trains what the recipe says and returns the run folder, with `adapter.safetensors` in it.

    folder: where, instead of `run_folder`'s choice; goes on from a checkpoint that is there.
    """
    if recipe.continual.concepts:
        from trainer import continual  # which calls this function for every concept

        return continual.run(recipe)
    run = recipe.run
    folder = folder or run_folder(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(run.seed)  # parts made from scratch, dropout of methods
    backbone = backbones.load(recipe.backbone, recipe.backbone_name)
    backbone.eval().requires_grad_(False)
    train, held_out = recipe.data.open(needs(recipe, backbone))
    plan = methods.apply(backbone, recipe.methods, run.seed)
    if run.start_from is not None:
        adapter.start(adapter.file_of(run.start_from), backbone)
    if run.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    if run.channels_last:
        backbone.denoiser.to(memory_format=torch.channels_last)
    if run.compile:
        backbone.compile_blocks()
    module = module_of(recipe, backbone, plan)
    ema = EMA(recipe.optim.ema) if recipe.optim.ema else None
    trainer = make_trainer(recipe, folder, ema)
    if trainer.is_global_zero:
        announce(recipe, backbone, plan, train, folder)
    checkpoint, start = resume_point(folder)
    cached, order = latents(recipe, backbone, train), step_plan(recipe, train)
    look = looker(module, Planned(train, order, cached, 0, 1))
    if checkpoint is None:
        for edit in plan.edits.values():
            if edit.prepare is not None:
                edit.prepare(look)
    batches = loader(
        Planned(train, order, cached, trainer.global_rank, trainer.world_size),
        run.steps * run.accumulate,
        start,
        run.workers,
    )
    with sdpa_kernel(SDPBackend.MATH) if run.sdpa == "math" else nullcontext():
        trainer.fit(
            module,
            batches,
            checks(recipe, backbone, held_out),
            ckpt_path=checkpoint,
            weights_only=True,
        )
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        path = folder / "adapter.safetensors"
        with ema.swapped(module) if ema else nullcontext():
            for edit in plan.edits.values():
                if edit.finish is not None:
                    edit.finish(look)
            adapter.save(path, module.stored(), header(recipe), backbone.identity())
        console.print(f"adapter: {path}", highlight=False)
    return folder


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


def make_trainer(recipe: Recipe, folder: Path, ema: EMA | None) -> lightning.Trainer:
    run, preview = recipe.run, recipe.preview
    callbacks: list[lightning.Callback] = [ema] if ema else []
    if preview.prompts and preview.every:
        callbacks.append(
            Preview(
                folder / "previews", preview.prompts, preview.every, preview.steps,
                preview.guidance, preview.seed,
                preview.negative, preview.maps, ema,
            )
        )  # fmt: skip
    callbacks += [
        Bar(run.batch_size * run.accumulate, max(1, run.steps // 20), console),
        MicroStep(),
    ]
    if run.checkpoint_every:
        last = ModelCheckpoint(
            folder / "checkpoints",
            save_last=True,
            save_top_k=0,
            every_n_train_steps=run.checkpoint_every,
        )
        callbacks.append(last)
    # requeueing from Lightning's signal handler trains on and rewinds finished runs
    plugins: Any = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    return lightning.Trainer(
        plugins=plugins,
        accelerator=run.accelerator,
        devices=run.devices,
        num_nodes=run.nodes,
        strategy="ddp" if run.devices * run.nodes > 1 else "auto",
        precision="bf16-mixed" if run.precision == "bf16" else "32-true",
        max_steps=run.steps,
        accumulate_grad_batches=run.accumulate,
        gradient_clip_val=recipe.optim.clip,
        val_check_interval=run.validate_every * run.accumulate if run.validate_every else None,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=run.log_every,
        callbacks=callbacks,
        logger=make_trackers(recipe.tracker, folder, recipe.tree),
        use_distributed_sampler=False,
        enable_checkpointing=bool(run.checkpoint_every),
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )


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
    return Plan(
        groups, tuple(data.shares), tuple(data.weights), recipe.run.batch_size, recipe.run.seed
    )


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
    lr = chosen.lr * (run.batch_size * run.accumulate if chosen.scale_lr else 1)
    return Optim(
        lr,
        run.steps,
        chosen.betas,
        chosen.eps,
        chosen.weight_decay,
        chosen.warmup,
        chosen.schedule,
        chosen.final_lr,
        chosen.name,
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
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    for skipped in train.skipped:
        console.print(f"skipped {skipped}", style="yellow", highlight=False)


def header(recipe: Recipe) -> dict[str, Any]:
    """The recipe an adapter carries: what was trained, not where it was written."""
    run = {k: v for k, v in (recipe.tree.get("run") or {}).items() if k not in WHERE}
    return {"recipe": recipe.name, **recipe.tree, "run": run}


def run_folder(recipe: Recipe) -> Path:
    """`runs/<recipe>/<id>`; every rank of a run finds the same one."""
    if recipe.run.resume is not None:
        if resume_point(recipe.run.resume)[0] is None:
            raise ValueError(
                f"run.resume={recipe.run.resume}: no checkpoint there; a run keeps them with "
                "run.checkpoint_every=<steps>"
            )
        return recipe.run.resume
    name = recipe.run.id or os.environ.setdefault("TRAINER_RUN_ID", time.strftime("%Y%m%d-%H%M%S"))
    folder = recipe.run.out / Path(recipe.name).stem / name
    if (folder / "adapter.safetensors").exists():
        raise ValueError(f"run.id={name}: {folder} holds a finished run; choose another id")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
