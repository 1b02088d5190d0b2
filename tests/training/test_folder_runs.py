"""Runs on a folder of pictures as people have them: the recipe of two words, epochs, repeats and
captions that vary; resumed and with data workers they stay bit for bit the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import command
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for name, count in (("2_a dog", 3), ("1_a cat", 2)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise = Image.effect_noise((40 + 8 * number, 48), 90).convert("RGB")
            noise.save(folder / name / f"{number}.png")
    (folder / "2_a dog" / "0.txt").write_text("dog, red, big, old\ndog, seen near, in snow")
    return folder


def fit(cwd: Path, backbone: Path, *words: str, code: int = 0) -> str:
    own = ["recipe=lora_folder", "data.folder=pictures", f"backbone={backbone}"]
    own += ["data.caption_lines=true", "data.shuffle_tags=true", "optim.warmup=0"]
    own += ["optim.schedule=constant", "tracker=none", "run.checkpoint_every=2", "data.buckets=0"]
    result = command("fit", *own, "run.batch_size=2", *words, cwd=cwd)
    assert result.returncode == code, result.stderr[-3000:]
    return result.stdout + result.stderr


def test_epochs_of_a_folder_resume_bit_for_bit(
    pictures: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    said = fit(tmp_path, tiny_folder, "run.id=whole", "run.epochs=1")
    said = " ".join(said.split())
    assert "5 photos; captions: 4 from folder names, 1 from .txt (photos with several: 1)" in said
    assert "run.epochs=1: an epoch has 8 samples, a step 2, so run.steps=4" in said
    fit(tmp_path, tiny_folder, "run.id=parts", "run.steps=2")
    fit(tmp_path, tiny_folder, "run.id=parts", "run.epochs=1")
    fit(tmp_path, tiny_folder, "run.id=workers", "run.epochs=1", "run.workers=1")
    runs = tmp_path / "runs" / "lora_folder"
    whole, *others = (
        load_file(runs / name / "adapter.safetensors") for name in ("whole", "parts", "workers")
    )
    for other in others:
        assert whole.keys() == other.keys()
        assert all(whole[name].equal(other[name]) for name in whole)
    fit(tmp_path, tiny_folder, "run.id=uncached", "run.epochs=1", "run.cache_latents=false")
    other = load_file(runs / "uncached" / "adapter.safetensors")
    assert all(whole[name].equal(other[name]) for name in whole)


def test_check_and_inspect_say_what_was_found(
    pictures: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    (pictures / "notes.md").write_text("x")
    words = ["recipe=lora_folder", "data.folder=pictures", f"backbone={tiny_folder}"]
    for verb in (["check"], ["data", "inspect"]):
        result = command(*verb, *words, "data.buckets=0", cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "pictures: 5 photos; captions: 4 from folder names, 1 from .txt" in result.stdout
        assert "with repeats 8 an epoch (2_a dog 2 times)" in result.stdout
        assert "pictures: not read: notes.md; captions are read from .txt" in result.stdout


def test_repeats_that_changed_are_refused(
    pictures: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    fit(tmp_path, tiny_folder, "run.id=one", "run.steps=2")
    (pictures / "2_a dog").rename(pictures / "3_a dog")
    said = " ".join(fit(tmp_path, tiny_folder, "run.id=one", "run.steps=4", code=78).split())
    assert "its data have changed since" in said and "2_a dog/0.png is gone" in said
