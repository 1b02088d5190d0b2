"""Text of batches that is encoded once: to the same bits with the cache and without, of every
caption that a run brings, dropped and shuffled ones too; and not where something in it trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_folders import qwen_image_pipeline, z_image_pipeline
from far_device import FAR, Far, far_device
from flow_folders import flux1_pipeline, make_flow_folder, sd3_pipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file
from sdxl_folder import make_sdxl_folder
from transformers import CLIPTextModel

from trainer.__main__ import main
from trainer.backbones import device as placement
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe
from trainer.data.loader import Planned
from trainer.data.source import Needs
from trainer.data.sources.shards import Shards
from trainer.data.tars.write_shards import write_world
from trainer.runs.adapter import load_base
from trainer.training import coming_prompts
from trainer.training.build import needs, step_plan, task_of
from trainer.training.coming_prompts import coming
from trainer.training.tasks.denoise import kept_captions, seeds_of
from trainer.training.text_encodings import encode_all, text_encodings

WORDS = [
    "recipe=lora", "run.batch_size=2", "run.steps=4", "run.log_every=1", "run.checkpoint_every=0",
    "data.prior_weight=0", "data.augment=false", "data.token=sks", "tracker=none",
    "run.device=cpu", "methods.new_token=null", "objective.caption_dropout=0.3",
    "run.validate_every=2", "preview.every=2", "preview.steps=1", "preview.prompts=[a fox]",
]  # fmt: skip


def fit(folder: Path, backbone: Path, *words: str) -> tuple[dict[str, Any], list[float]]:
    """The adapter, and the losses of all steps and of the validation."""
    given = {word.split("=")[0] for word in words}
    own = [word for word in WORDS if word.split("=")[0] not in given]
    assert main(["fit", *own, f"backbone={backbone}", f"run={folder}", *words]) == 0
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    losses = [line[key] for line in logged for key in ("train/loss", "val/loss") if key in line]
    return load_file(folder / "adapter.safetensors"), losses


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts of each call of the text encoder."""
    found: list[int] = []
    forward = CLIPTextModel.forward

    def count(self: Any, ids: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(len(ids))
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(CLIPTextModel, "forward", count)
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_the_same_with_the_cache_and_without(
    precision: str, tiny_folder: Path, tmp_path: Path, cache: Path, encoded: list[int]
) -> None:
    own = (f"run.precision={precision}", "preview.every=0", "preview.prompts=[]")
    first, losses = fit(tmp_path / "first", tiny_folder, *own)
    assert encoded and set(encoded) == {1}
    encoded.clear()
    again, same = fit(tmp_path / "again", tiny_folder, *own)
    assert not encoded, "all prompts were kept"
    without, plain = fit(tmp_path / "without", tiny_folder, *own, "run.cache_text=false")
    assert len(encoded) >= 4 and len(losses) == 6
    assert losses == same == plain
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert all(torch.equal(value, without[name]) for name, value in first.items())


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "sdxl": make_sdxl_folder,
    "sd3": lambda folder: make_flow_folder(folder, sd3_pipeline),
    "flux1": lambda folder: make_flow_folder(folder, flux1_pipeline),
    "z_image": lambda folder: make_flow_folder(folder, z_image_pipeline),
    "qwen_image": lambda folder: make_flow_folder(folder, qwen_image_pipeline),
}


@pytest.mark.parametrize("family", FOLDERS)
def test_prompts_apart_are_those_of_a_batch(family: str, tmp_path: Path) -> None:
    """Of prompts with more and fewer tokens too, which some families fill up with zeros."""
    folder = FOLDERS[family](tmp_path / family)
    model = load_base(backbone_spec(str(folder)), family)
    texts = text_encodings(model, tmp_path)
    assert texts is not None
    prompts = ["a fox", "", "a star above a cat", "a fox"]
    with torch.no_grad():
        wanted = model.encode_prompts(prompts).tensors()
    for _ in range(2):  # encoded, and read again
        found = texts(model, prompts)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
        texts = text_encodings(model, tmp_path)
        assert texts is not None
    assert len(list(tmp_path.glob("text/*/*/*.safetensors"))) == 3


def test_another_encoder_word_or_way_has_another_place(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = LoraConfig(target_modules=["q_proj"], r=2, lora_alpha=2, init_lora_weights=False)
    inject_adapter_in_model(adapter, tiny.text_encoder)
    tiny.requires_grad_(False)
    layers = [each for each in tiny.text_encoder.modules() if isinstance(each, LoraLayer)]
    keys = []
    for change in (None, "weight", "word", "length", "scale", "code"):
        if change == "weight":
            with torch.no_grad():
                next(tiny.text_encoder.parameters()).view(-1)[-1] += 1e-3
        if change == "word":
            tiny.tokenizer.add_tokens(["<new>"])
        if change == "length":
            tiny.max_tokens = 20
        if change == "scale":
            layers[-1].scaling["default"] *= 2
        if change == "code":
            monkeypatch.setattr("trainer.training.text_encodings.code", lambda: "other")
        texts = text_encodings(tiny, tmp_path)
        again = text_encodings(tiny, tmp_path)
        assert texts is not None and again is not None
        assert texts.cache.folder == again.cache.folder
        keys.append(texts.cache.folder)
    assert len(set(keys)) == 6


def test_what_trains_is_encoded_anew(
    tiny_folder: Path, tmp_path: Path, cache: Path, encoded: list[int], capsys: Any
) -> None:
    own = ["methods.new_token={}", "methods.new_token.init=animal", "data.token=<v1>"]
    fit(tmp_path / "run", tiny_folder, *own)
    assert not cache.exists() and set(encoded) >= {2}
    assert "run.cache_text" not in "".join(capsys.readouterr())  # nobody asked for it
    words = [*WORDS, f"backbone={tiny_folder}", "run.cache_text=true"]
    given = {word.split("=")[0] for word in own}
    words = [word for word in words if word.split("=")[0] not in given]
    with pytest.raises(ValueError, match=r"run\.cache_text=True has no effect: methods\.new_token"):
        load_recipe([*words, *own])
    text = "methods.lora.text_encoder=[q, v]"
    with pytest.raises(ValueError, match=r"methods\.lora trains the text encoders"):
        load_recipe([*WORDS, f"backbone={tiny_folder}", "run.cache_text=true", text])


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), color).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks, a fox, {color}, a star, above a cat")
    return folder


def test_prompts_are_encoded_alike_where_they_are_not_known_before(
    tiny_folder: Path,
    tmp_path: Path,
    cache: Path,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """Whether they are depends on the steps that are left: a resumed run must not notice."""
    own = ("preview.every=0", "preview.prompts=[]")
    first, losses = fit(tmp_path / "first", tiny_folder, *own)
    shutil.rmtree(cache)
    encoded.clear()
    monkeypatch.setattr(coming_prompts, "MOST_BYTES", 1)
    again, same = fit(tmp_path / "again", tiny_folder, *own)
    assert set(encoded) == {1} and not cache.exists()
    said = " ".join("".join(capsys.readouterr()).split())
    assert "run.cache_text: more than 0 different prompts are to come" in said
    assert losses == same
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_memory_has_what_was_encoded_where_no_file_is(tiny: Any, encoded: list[int]) -> None:
    tiny.requires_grad_(False)
    texts = text_encodings(tiny, None)
    assert texts is not None
    found = [texts(tiny, ["a fox", "a star"])["tokens"], texts(tiny, ["a star", "a fox"])["tokens"]]
    assert encoded == [1, 1] and torch.equal(found[0], found[1].flip(0))


@pytest.fixture
def items_of(tagged: Path, tiny_folder: Path) -> Callable[..., tuple[Any, Planned]]:
    """The task and the batches of a run on `tagged`."""

    def build(*words: str) -> tuple[Any, Planned]:
        own = ["recipe=lora_folder", f"backbone={tiny_folder}", f"data.folder={tagged}"]
        own += ["data.buckets=0", "run.steps=20", "objective.caption_dropout=0.3"]
        recipe = load_recipe([*own, "run.batch_size=2", *words])
        model = load_base(recipe.backbone, "tiny")
        train, _ = recipe.data.open(needs(recipe, model))
        return task_of(recipe, model), Planned(train, step_plan(recipe, train), None, 0, 1)

    return build


@pytest.mark.parametrize("shuffled", [True, False])
def test_every_caption_that_comes_is_known(
    shuffled: bool, items_of: Callable[..., tuple[Any, Planned]]
) -> None:
    task, items = items_of(f"data.shuffle_tags={str(shuffled).lower()}")
    found = coming(task, items, range(5, 20))
    brought: set[str] = set()
    for step in range(5, 20):
        batch = items[step]
        seeds = seeds_of(batch, task.seed, "train")
        brought.update(kept_captions(batch.captions, seeds, task.caption_dropout))
    assert found == brought and "" in brought
    assert len(brought) > 10 if shuffled else len(brought) == 1 + len(items.dataset)


def test_a_few_captions_are_known_however_long_the_run(
    items_of: Callable[..., tuple[Any, Planned]],
) -> None:
    task, items = items_of("data.shuffle_tags=false")
    assert len(coming(task, items, range(10**9))) == 1 + len(items.dataset)


@pytest.mark.parametrize(
    ("name", "limit", "reason"),
    [
        ("MOST_BYTES", 10**5, r"more than \d+ different prompts are to come, whose encodings"),
        ("MOST_CAPTIONS", 9, "the prompts of more than 9 captions would have to be looked at"),
    ],
)
def test_why_prompts_are_not_known(
    name: str,
    limit: int,
    reason: str,
    items_of: Callable[..., tuple[Any, Planned]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coming_prompts, name, limit)
    task, items = items_of("data.shuffle_tags=true")
    with pytest.raises(coming_prompts.UnknownPromptsError, match=reason):
        coming(task, items, range(200))


def test_captions_in_shards_are_not_known(
    tmp_path: Path, items_of: Callable[..., tuple[Any, Planned]]
) -> None:
    write_world(tmp_path / "shards", 4)
    asked = Needs(64, 4, lambda prompts, seed, how: (), tmp_path / "cache", lambda: "tiny")
    train, _ = Shards(shards=tmp_path / "shards").open(asked)
    task, items = items_of()
    lines: list[str] = []
    task.texts.folder = tmp_path
    assert not encode_all(task, Planned(train, items.plan, None, 0, 1), range(9), say=lines.append)
    assert len(lines) == 1 and "captions in shards are not known before" in lines[0]


def test_text_encoders_and_vae_rest_while_the_denoiser_trains(
    tiny_folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are on the device where previews and validation use them, and the adapter is that of a
    CPU."""
    from trainer.training.module import DiffusionModule

    wanted, _ = fit(tmp_path / "cpu", tiny_folder, "run.precision=fp32")
    where: list[dict[str, bool]] = []
    step = DiffusionModule.training_step

    def note(self: DiffusionModule, batch: Any, index: int) -> Any:
        named = self.backbone.named_parameters()
        where.append({name: isinstance(value.data, Far) for name, value in named})
        return step(self, batch, index)

    monkeypatch.setattr(DiffusionModule, "training_step", note)
    monkeypatch.setattr(placement, "_device", lambda name, rank: FAR)
    with far_device() as seen:
        found, _ = fit(tmp_path / "far", tiny_folder, "run.precision=fp32")
    assert not seen.missed and {"CLIPMLP", "Conv2d"} & set(seen.placed)
    assert len(where) == 4
    for each in where:
        assert all(far == name.startswith("unet.") for name, far in each.items())
    assert all(torch.allclose(value, found[name], atol=1e-5) for name, value in wanted.items())
