"""Runs on a stream: latents by content, shards of latents, and a run that stops and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.backbones.backbone import Backbone
from trainer.config.load import load_recipe
from trainer.data.latent_cache import as_stored
from trainer.data.latent_store import LatentStore
from trainer.data.sources.stream import Stream
from trainer.data.tars.write_shards import write_world
from trainer.runs.adapter import load_base
from trainer.training.build import encoder_of, needs

WORDS = [
    "recipe=lora_folder", "data.source=stream", "run.batch_size=2", "run.log_every=1",
    "tracker=none", "run.device=cpu", "run.validate_every=0", "preview.every=0",
    "preview.prompts=[]", "optim.schedule=constant", "optim.warmup=0", "run.resolution=32",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streamed") / "world"
    write_world(folder, 5, seed=3, per_shard=2)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pictures of each call of the VAE."""
    found: list[int] = []
    moments = Backbone.moments

    def count(self: Any, pixels: Any, *args: Any) -> Any:
        found.append(len(pixels))
        return moments(self, pixels, *args)

    monkeypatch.setattr(Backbone, "moments", count)
    return found


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that the text encoder reads."""
    found: list[str] = []
    encode = Backbone.encode_prompts

    def note(self: Any, prompts: Any) -> Any:
        found.extend(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(Backbone, "encode_prompts", note)
    return found


def words_of(backbone: Path, urls: Path, *more: str) -> list[str]:
    return [*WORDS, f"backbone={backbone}", f"data.urls={urls}", *more]


def fit(folder: Path, words: list[str], *more: str) -> tuple[dict[str, Any], list[float]]:
    assert main(["fit", *words, f"run={folder}", *more]) == 0
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    return load_file(folder / "adapter.safetensors"), losses


def test_latents_are_kept_by_content_and_change_nothing(
    world: Path, tiny_folder: Path, tmp_path: Path, encoded: list[int], read: list[str], cache: Path
) -> None:
    """Nor do texts, which are kept by content, too."""
    words = words_of(tiny_folder, world, "run.steps=4")
    first, losses = fit(tmp_path / "first", words)
    assert sum(encoded) == 6, "two of eight pictures were of the second epoch"
    assert len(list((cache / "pictures").rglob("*.safetensors"))) == 5
    assert len(read) == len(set(read)) == len(list((cache / "text").rglob("*.safetensors")))
    encoded.clear()
    read.clear()
    again, same = fit(tmp_path / "again", words)
    assert not encoded and not read, "all latents and texts were there"
    off = ("run.cache_latents=false", "run.cache_text=false")
    plain, without = fit(tmp_path / "plain", words, *off)
    assert sum(encoded) == 8 and losses == same == without
    for name, value in first.items():
        assert torch.equal(value, again[name]) and torch.equal(value, plain[name])


def test_a_stopped_run_resumes_at_its_sample_with_other_workers(
    world: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    words = words_of(tiny_folder, world)
    whole, losses = fit(tmp_path / "whole", words, "run.steps=6")
    fit(tmp_path / "parts", words, "run.steps=3", "run.checkpoint_every=3")
    (tmp_path / "parts" / "adapter.safetensors").unlink()
    parts, found = fit(tmp_path / "parts", words, "run.steps=6", "run.workers=1")
    assert found == losses
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_a_changed_stream_is_no_resume(
    world: Path, tiny_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    write_world(tmp_path / "other", 5, seed=4, per_shard=3)
    words = words_of(tiny_folder, world, "run.checkpoint_every=1")
    fit(tmp_path / "run", words, "run.steps=1")
    again = words_of(tiny_folder, tmp_path / "other", "run.steps=2", f"run={tmp_path / 'run'}")
    assert main(["fit", *again]) != 0
    assert "world-000000.tar has changed" in capsys.readouterr().err


def test_shards_of_latents_are_those_of_the_pictures(
    world: Path, tiny_folder: Path, tmp_path: Path, capsys: Any, encoded: list[int]
) -> None:
    words, out = words_of(tiny_folder, world), tmp_path / "latents"
    assert main(["data", "build", *words, f"out={out}", "per_shard=2"]) == 0
    assert len(capsys.readouterr().out.splitlines()[-3:]) == len(list(out.iterdir())) == 3
    recipe = load_recipe(words)
    backbone = load_base(recipe.backbone, recipe.backbone_name, hold=False)
    pictures, _ = recipe.data.open(needs(recipe, backbone))
    kept, _ = Stream(urls=(str(out),)).open(needs(recipe, backbone))
    for index in range(5):
        own = int(kept.key(index))
        wanted = as_stored(backbone.moments(pictures.image(own)[None], 1))
        assert torch.equal(kept.moments(index).float(), wanted)  # type: ignore[union-attr]
        assert kept.captions(index) == pictures.captions(own)  # type: ignore[attr-defined]
        assert kept.crop(index) == pictures.crop(own)  # type: ignore[attr-defined]
    encoded.clear()
    fit(tmp_path / "run", words_of(tiny_folder, out, "run.steps=2"))
    assert not encoded
    assert main(["data", "build", *words, f"out={out}"]) != 0
    assert "it is there already; give a new folder" in capsys.readouterr().err
    wider = [word.replace("=32", "=64") for word in words_of(tiny_folder, out, "run.steps=1")]
    assert main(["fit", *wider, f"run={tmp_path / 'wider'}"]) != 0
    assert "by another VAE, or at another run.resolution" in capsys.readouterr().err


def test_what_is_not_written_as_latents(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (64, 48)).save(folder / "a.png")
    (folder / "a.txt").write_text("one\ntwo")
    own = [word for word in WORDS if not word.startswith("data.source")]
    own += [f"backbone={tiny_folder}", f"data.folder={folder}", f"out={tmp_path / 'out'}"]
    own += ["data.buckets=0", "data.caption_lines=true"]
    for word, says in (
        ("data.flip=true", "pictures that are always cut alike"),
        ("data.recursive=true", "its captions are drawn anew at each use"),
        ("shards=x", "writes latents, without shards="),
    ):
        assert main(["data", "build", *own, word]) != 0
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["data", "build"]) != 0
    assert "shards is missing, as in shards=./shards" in capsys.readouterr().err


def test_inspect_says_that_latents_have_no_pictures(
    world: Path, tiny_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "latents"
    assert main(["data", "build", *words_of(tiny_folder, world), f"out={out}"]) == 0
    assert main(["data", "inspect", *words_of(tiny_folder, out), "out=x.png"]) != 0
    assert "stored as latents, without pictures to draw" in capsys.readouterr().err
    sheet = tmp_path / "sheet.png"
    assert main(["data", "inspect", *words_of(tiny_folder, world), f"out={sheet}"]) == 0
    said = capsys.readouterr().out
    assert "data: 5 training samples in 3 shards" in said and sheet.is_file()


def test_another_encoder_or_picture_has_another_file(
    world: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(words_of(tiny_folder, world))
    backbone = load_base(recipe.backbone, recipe.backbone_name, hold=False)
    data, _ = recipe.data.open(needs(recipe, backbone))
    contents = [data.content(i) for i in range(5)]  # type: ignore[attr-defined]
    assert len(set(contents)) == 5
    moments = torch.arange(5.0)[:, None, None, None].expand(5, 8, 4, 4)
    store = LatentStore(tmp_path, encoder_of(recipe, backbone))
    assert store.all(contents) is None
    store.keep(contents, moments)
    kept = LatentStore(tmp_path, encoder_of(recipe, backbone)).all(contents[::-1])
    assert kept is not None and torch.equal(kept.float(), moments.flip(0))
    wider = load_recipe([word.replace("=32", "=64") for word in words_of(tiny_folder, world)])
    before = encoder_of(recipe, backbone)
    assert encoder_of(wider, backbone) != before
    with torch.no_grad():
        next(backbone.vae.parameters()).add_(1)
    assert encoder_of(recipe, backbone) != before
    damaged = next((tmp_path / "pictures").rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\1\2\3")
    assert store.all(contents) is None
    with pytest.raises(ValueError, match=r"not finite in fp16; give run.cache_latents=false"):
        store.keep(contents[:1], moments[:1] + 1e6)
