"""Schedule-free AdamW in whole runs: training computes with y, all else with the average x, and
neither looking nor stopping changes a bit. Prodigy's runs in fp16 beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.__main__ import main
from trainer.cli.given_adapter import given_adapter
from trainer.training.callbacks import preview
from trainer.training.callbacks.schedule_free import ScheduleFree
from trainer.training.checkpoint_files import newest_checkpoint, read_checkpoint
from trainer.training.tasks.denoise import Denoise

WORDS = [
    "recipe=custom_diffusion", "run.batch_size=2", "run.accumulate=2", "run.checkpoint_every=2",
    "data.prior_weight=0", "data.class_word=null", "data.augment=false", "run.device=cpu",
    "methods.new_token.init=animal", "tracker=none", "run.log_every=1", "run.steps=4",
]  # fmt: skip
LOOKS = ["run.validate_every=2", "preview.every=2", "preview.steps=1", "preview.prompts=[a <v1>]"]
BLIND = ["run.validate_every=0", "preview.every=0"]
FREE = ["optim.name=schedule_free_adamw", "optim.lr=1e-3", "optim.warmup=1"]


def fit(folder: Path, backbone: Path, *words: str) -> dict[str, Tensor]:
    given = {word.partition("=")[0] for word in words}
    own = [word for word in WORDS if word.partition("=")[0] not in given]
    assert main(["fit", *own, f"backbone={backbone}", f"run={folder}", *words]) == 0
    return load_file(folder / "adapter.safetensors")


def state_of(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    found = newest_checkpoint(folder / "checkpoints", print)
    assert found is not None
    return read_checkpoint(found)


def average(folder: Path) -> dict[str, Tensor]:
    """x of the newest checkpoint, from y = (1 - beta) z + beta x with beta = 0.9."""
    weights, state = state_of(folder)
    moments = state["optimizer"]["state"]
    z = {name: moments[number]["z"] for number, name in enumerate(state["order"])}
    assert all(not torch.equal(weights[name], z[name]) for name in z)
    return {name: (weights[name] - 0.1 * z[name]) / 0.9 for name in z}


def noting(
    was: Callable[..., Any], running: list[ScheduleFree], seen: set[bool]
) -> Callable[..., Any]:
    """The function, which notes in which mode the optimiser is."""

    def noted(*given: Any, **named: Any) -> Any:
        groups = running[-1].optimizer.param_groups if running else []
        seen.update(group["train_mode"] for group in groups)
        return was(*given, **named)

    return noted


@pytest.fixture(scope="module")
def modes() -> Iterator[dict[str, set[bool]]]:
    """Whether the weights were those of training, wherever the model was run."""
    seen: dict[str, set[bool]] = {"loss": set(), "score": set(), "sample_many": set()}
    running: list[ScheduleFree] = []
    begun = ScheduleFree.on_fit_start

    def begin(self: ScheduleFree, *given: Any) -> None:
        running.append(self)
        begun(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScheduleFree, "on_fit_start", begin)
        for owner, name in ((Denoise, "loss"), (Denoise, "score"), (preview, "sample_many")):
            patch.setattr(owner, name, noting(getattr(owner, name), running, seen[name]))
        yield seen


@pytest.fixture(scope="module")
def watched(
    modes: dict[str, set[bool]], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "watched"
    fit(folder, tiny_folder, *FREE, *LOOKS)
    return folder


def test_training_has_y_and_all_that_looks_has_x(
    watched: Path, modes: dict[str, set[bool]]
) -> None:
    # `score` runs `loss`
    assert modes == {"loss": {True, False}, "score": {False}, "sample_many": {False}}
    wanted, kept = average(watched), load_file(watched / "adapter.safetensors")
    weights, _ = state_of(watched)
    assert wanted.keys() <= kept.keys()
    for name, value in wanted.items():
        assert torch.allclose(kept[name], value, atol=1e-6), name
    assert any((kept[name] - weights[name]).abs().max() > 1e-5 for name in wanted)


def test_a_checkpoint_is_used_with_its_average(watched: Path) -> None:
    """As `sample` and `export` take it, of a run that has not finished."""
    newest = newest_checkpoint(watched / "checkpoints", print)
    assert newest is not None
    given = given_adapter(newest.folder, None, lambda line: None)
    found, kept = load_file(given.file), load_file(watched / "adapter.safetensors")
    assert found.keys() == kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in found.items())


def test_neither_looking_nor_stopping_changes_a_bit(
    watched: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    fit(tmp_path / "run", tiny_folder, *FREE, *BLIND, "run.steps=2")
    again = fit(tmp_path / "run", tiny_folder, *FREE, *BLIND)
    whole = load_file(watched / "adapter.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    ours, theirs = state_of(tmp_path / "run"), state_of(watched)
    assert all(torch.equal(value, theirs[0][name]) for name, value in ours[0].items())
    groups = [state["optimizer"]["param_groups"] for _, state in (ours, theirs)]
    assert groups[0] == groups[1] and groups[0][0]["k"] == 4


def test_prodigy_goes_on_bit_for_bit_in_fp16_and_logs_its_lr(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["optim.name=prodigy", "optim.warmup=1", "run.precision=fp16", *BLIND]
    whole = fit(tmp_path / "whole", tiny_folder, *words)
    said = capsys.readouterr()
    assert "decoupled" not in said.out and "optim.lr=1 is a factor on it" in said.out + said.err
    fit(tmp_path / "run", tiny_folder, *words, "run.steps=2")
    parts = fit(tmp_path / "run", tiny_folder, *words)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    ours, theirs = state_of(tmp_path / "run")[1], state_of(tmp_path / "whole")[1]
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    assert ours["optimizer"]["param_groups"][0]["d_numerator"] != 0
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").open()]
    rates = [line["train/effective_lr"] for line in lines if "train/effective_lr" in line]
    assert len(rates) == 4
    assert rates[0] == pytest.approx(0.5e-6)  # half of d0 in the first step, of the warm-up
    assert rates[1] == pytest.approx(1e-6)
