"""A preview or a validation that fails costs itself alone: the run is saved first, goes on without,
and says so; its weights are those of a run that never had it. On two ranks: `test_ranks.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from trainer.data import loader as loader_file

pytestmark = pytest.mark.faults
SHOWN = ("preview.every=2", "preview.steps=1", "preview.prompts=[a <v1>]", "run.checkpoint_every=0")
CHECKED = ("run.validate_every=2", "run.checkpoint_every=0", "run.log_every=1")
MEMORY = "OutOfMemoryError: CUDA out of memory. Tried to allocate 9.00 GiB."


def same_adapter(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "adapter.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


@pytest.fixture
def plain(whole: Any) -> Path:
    """A run without previews and validation."""
    folder: Path = whole()
    return folder


@pytest.mark.parametrize(
    ("call", "step"), [(1, 0), (2, 2), (4, 5)], ids=["base", "between", "after-the-last"]
)
def test_a_preview_without_memory(
    call: int,
    step: int,
    plain: Path,
    tmp_path: Path,
    run: Any,
    fault: Any,
    look: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Before the first step, in between, and after the last one."""
    folder = tmp_path / "run"
    with fault(preview={"error": "memory", "call": call}):
        assert run(folder, *SHOWN) == 0
    said = capfd.readouterr().err
    assert f"preview failed at step {step}: {MEMORY}; the run continues without, it is" in said
    (event,) = look.events(folder, "preview_failed")
    assert event["step"] == step and event["reason"] == MEMORY and event["saved"]
    # nothing is trained before the first step, so nothing is saved there
    saved = look.checkpoints(folder)
    assert [each.step for each in saved] == ([step] if step else [])
    whole = {each.step: each for each in look.checkpoints(plain)}
    assert not any(look.differing(each, whole[each.step]) for each in saved)
    assert (folder / "previews").exists() == (call > 1)
    assert same_adapter(folder, plain)


def test_what_it_saved_goes_on(
    plain: Path, tmp_path: Path, run: Any, fault: Any, look: Any
) -> None:
    """Killed right after, the run resumes from that checkpoint, with previews that work."""
    folder = tmp_path / "run"
    faults = {"preview": {"error": "memory", "call": 2}, "fail": {"step": 3}}
    with fault(**faults), pytest.raises(RuntimeError, match="a fault of this rank"):
        run(folder, *SHOWN)
    assert run(folder, *SHOWN) == 0
    assert look.events(folder, "started")[-1]["step"] == 2
    assert same_adapter(folder, plain)


def test_a_sheet_that_cannot_be_written(
    tmp_path: Path, run: Any, look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "previews").write_text("a file in its place")
    assert run(folder, *SHOWN) == 0
    (event,) = look.events(folder, "preview_failed")
    assert "Not a directory" in event["reason"]
    assert (folder / "adapter.safetensors").is_file()


@pytest.mark.parametrize("ema", ["0.9", "null"])
def test_a_validation_without_memory(
    ema: str,
    plain: Path,
    tmp_path: Path,
    run: Any,
    fault: Any,
    look: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With averaged weights in the model, and without: what is saved are its own."""
    folder = tmp_path / "run"
    with fault(validation={"error": "memory", "call": 1}):
        assert run(folder, *CHECKED, f"optim.ema={ema}") == 0
    said = capfd.readouterr().err
    assert f"validation failed at step 2: {MEMORY}; the run continues without, it is saved" in said
    assert len(look.events(folder, "validation_failed")) == 1
    (saved,) = look.checkpoints(folder)
    assert saved.step == 2
    assert "val/loss" not in (folder / "metrics.jsonl").read_text()
    if ema != "null":
        whole = {each.step: each for each in look.checkpoints(plain)}
        assert not look.differing(saved, whole[2])
        assert same_adapter(folder, plain)


def test_a_held_out_picture_that_vanishes(
    tmp_path: Path, run: Any, look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read again at every validation where latents are not cached."""
    photos, recipe = tmp_path / "photos", tmp_path / "own.yaml"
    photos.mkdir()
    for number in range(4):
        Image.effect_noise((32, 32), 40 + number).convert("RGB").save(photos / f"{number}.png")
    recipe.write_text(
        f"data: {{source: folder, folder: '{photos}', template: a photo, validation: 1}}\n"
        "methods: {selective: {sites: cross, projections: [k, v]}}\n"
    )
    original = loader_file.Fixed.__getitem__

    def vanished(self: Any, number: int) -> Any:
        (photos / "3.png").unlink(missing_ok=True)
        return original(self, number)

    monkeypatch.setattr("trainer.data.folder_photos.KEEP_BYTES", 0)
    monkeypatch.setattr(loader_file.Fixed, "__getitem__", vanished)
    folder = tmp_path / "run"
    words = (f"recipe={recipe}", "run.cache_latents=false", *CHECKED)
    assert run(folder, *words) == 0
    (event,) = look.events(folder, "validation_failed")
    assert "3.png" in event["reason"]
    assert (folder / "adapter.safetensors").is_file()
