"""Ranks on one machine, for `scale.py`: the losses of 1, 2 and 4 of them, and what each holds."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _common import Bars

from trainer.config.load import load_recipe
from trainer.runs.adapter import load_base
from trainer.training.adapt_backbone import adapt
from trainer.training.build import placement_of
from trainer.training.sharding import resident_bytes, shard

WORDS = (
    "recipe=lora", "run.device=cpu", "run.batch_size=4", "data.prior_weight=0", "tracker=none",
    "preview.every=0", "run.validate_every=0", "run.checkpoint_every=0", "run.log_every=1",
)  # fmt: skip
RANKS = {"ddp": (1, 2, 4), "fsdp": (2, 4)}
SHARDED = 2  # ranks


def words_with(*own: str) -> list[str]:
    """The words of a run; given ones replace those of the same key."""
    return list({word.partition("=")[0]: word for word in (*WORDS, *own)}.values())


def trained(folder: Path, *words: str) -> list[float]:
    """The losses of a run in a folder, one for each step."""
    command = [sys.executable, "-m", "trainer", "fit", *words_with(*words), f"run={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


def losses(bars: Bars) -> None:
    """The largest difference of a loss from that of one rank, at the same global batch."""
    with tempfile.TemporaryDirectory() as scratch:
        _losses(bars, Path(scratch))


def _losses(bars: Bars, folder: Path) -> None:
    steps = 3 if bars.quick else 50
    found = {
        f"{strategy}_{ranks}": trained(
            folder / f"{strategy}_{ranks}",
            *(f"run.steps={steps}", f"run.devices={ranks}", f"run.strategy={strategy}"),
        )
        for strategy, numbers in RANKS.items()
        for ranks in numbers
    }
    one = found.pop("ddp_1")
    assert all(len(own) == steps for own in (one, *found.values()))
    for name, own in found.items():
        apart = max(abs(a - b) for a, b in zip(one, own, strict=True))
        bars.at_most(f"loss_apart_{name}", apart, 1e-5)


def sharded_bytes(bars: Bars) -> None:
    """Frozen bytes of the denoiser that a rank of two holds between steps, as a share of those that
    it holds under DDP, which are all."""
    with tempfile.TemporaryDirectory() as scratch:
        _sharded_bytes(bars, Path(scratch))


def _sharded_bytes(bars: Bars, folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_hold, args=(rank, folder)) for rank in range(SHARDED)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    held = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SHARDED)]
    bars.note("frozen_bytes", {"ddp": held[0]["all"], "fsdp": [own["own"] for own in held]})
    bars.at_most("frozen_bytes_share", max(own["own"] / own["all"] for own in held), 0.55)


def _hold(rank: int, folder: Path) -> None:
    """Shards the model of the recipe as a rank of a run does, and writes down what it holds."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=SHARDED
    )
    recipe = load_recipe([*WORDS, "run.strategy=fsdp", f"run.devices={SHARDED}"])
    placement = placement_of(recipe.run)
    backbone = load_base(recipe.backbone, recipe.backbone_name, placement, hold=False)
    plan = adapt(recipe, backbone, placement)

    def frozen() -> dict[str, torch.Tensor]:
        named = backbone.denoiser.named_parameters()
        return {name: value for name, value in named if not value.requires_grad}

    before = resident_bytes(frozen())
    shard(backbone, recipe.run, trained={n: backbone.get_parameter(n) for n in plan.names})
    facts = {"all": before, "own": resident_bytes(frozen())}
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()
