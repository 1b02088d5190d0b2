"""The adapter file: exactly what was trained, and nothing loads that is not for this model."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import full_disk
import pytest
import torch
from commands import server
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.config.header import HEADER, read_header
from trainer.config.load import methods_of
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_adapted, save_adapter

METHODS = {
    "selective": {"sites": "cross", "projections": ["k", "v"], "detach_first_token": True},
    "new_token": {"tokens": ["<v1>"], "init": "fox"},
}


@pytest.fixture
def saved(tiny: Any, tiny_folder: Path, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """An adapter of a model that is no longer the base, and its tensors."""
    plan = apply_methods(tiny, methods_of(METHODS))
    parameters = dict(tiny.named_parameters())
    with torch.no_grad():
        for name in plan.names:
            parameters[name].add_(0.1)
    tensors = {name: parameters[name].detach().clone() for name in plan.names}
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, tensors, tree=tree(tiny_folder), identity=tiny.identity())
    return path, tensors


def tree(folder: Path) -> dict[str, Any]:
    return {"backbone": str(folder), "methods": METHODS, "preview": {"guidance": 3.0}}


def rewrite(path: Path, tensors: dict[str, Tensor], **changes: Any) -> None:
    """The same file with other tensors, or with other words in its header."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()[HEADER])
    facts = {key: value for key, value in (facts | changes).items() if value}
    save_file(tensors, path, {HEADER: json.dumps(facts)})


def test_holds_exactly_the_trained_tensors(saved: tuple[Path, dict[str, Tensor]]) -> None:
    path, tensors = saved
    stored = load_file(path)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], value) for name, value in tensors.items())


def test_is_hardly_larger_than_its_tensors(saved: tuple[Path, dict[str, Tensor]]) -> None:
    path, tensors = saved
    held = sum(value.numel() * value.element_size() for value in tensors.values())
    assert path.stat().st_size <= 1.2 * held


def test_the_header_carries_recipe_and_backbone(
    saved: tuple[Path, dict[str, Tensor]], tiny: Any, tiny_folder: Path
) -> None:
    found, identity = read_header(saved[0])
    assert found == tree(tiny_folder)
    assert identity == tiny.identity()


def test_loading_restores_every_value_and_trains_nothing(
    saved: tuple[Path, dict[str, Tensor]], tiny_folder: Path
) -> None:
    path, tensors = saved
    loaded, found = load_adapted(path)
    parameters = dict(loaded.named_parameters())
    assert found == tree(tiny_folder)
    assert all(torch.equal(parameters[name], value) for name, value in tensors.items())
    assert not any(value.requires_grad for value in parameters.values())


def test_another_copy_of_the_backbone_serves(
    saved: tuple[Path, dict[str, Tensor]], tiny_folder: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "moved"
    elsewhere.symlink_to(tiny_folder)
    loaded, _ = load_adapted(saved[0], str(elsewhere))
    assert loaded.name == str(elsewhere)


def test_another_backbone_is_refused_with_both_named(
    saved: tuple[Path, dict[str, Tensor]], tiny_folder: Path, other_folder: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"was trained on backbone .*; give the backbone that it was .*$"
    ) as error:
        load_adapted(saved[0], str(other_folder))
    assert str(tiny_folder) in str(error.value)
    assert str(other_folder) in str(error.value)


def test_a_backbone_of_another_target_is_refused(
    saved: tuple[Path, dict[str, Tensor]], tmp_path: Path, tiny_folder: Path
) -> None:
    """Same shapes, but what this network predicts is noise: SD 2.1 base beside SD 2.1."""
    import shutil

    folder = tmp_path / "eps"
    shutil.copytree(tiny_folder, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match=r"\(target v\).*\(target eps\)"):
        load_adapted(saved[0], str(folder))


def _first(tensors: dict[str, Tensor]) -> str:
    return min(tensors)


def _without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name != _first(tensors)}


SPOILED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (_without, r"the model stores \['{first}'\].*holds nothing more"),
    "extra": (
        lambda t: t | {"unet.conv_in.bias": torch.zeros(16)},
        r"stores nothing more.*holds \['unet\.conv_in\.bias'\]",
    ),
    "renamed": (
        lambda t: _without(t) | {"unet.nowhere": t[_first(t)]},
        r"the model stores \['{first}'\].*holds \['unet\.nowhere'\]",
    ),
    "shape": (
        lambda t: t | {_first(t): torch.zeros(3, 5)},
        r"{first} is \(3, 5\) in the file and \([\d, ]+\) in the model",
    ),
    "nan": (
        lambda t: t | {_first(t): torch.full_like(t[_first(t)], torch.nan)},
        "{first} holds values that are not finite",
    ),
    "inf": (
        lambda t: t | {_first(t): t[_first(t)] / 0},
        "{first} holds values that are not finite",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_tensors_are_refused_by_name(
    case: str, saved: tuple[Path, dict[str, Tensor]]
) -> None:
    path, tensors = saved
    spoil, message = SPOILED[case]
    rewrite(path, spoil(dict(tensors)))
    with pytest.raises(ValueError, match=message.replace("{first}", _first(tensors))):
        load_adapted(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"format": ""}, "its header has the format None", id="foreign"),
        pytest.param({"format": "pt"}, "its header has the format 'pt'", id="other-format"),
        pytest.param({"recipe": ""}, "holds no complete recipe", id="no-recipe"),
        pytest.param({"recipe": "[1"}, "holds no complete recipe", id="broken-recipe"),
        pytest.param({"recipe": {}}, "holds no complete recipe", id="empty-recipe"),
        pytest.param({"backbone": []}, "holds no complete recipe", id="no-backbone"),
        pytest.param(
            {"recipe": {"backbone": "tiny", "methods": {"os.system": {}}}},
            r"methods\.os\.system: no such method",
            id="foreign-method",
        ),
    ],
)
def test_a_foreign_header_is_refused(
    changes: dict[str, Any],
    message: str,
    saved: tuple[Path, dict[str, Tensor]],
    tiny_folder: Path,
) -> None:
    path, tensors = saved
    rewrite(path, tensors, **changes)
    with pytest.raises(ValueError, match=message):
        load_adapted(path, str(tiny_folder))


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pickle-was-loaded",))


def test_a_pickle_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ValueError, match=r"not a safetensors file .*pickles are never loaded"):
        load_adapted(path)
    assert not (tmp_path / "pickle-was-loaded").exists()


@pytest.mark.parametrize("keep", [0, 6, 400, -1], ids=["empty", "length", "header", "last-byte"])
def test_a_truncated_file_is_refused(keep: int, saved: tuple[Path, dict[str, Tensor]]) -> None:
    path, _ = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_adapted(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_adapted(tmp_path / "adapter.safetensors")


def test_a_full_disk_leaves_the_old_adapter(
    saved: tuple[Path, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A limit on file size stands for the disk: the write fails half way in the same place."""
    path, _ = saved
    before = path.read_bytes()
    told = tmp_path_factory.mktemp("full") / "said"
    process = server().Process(target=full_disk.save, args=(path, told))
    process.start()
    process.join(120)
    said = told.read_text(encoding="utf-8")
    assert process.exitcode == 74
    assert said.startswith("error: ")
    assert "the adapter was not written" in said and str(path) in said
    assert "Traceback" not in said
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == [path.name]
