"""PixArt-alpha and -sigma as they are published, tiny, against stock diffusers: prompts of T5,
pictures of both solvers, the size that alpha is told, what is merged and read again."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pixart_folder import ALPHA, SIGMA, UNUSED, make_pixart_folder, sentencepiece_file
from torch import Tensor

from trainer.__main__ import main
from trainer.backbones import load_backbone
from trainer.config.lineage import backbone_names, backbone_spec
from trainer.config.load import load_recipe, methods_of
from trainer.config.schema import RecipeError
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.export.export import export
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import save_adapter

PROMPTS = ["a fox on a red background", "An apple left of a CAT "]
SEEDS = [3, 4]
CLOSE = 2 / 255
KINDS = [ALPHA, SIGMA]
TOKENS = {ALPHA: 120, SIGMA: 300}
Open = Callable[[Path], Any]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pixart_folder(tmp_path_factory.mktemp("pixart") / request.param, request.param)


@pytest.fixture(scope="module")
def alpha_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pixart_folder(tmp_path_factory.mktemp("pixart") / "alpha", ALPHA)


@pytest.fixture
def model(folder: Path, open_folder: Open) -> Any:
    """A fresh backbone that a test may edit."""
    return open_folder(folder)


def stock(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def kind_of(folder: Path) -> str:
    return str(json.loads((folder / "model_index.json").read_text())["_class_name"])


def painted(pipe: Any, **more: Any) -> Tensor:
    """What a stock pipeline makes from the noise of the seeds, 32 by 48 pixels."""
    x_t = [torch.randn(1, 8, 8, 12, generator=torch.Generator().manual_seed(n)) for n in SEEDS]
    pictures: Tensor = pipe(
        PROMPTS,
        latents=torch.cat(x_t),
        num_inference_steps=4,
        guidance_scale=4.0,
        height=32,
        width=48,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="pt",
        **more,
    ).images
    return pictures


def drawn(model: Any, sampler: str | None = "dpmpp_2m") -> Tensor:
    how = Sampling(4, 4.0, size=(32, 48), sampler=sampler)
    return sample(model, PROMPTS, SEEDS, settings=how) / 2 + 0.5


def test_a_published_folder_says_what_it_is(model: Any, folder: Path) -> None:
    kind = kind_of(folder)
    assert backbone_spec(str(folder)).family == model.family == "pixart"
    assert (model.target, model.text_length, model.resolution) == ("eps", TOKENS[kind], 512)
    assert model.denoiser.use_additional_conditions == (kind == ALPHA)
    assert type(model.pipeline()).__name__ == kind
    assert type(model.text_encoder).__name__ == "T5EncoderModel"


@torch.no_grad()
def test_prompts_are_those_of_the_stock_pipeline(model: Any, folder: Path) -> None:
    texts, mask, empty, empty_mask = stock(folder).encode_prompt(PROMPTS, clean_caption=False)
    own = model.encode_prompts([*PROMPTS, "", ""])
    assert torch.equal(own.mask, torch.cat([mask, empty_mask]))
    assert own.mask.sum(1).tolist()[2:] == [1, 1]  # the end alone
    torch.testing.assert_close(own.tokens, torch.cat([texts, empty]), rtol=0, atol=1e-6)


def test_pictures_are_those_of_the_stock_pipeline(model: Any, folder: Path) -> None:
    """With the solver of the folder, and with this toolkit's own, DDIM."""
    pipe = stock(folder)
    wanted = painted(pipe)
    assert float((drawn(model) - wanted).abs().max()) <= CLOSE
    assert float(wanted.std()) > 0.05
    pipe.scheduler = model.scheduler()
    assert float((drawn(model, None) - painted(pipe)).abs().max()) <= CLOSE


def test_alpha_is_told_the_size(alpha_folder: Path, open_folder: Open) -> None:
    """Its pipeline tells height and width in pixels and their ratio; the picture depends on both
    numbers, in this order."""
    model, seen = open_folder(alpha_folder), []
    model.transformer.adaln_single.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[1]), with_kwargs=True
    )
    wanted = stock(alpha_folder)
    wanted.transformer.adaln_single.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[1]), with_kwargs=True
    )
    own, other = drawn(model), painted(wanted)
    assert float((own - other).abs().max()) <= CLOSE
    assert {tuple(told["resolution"][0].tolist()) for told in seen} == {(32.0, 48.0)}
    assert {float(told["aspect_ratio"][0]) for told in seen} == {float(torch.tensor(32 / 48))}


def test_merged_stays_of_its_class(
    model: Any, folder: Path, tmp_path: Path, train: Callable[..., list[float]], open_folder: Open
) -> None:
    """Which decides how long prompts are, and is what stock diffusers loads."""
    tree = {"selective": {"sites": "cross", "projections": ["k", "v"]}}
    plan = apply_methods(model, methods_of(tree))
    train(model, plan)
    own, path = dict(model.named_parameters()), tmp_path / "adapter.safetensors"
    header = {"backbone": str(folder), "methods": tree}
    save_adapter(path, {name: own[name] for name in plan.stored}, header, model.identity())
    out = export(path, tmp_path / "merged", say=lambda line: None)
    assert kind_of(out) == kind_of(folder)
    again, pipe = open_folder(out), stock(out)
    assert again.text_length == model.text_length
    pipe.scheduler = model.scheduler()
    wanted = drawn(model, None)
    torch.testing.assert_close(drawn(again, None), wanted, rtol=0, atol=1e-4)
    assert float((painted(pipe) - wanted).abs().max()) <= CLOSE


def test_new_words_take_rows_that_no_token_has(
    model: Any, folder: Path, tmp_path: Path, open_folder: Open
) -> None:
    """T5's table has more rows than its tokenizer has tokens. The word is read by itself, and a
    merged pipeline reads it as trained."""
    tokens, table = len(model.tokenizer), model.text_encoder.get_input_embeddings()
    assert table.num_embeddings == tokens + UNUSED
    tree = {"new_token": {"tokens": ["<v1>"]}}
    apply_methods(model, methods_of(tree))
    own, (name,) = dict(model.named_parameters()), [
        each for each, _ in model.named_parameters() if "rows" in each
    ]  # fmt: skip
    with torch.no_grad():
        own[name].fill_(2.0)
    assert model.tokenizer.convert_tokens_to_ids("<v1>") == tokens
    read = model.text_encoder.get_input_embeddings()(model.tokens(["<v1>"]).input_ids)
    assert bool((read[0, 0] == 2.0).all()) and not bool((read[0, 1:] == 2.0).all(-1).any())
    path = tmp_path / "adapter.safetensors"
    header = {"backbone": str(folder), "methods": tree}
    save_adapter(path, {name: own[name]}, header, model.identity())
    out = export(path, tmp_path / "merged", say=lambda line: None)
    prompts = ["a <v1> on a background", "a fox"]
    with torch.no_grad():
        texts, *_ = stock(out).encode_prompt(prompts, clean_caption=False)
        torch.testing.assert_close(model.encode_prompts(prompts).tokens, texts, atol=1e-5, rtol=0)


def _with_sentencepiece_alone(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    (copy / "tokenizer" / "tokenizer.json").unlink()
    (copy / "tokenizer" / "spiece.model").write_bytes(sentencepiece_file())
    return copy


def test_a_tokenizer_of_sentencepiece_alone_needs_the_package(
    alpha_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = _with_sentencepiece_alone(alpha_folder, tmp_path / "copy")
    monkeypatch.setattr("trainer.backbones.folder_check.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"spiece\.model is read by sentencepiece.*\[t5\]"):
        backbone_spec(str(copy))


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is None, reason="not installed")
def test_captions_are_counted_by_check_with_a_tokenizer_of_sentencepiece_alone(
    alpha_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A word behind the 120 tokens that are read would not train; `fit` refuses it too."""
    copy, photos = _with_sentencepiece_alone(alpha_folder, tmp_path / "copy"), tmp_path / "photos"
    photos.mkdir()
    Image.effect_noise((64, 64), 40).convert("RGB").save(photos / "a.png")
    words = [
        "check", "recipe=lora", f"backbone={copy}", f"data.concept={photos}", "run.resolution=64",
        "data.class_word=cat", "data.prior_weight=0", "methods.new_token.init=null",
        "run.steps=9", "optim.warmup=0",
    ]  # fmt: skip
    (photos / "a.txt").write_text("a cat " * 19 + "<v1>")
    assert main(words) == 0
    assert "of 119 that are read" in capsys.readouterr().out
    (photos / "a.txt").write_text("a cat " * 70 + "<v1>")
    assert main(words) != 0
    assert "of which 119 are read, and <v1> is beyond them" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is None, reason="not installed")
def test_a_tokenizer_of_sentencepiece_alone_is_read(
    alpha_folder: Path, tmp_path: Path, open_folder: Open
) -> None:
    copy = _with_sentencepiece_alone(alpha_folder, tmp_path / "copy")
    one, other = (open_folder(each).tokens(PROMPTS) for each in (alpha_folder, copy))
    assert torch.equal(one.input_ids, other.input_ids)


@pytest.mark.parametrize("name", ["pixart_alpha", "pixart_sigma", "sana_600m", "sana_1600m"])
def test_the_backbones_of_the_hub_are_pinned(name: str) -> None:
    spec = backbone_spec(name)
    assert name in backbone_names()
    assert spec.family == name.partition("_")[0]
    assert spec.revision is not None and len(spec.revision) == 40
    words = ["recipe=lora", f"backbone={name}", "data.prior_weight=0"]
    assert load_recipe(words).backbone == spec


def test_a_folder_with_infinite_numbers_is_read(alpha_folder: Path, tmp_path: Path) -> None:
    """As the published scheduler file has one, which is no number of JSON."""
    copy = Path(shutil.copytree(alpha_folder, tmp_path / "copy"))
    file = copy / "scheduler" / "scheduler_config.json"
    edited = json.loads(file.read_text()) | {"lambda_min_clipped": float("-inf")}
    file.write_text(json.dumps(edited))
    assert "-Infinity" in file.read_text()
    assert load_backbone(backbone_spec(str(copy)), str(copy)).target == "eps"
