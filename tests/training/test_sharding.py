"""A denoiser that is sharded over two ranks trains what one that is whole trains, and what comes of
it is whole; what cannot be sharded is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import RANKS, on_two_ranks
from safetensors.torch import load_file

from trainer.config.load import load_recipe, methods_of
from trainer.config.run_section import RunSpec
from trainer.config.schema import RecipeError
from trainer.methods.apply import Plan, apply_methods
from trainer.runs.run_folder import kept_adapters
from trainer.training.checkpoint_files import every_checkpoint, read_checkpoint, verified
from trainer.training.fit import fit
from trainer.training.sharding import check_sharded, shard
from trainer.training.without_weights import refuse_unfit

Run = Callable[..., Path]
WITHIN = 1e-5
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"sites": "self | cross", "rank": 3}},
    # which trains rows of the text encoder too, whole on every rank
    "text": {"lora": {"sites": "cross", "rank": 2}, "word_embedding": {"tokens": ["fox", "left"]}},
    "dora": {"dora": {"sites": "cross", "rank": 2}, "selective": {"sites": "self"}},
    "full": {"full": {}},
    "temporal": {"animatediff": {}},  # on clips
}
# what is tried beside a method, and how near the losses are then
BESIDE: dict[str, tuple[tuple[str, ...], float]] = {
    "lora": (("preview.every=2", "preview.steps=1", "preview.prompts=[a fox]"), WITHIN),
    "dora": (("run.precision=bf16",), 2e-3),
    "full": (("run.gradient_checkpointing=true",), WITHIN),
}
SHARDED = ("run.strategy=fsdp", f"run.devices={RANKS}")


@pytest.fixture(scope="module")
def recipe_of(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A recipe with some methods on scenes of the embedded world."""
    folder = tmp_path_factory.mktemp("recipes")

    def made(name: str) -> str:
        source = {"source": "world_clips", "frames": 2} if name == "temporal" else {}
        tree = {
            "backbone": str(tiny_folder),
            "data": {"source": "world", "count": 8, "validation": 5, **source},
            "methods": METHODS[name],
            "optim": {"lr": 1e-3, "clip": 0.05},
            "run": {
                "device": "cpu", "steps": 3, "batch_size": 4, "log_every": 1, "validate_every": 0,
                "checkpoint_every": 0,
            },
            "preview": {"every": 0},
            "tracker": "none",
        }  # fmt: skip
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return f"recipe={path}"

    return made


def on_ranks(folder: Path, *words: str, nodes: int = 1) -> Path:
    printed = folder.with_suffix(".printed")
    own = ("fit", *words, f"run={folder}")
    ended = on_two_ranks(*own, printed=printed, cwd=folder.parent, nodes=nodes)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


def logged(folder: Path, name: str) -> torch.Tensor:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([line[name] for line in lines if name in line], dtype=torch.float64)


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether they are equal, but for the order of sums, over which AdamW's first steps divide."""
    assert one.keys() == other.keys()
    return all(one[k].shape == other[k].shape and one[k].allclose(other[k], atol=5e-5) for k in one)


@pytest.mark.ddp
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_with_parts_train_what_one_trains(
    name: str, recipe_of: Callable[..., str], tmp_path: Path
) -> None:
    beside, within = BESIDE.get(name, ((), WITHIN))
    words = (recipe_of(name), *beside)
    whole = fit(load_recipe(words), tmp_path / "whole")
    parts = on_ranks(tmp_path / "parts", *words, *SHARDED)
    assert "_failed" not in (parts / "events.jsonl").read_text()
    for kind in ("train/loss", "train/grad_norm"):
        one, two = logged(whole, kind), logged(parts, kind)
        assert len(one) == 3 and (one - two).abs().max() < within * max(1, float(one.max())), kind
    if within == WITHIN:
        assert close(*(load_file(run / "adapter.safetensors") for run in (whole, parts)))


@pytest.mark.ddp
def test_two_nodes_with_a_copy_each_train_what_one_device_trains(
    recipe_of: Callable[..., str], tmp_path: Path
) -> None:
    whole = fit(load_recipe([recipe_of("lora")]), tmp_path / "whole")
    hybrid = ("run.strategy=hsdp", "run.nodes=2", f"run.devices={RANKS}")
    parts = on_ranks(tmp_path / "parts", recipe_of("lora"), *hybrid, nodes=2)
    assert (logged(whole, "train/loss") - logged(parts, "train/loss")).abs().max() < WITHIN
    assert close(*(load_file(run / "adapter.safetensors") for run in (whole, parts)))


@pytest.mark.ddp
def test_all_that_surrounds_training_goes_with_parts(
    recipe_of: Callable[..., str], tmp_path: Path
) -> None:
    """Accumulation, moving average, validation, previews, checkpoints, adapters along the way; and
    one device goes on from what two have saved, and they from what it has."""
    words = (
        recipe_of("full"), "run.accumulate=2", "optim.ema=0.5", "run.validate_every=2",
        "run.checkpoint_every=2", "run.keep_adapters=6", "preview.every=2", "preview.steps=1",
        "preview.prompts=[a fox]",
    )  # fmt: skip
    whole = fit(load_recipe([*words, "run.steps=6"]), tmp_path / "whole")
    parts = on_ranks(tmp_path / "parts", *words, *SHARDED, "run.steps=2")
    fit(load_recipe([*words, "run.steps=4"]), parts)
    shutil.rmtree(parts.with_suffix(".printed"))
    on_ranks(parts, *words, *SHARDED, "run.steps=6")
    assert "_failed" not in (parts / "events.jsonl").read_text()
    for kind in ("train/loss", "val/loss"):
        assert (logged(whole, kind) - logged(parts, kind)).abs().max() < WITHIN, kind
    assert close(*(load_file(run / "adapter.safetensors") for run in (whole, parts)))
    assert close(*(load_file(kept_adapters(run)[1]) for run in (whole, parts)))
    saved = [verified(every_checkpoint(run / "checkpoints")[0]) for run in (whole, parts)]
    assert [each.manifest["world_size"] for each in saved] == [1, RANKS]
    (weights, state), (own_weights, own_state) = map(read_checkpoint, saved)
    assert close(weights, own_weights)
    assert close(state["parts"]["ema"]["averaged"], own_state["parts"]["ema"]["averaged"])
    for number, moments in state["optimizer"]["state"].items():
        assert close(moments, own_state["optimizer"]["state"][number])
    shown = [sorted(p.name for p in (run / "previews").iterdir()) for run in (whole, parts)]
    assert shown[0] == shown[1] and "step-000002" in shown[0]


REFUSED = {
    "run.devices=1": "shards over several devices, and this run has one; give run.devices or",
    "run.strategy=hsdp": "so it needs several of both; give run.strategy=fsdp",
    "run.precision=fp16": "does not go with run.precision=fp16; leave that out",
    "run.compile=true": "does not go with run.compile=true; leave that out",
    "run.channels_last=true": "does not go with run.channels_last=true; leave that out",
    "run.base_precision={denoiser: fp8}": "does not go with run.base_precision.denoiser",
    "optim.name=muon": "optim.name=muon looks at whole tensors, and run.strategy=fsdp shards them",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_needs_whole_tensors_is_refused(word: str, recipe_of: Callable[..., str]) -> None:
    own = {each.partition("=")[0]: each for each in (*SHARDED, word)}
    with pytest.raises(RecipeError) as refused:
        load_recipe([recipe_of("lora"), *own.values()])
    assert REFUSED[word] in str(refused.value)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("nf4", "{}", "stores weights in a form whose parts do not stand alone"),
        ("linear_attention", "{sites: self, distill: 1.0}", "adds a loss of its own"),
    ],
)
def test_a_method_that_needs_a_whole_model_is_refused_by_name(
    name: str, options: str, why: str, recipe_of: Callable[..., str]
) -> None:
    recipe = load_recipe([recipe_of("lora"), *SHARDED, f"methods.{name}={options}"])
    with pytest.raises(ValueError, match=r"give run\.strategy=ddp") as refused:
        refuse_unfit(recipe)
    assert f"run.strategy=fsdp does not go with methods.{name}, which {why}" in str(refused.value)


def test_a_backbone_in_fp16_is_refused(recipe_of: Callable[..., str]) -> None:
    recipe = load_recipe([recipe_of("lora"), *SHARDED])
    with pytest.raises(ValueError, match=r"give run\.precision=bf16 or fp32"):
        check_sharded(recipe.run, recipe.methods, Plan({}, 0, 0, 0), dtype=torch.float16)


def test_a_tensor_that_is_held_elsewhere_is_refused(tiny: Any, tmp_path: Path) -> None:
    """It would go on with a copy that does not train."""
    run = RunSpec(strategy="fsdp", devices=2)
    plan = apply_methods(tiny, methods_of({"lora": {"sites": "cross"}}), 0)
    held = tiny.get_parameter(plan.names[3])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        with pytest.raises(ValueError, match="is held outside of its module") as refused:
            shard(tiny, run, trained={name: tiny.get_parameter(name) for name in plan.names})
    finally:
        torch.distributed.destroy_process_group()
    assert plan.names[3] in str(refused.value) and held.numel()
