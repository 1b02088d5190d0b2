"""A whole run, top to bottom: recipe -> backbone -> data -> plan -> module -> trainer ->
adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from trainer.backbones.device import place
from trainer.backbones.resting import held_bytes, wake
from trainer.common.freed_memory import WORTH, return_freed_memory
from trainer.config.schema import Recipe
from trainer.data.loader import Planned, loader
from trainer.runs.adapter import load_base, save_adapter
from trainer.runs.run_folder import (
    folder_for,
    is_finished,
    locked,
    made,
    note_event,
    recipe_header,
)
from trainer.training.build import (
    adapt,
    checks,
    finish_methods,
    inputs_of,
    latent_store,
    latents,
    looker,
    module_of,
    needs,
    placement_of,
    prepare_methods,
    seed_everything,
    step_plan,
)
from trainer.training.callbacks.average import averaged
from trainer.training.caption_check import check_captions
from trainer.training.console import first_rank, say
from trainer.training.distributed import whole_tree
from trainer.training.launch import announce, ending, launch
from trainer.training.module import DiffusionModule
from trainer.training.resume import last_checkpoint, run_facts
from trainer.training.tasks.denoise import Denoise
from trainer.training.text_encodings import encode_all
from trainer.training.thread_count import settle_threads


def fit(recipe: Recipe, folder: Path | None = None) -> Path:
    """Trains what the recipe asks for and returns the run folder, with `adapter.safetensors` in it.

    folder: the run folder, `folder_for(recipe)` by default. A run that is there continues from
    its last complete checkpoint; one that is finished is left as it is.

    Raises:
        LeaveError: it ended early, with what it has reached on disk; see `exit_codes.py`.
        ValueError: a mistake that the user can fix, another program trains in that folder, or a
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
    made(folder)
    with locked(folder) if first_rank() else nullcontext():
        _fit(recipe, folder)
    return folder


def unneeded(module: DiffusionModule, items: Planned, steps: Sequence[int]) -> list[str]:
    """The parts of the backbone that these steps have no need of, since what they make is cached;
    prompts are encoded for that."""
    task, parts = module.task, [] if items.moments is None else ["vae"]
    assert isinstance(task, Denoise)
    if encode_all(task, items, steps, say=say):
        parts += module.backbone.text_encoders
    return parts


def _fit(recipe: Recipe, folder: Path) -> None:
    """The run itself, from its last complete checkpoint on."""
    found, run = last_checkpoint(recipe, folder), recipe.run
    manifest = found.manifest if found else {}
    settle_threads(ranks=run.devices, machines=run.nodes, manifest=manifest, say=say)
    seed_everything(run.seed)
    placement = placement_of(run)
    backbone = load_base(
        recipe.backbone, recipe.backbone_name, placement, hold=False, read_held=True
    )
    if backbone.device.type == "cpu" and held_bytes(backbone) > WORTH:
        return_freed_memory()
    train, held_out = recipe.data.open(needs(recipe, backbone))
    facts = run_facts(
        recipe, folder, found=found, backbone=backbone, train=train, held_out=held_out
    )
    plan = adapt(recipe, backbone, placement)
    for line in check_captions(recipe, lambda: backbone.prompts.reader, train):
        say(line)
    store = latent_store(recipe, backbone, train)
    module = module_of(recipe, backbone, plan, store=store)
    launched = launch(
        recipe, folder, found=found, plan=plan, train=train, backbone=backbone, facts=facts
    )
    rank, ranks = launched.trainer.global_rank, launched.trainer.world_size
    if launched.trainer.is_global_zero:
        announce(recipe, folder, backbone=backbone, plan=plan, train=train)
    cached, order = latents(recipe, backbone, train), step_plan(recipe, train)
    reads = inputs_of(backbone)
    look = looker(module, Planned(train, order, cached, rank=0, world_size=1, reads=reads))
    if found is None:
        prepare_methods(plan, look)
    items = Planned(
        train, order, cached, rank=rank, world_size=ranks, reads=reads, store=store
    )  # fmt: skip
    start, total = found.micro_step if found else 0, run.steps * run.accumulate
    module.resting = unneeded(module, items, range(start, total))
    batches = loader(items, total, start=start, workers=run.workers)
    with launched.signals, ending(launched.trainer, folder):
        held = checks(recipe, backbone, held_out, rank=rank, world_size=ranks)
        launched.trainer.fit(module, batches, held)
    path, first = folder / "adapter.safetensors", launched.trainer.is_global_zero
    if first and not run.shards:
        wake(backbone)
        place(backbone, placement, plan.stored)  # Lightning leaves it on the CPU
    with averaged(launched.average, module):
        if first and not run.shards:  # where a method has something to finish, nothing is sharded
            finish_methods(plan, look)
        tensors = whole_tree(module.stored(), keep=first)
        if first:
            save_adapter(path, tensors, recipe_header(recipe), identity=backbone.identity())
    if first:
        for preview in launched.previews:
            preview.files.name_adapter(path)
        note_event(folder, "finished", step=run.steps)
        launched.page.write()
        say(f"adapter: {path}")
