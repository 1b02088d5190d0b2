"""The hash of each part of a backbone: of the files that are read, and of no others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from trainer.backbones import part_digests as module
from trainer.backbones.part_digests import digests_in_use, file_digest, part_digests
from trainer.config.lineage import backbone_spec

PARTS = ["scheduler", "text_encoder", "tokenizer", "unet", "vae"]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    found = tmp_path / "mine"
    shutil.copytree(tiny_folder, found)
    return found


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("unet/config.json", "unet"),
        ("unet/diffusion_pytorch_model.safetensors", "unet"),
        ("vae/diffusion_pytorch_model.safetensors", "vae"),
        ("tokenizer/tokenizer.json", "tokenizer"),
        ("scheduler/scheduler_config.json", "scheduler"),
    ],
)
def test_one_byte_changes_its_part_alone(file: str, part: str, folder: Path) -> None:
    spec = backbone_spec(str(folder))
    before = part_digests(spec)
    assert sorted(before) == PARTS
    data = bytearray((folder / file).read_bytes())
    data[-1] ^= 1
    (folder / file).write_bytes(data)
    after = part_digests(spec)
    assert [name for name in PARTS if before[name] != after[name]] == [part]


def test_parts_that_training_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    spec = backbone_spec(str(folder))
    assert sorted(part_digests(spec)) == sorted([*PARTS, "safety_checker"])
    hashed: list[Path] = []

    def noting(path: Path) -> str:
        hashed.append(path)
        return file_digest(path)

    monkeypatch.setattr(module, "file_digest", noting)
    assert sorted(digests_in_use(spec)) == PARTS
    assert hashed and not [path for path in hashed if path.parent.name == "safety_checker"]
    over = digests_in_use(backbone_spec("tiny_dit"))  # over a folder that has a unet
    assert sorted(over) == ["scheduler", "text_encoder", "tokenizer", "transformer", "vae"]
    assert sorted(digests_in_use(backbone_spec("sd15"))) == ["hub"]
    assert "made from nothing" in digests_in_use(backbone_spec("tiny_scratch"))


def test_where_it_lies_and_what_is_not_read_do_not_matter(folder: Path, tmp_path: Path) -> None:
    before = part_digests(backbone_spec(str(folder)))
    (folder / "unet" / "README.md").write_text("hello")
    shutil.copy(
        folder / "unet" / "diffusion_pytorch_model.safetensors",
        folder / "unet" / "diffusion_pytorch_model.fp16.safetensors",
    )
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert part_digests(backbone_spec(str(moved))) == before


def test_an_overlay_s_parts_are_the_ones_that_are_read() -> None:
    plain, over = part_digests(backbone_spec("tiny")), part_digests(backbone_spec("tiny_dit"))
    assert over["vae"] == plain["vae"] and over["text_encoder"] == plain["text_encoder"]
    assert over["scheduler"] != plain["scheduler"]
    assert "transformer" in over


def test_a_network_made_from_nothing_is_known_by_its_values() -> None:
    one, other = (part_digests(backbone_spec("unet_scratch", {"seed": seed})) for seed in (0, 1))
    assert [name for name in one if one[name] != other[name]] == ["made from nothing"]


def test_a_file_is_read_again_only_where_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reads = tmp_path / "weights", []
    path.write_bytes(b"one")
    true = module.hashlib.file_digest
    monkeypatch.setattr(
        module.hashlib, "file_digest", lambda *given: reads.append(1) or true(*given)
    )
    first = file_digest(path)
    assert file_digest(path) == first and len(reads) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert file_digest(path) != first and len(reads) == 2


@pytest.mark.parametrize("harm", ["cut", "zeros", "exchanged", "empty"])
def test_a_damaged_digest_in_the_cache_is_computed_anew(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Believed, it would say that a backbone has changed."""
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    files = [tmp_path / "one", tmp_path / "two"]
    for path in files:
        path.write_text(path.name)
    before = [file_digest(path) for path in files]
    kept = sorted((tmp_path / "cache" / "digests").iterdir())
    data = [path.read_bytes() for path in kept]
    harmed = {
        "cut": [part[:-1] for part in data], "zeros": [b"0" * len(part) for part in data],
        "exchanged": data[::-1], "empty": [b"", b""],
    }[harm]  # fmt: skip
    for path, part in zip(kept, harmed, strict=True):
        path.write_bytes(part)
    assert [file_digest(path) for path in files] == before
    assert [path.read_bytes() for path in kept] == data


def test_what_a_mac_leaves_beside_the_files_of_a_part_changes_nothing(folder: Path) -> None:
    spec = backbone_spec(str(folder))
    before = part_digests(spec)
    for name in ("unet/._config.json", "tokenizer/._tokenizer.json", "vae/._x.safetensors"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    assert part_digests(spec) == before
