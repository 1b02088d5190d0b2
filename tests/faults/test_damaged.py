"""A checkpoint that changed on the disk is never loaded: the one before it is, and that is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.common.exit_codes import DAMAGED, LeaveError
from trainer.training import checkpoint_files as checkpoint
from trainer.training.checkpoint_files import read_checkpoint

pytestmark = pytest.mark.faults


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def promote(path: Path) -> None:
    """A manifest that was edited by hand."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"micro_step": 4}))


@pytest.fixture
def folder(whole: Any, tmp_path: Path) -> Path:
    """The run after three of five steps."""
    shutil.copytree(whole(), tmp_path / "run")
    for step in (4, 5):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-00000{step}")
    (tmp_path / "run" / "adapter.safetensors").unlink()
    return tmp_path / "run"


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("spoil", "name", "says"),
    [
        (flip, "weights.safetensors", "weights.safetensors has changed"),
        (flip, "state.pt", "state.pt has changed"),
        (flip, "manifest.json", "manifest.json"),
        (promote, "manifest.json", "manifest.json has changed"),
        (cut, "weights.safetensors", "bytes and had"),
        (cut, "state.pt", "bytes and had"),
        (empty, "manifest.json", "manifest.json is missing or not readable"),
        (Path.unlink, "weights.safetensors", "weights.safetensors is missing"),
        (Path.unlink, "state.pt", "state.pt is missing"),
        (Path.unlink, "manifest.json", "manifest.json is missing"),
    ],
)
def test_it_falls_back_by_one_and_says_so(
    spoil: Callable[[Path], None],
    name: str,
    says: str,
    folder: Path,
    whole: Any,
    run: Any,
    look: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    spoil(folder / "checkpoints" / "step-000003" / name)
    assert run(folder) == 0
    told = capfd.readouterr().err
    assert "step-000003 is damaged and is skipped" in told and says in told
    assert "resumes after step 2" in told
    (event,) = look.events(folder, "fallback")
    assert says in event["reason"]
    pairs = zip(look.checkpoints(whole()), look.checkpoints(folder), strict=True)
    assert [look.differing(one, other) for one, other in pairs] == [[]] * 5
    assert (folder / "checkpoints" / "step-000003.damaged").is_dir()


def test_where_none_is_whole_nothing_is_begun_anew(folder: Path, run: Any) -> None:
    for path in (folder / "checkpoints").glob("step-*/state.pt"):
        flip(path)
    assert run(folder) == 65
    assert run(folder) == 65  # not even the second time
    assert not (folder / "adapter.safetensors").exists()


def test_retention_counts_only_what_is_whole(folder: Path, run: Any, fault: Any, look: Any) -> None:
    """Step 3 is damaged; with one to keep, step 2 must stay until the new step 3 is written."""
    flip(folder / "checkpoints" / "step-000003" / "state.pt")
    with fault(fail={"step": 2}), pytest.raises(RuntimeError, match="this rank alone"):
        run(folder, "run.checkpoint_keep=1")
    assert [each.step for each in look.checkpoints(folder)] == [1, 2]
    assert run(folder, "run.checkpoint_keep=1") == 0
    assert [each.step for each in look.checkpoints(folder)] == [5]


def test_a_checkpoint_of_an_earlier_version_is_not_overlooked(tmp_path: Path, run: Any) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="a checkpoint of an earlier version"):
        run(tmp_path / "run")


def test_no_code_in_a_checkpoint_is_run(folder: Path, tmp_path: Path) -> None:
    """Sealed by somebody who knows how: torch refuses the pickle."""

    class Opens:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "opened"), "w"))

    place = folder / "checkpoints" / "step-000003"
    torch.save({"parts": Opens()}, place / "state.pt")
    manifest = json.loads((place / "manifest.json").read_text())
    manifest.pop("sha256")
    manifest["files"]["state.pt"] = checkpoint._facts(place / "state.pt")
    sealed = {**manifest, "sha256": checkpoint._seal(manifest)}
    (place / "manifest.json").write_text(json.dumps(sealed))
    with pytest.raises(LeaveError, match="something else than tensors and plain values") as refused:
        read_checkpoint(checkpoint.verified(place))
    assert refused.value.code == DAMAGED
    assert not (tmp_path / "opened").exists()
