"""Adapters along the way: which steps, what is in the files, and that every verb takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from largest_file import largest_file
from PIL import Image
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.cli.given_adapter import given_digest
from trainer.common.exit_codes import DISK, LeaveError
from trainer.config.load import load_recipe
from trainer.config.run_section import RunSpec
from trainer.runs.adapter import adapter_facts
from trainer.runs.run_folder import kept_adapters
from trainer.training.callbacks.preview_files import adapter_after
from trainer.training.checkpoint_files import every_checkpoint, read_checkpoint, verified
from trainer.training.fit import fit

WORDS = [
    "recipe=lora", "run.batch_size=1", "data.prior_weight=0", "run.steps=5", "optim.ema=0.9",
    "run.validate_every=0", "preview.every=0", "tracker=none", "run.checkpoint_every=1",
    "run.checkpoint_keep=9", "evaluate.steps=1",
]  # fmt: skip


def finished(folder: Path, backbone: Path, *words: str) -> Path:
    given = {word.partition("=")[0]: word for word in (*WORDS, *words)}
    return fit(load_recipe([*given.values(), f"backbone={backbone}"]), folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora" / "one"
    return finished(folder, tiny_folder, "run.keep_adapters=3", "run.accumulate=2")


@pytest.mark.parametrize(
    ("steps", "count", "kept"),
    [
        (1000, 5, (200, 400, 600, 800)),
        (1100, 3, (366, 733)),
        (10, 4, (2, 5, 7)),
        (3, 5, (1, 2)),
        (10, 1, ()),
        (10, 0, ()),
    ],
)
def test_evenly_over_the_steps(steps: int, count: int, kept: tuple[int, ...]) -> None:
    assert RunSpec(steps=steps, keep_adapters=count).kept_steps == kept


def test_each_is_the_moving_average_of_its_step(run: Path) -> None:
    """As the checkpoint of that step has it, which another part of the program wrote."""
    kept = kept_adapters(run)
    assert list(kept) == [1, 3]
    saved = {int(path.name[5:]): path for path in every_checkpoint(run / "checkpoints")}
    own = load_file(run / "adapter.safetensors")
    for step, path in kept.items():
        tensors = load_file(path)
        averaged = read_checkpoint(verified(saved[step]))[1]["parts"]["ema"]["averaged"]
        assert tensors.keys() == own.keys() == averaged.keys()
        assert all(torch.equal(value, averaged[name]) for name, value in tensors.items())
        assert not any(torch.equal(value, own[name]) for name, value in tensors.items())
    assert not list((run / "adapters").glob(".*"))


def test_keeping_changes_nothing_that_is_trained(
    run: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    plain = finished(tmp_path / "plain", tiny_folder, "run.accumulate=2")
    own, other = (load_file(folder / "adapter.safetensors") for folder in (run, plain))
    assert own.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in own.items())


def test_every_verb_takes_one(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kept_adapters(run)[3]
    facts = adapter_facts(path)
    assert facts["adapter"] == "lora/one" and facts["step"] == 3
    words = ["prompt=a <v1>", "steps=1", f"out={tmp_path}"]
    assert main(["sample", f"adapter={path}", *words]) == 0
    (picture,) = tmp_path.glob("*.png")
    assert json.loads(Image.open(picture).info["attention_trainer"])["step"] == 3
    pixels = Image.open(picture).tobytes()
    again = tmp_path / "again"
    monkeypatch.chdir(run.parent.parent)  # there "lora/one" is the run
    assert main(["sample", f"from={picture}", f"out={again}"]) == 0
    (repeated,) = again.glob("*.png")
    assert Image.open(repeated).tobytes() == pixels
    assert main(["export", f"run={path}", f"out={tmp_path / 'peft'}", "format=peft"]) == 0
    assert list((tmp_path / "peft").rglob("adapter_model.safetensors"))


def test_a_preview_names_the_adapter_that_was_kept(run: Path) -> None:
    facts = adapter_after(run, 3)
    assert facts["adapter_sha256"] == adapter_facts(kept_adapters(run)[3])["adapter_sha256"]
    assert facts["checkpoint_sha256"] == given_digest(run / "checkpoints" / "step-000003")
    assert adapter_after(run, 2)["adapter_sha256"] == given_digest(
        run / "checkpoints" / "step-000002"
    )


def test_a_full_disk_ends_the_run(tmp_path: Path, tiny_folder: Path) -> None:
    words = ("run.keep_adapters=2", "run.steps=2", "run.checkpoint_every=0")
    words += ("run.checkpoint_keep=2", "optim.ema=null")
    whole = finished(tmp_path / "whole", tiny_folder, *words)
    limit = kept_adapters(whole)[1].stat().st_size // 2
    with largest_file(limit), pytest.raises(LeaveError, match="adapter of step 1 was not") as left:
        finished(tmp_path / "stops", tiny_folder, *words)
    assert left.value.code == DISK
    assert not list((tmp_path / "stops").glob("adapters/*"))


def test_a_run_that_may_goes_on_without_the_file(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "adapters").write_text("a file where the folder would be")
    words = ("run.keep_adapters=2", "run.steps=2", "run.on_disk_full=continue")
    finished(tmp_path, tiny_folder, *words)
    assert (tmp_path / "adapter.safetensors").is_file()
    assert '"keep_failed", "step": 1' in (tmp_path / "events.jsonl").read_text()
