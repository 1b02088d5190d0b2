"""The family of Stable Diffusion 3 against stock diffusers, with T5 and without; what trains and
is read back; what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flow_checks as checks
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from edited import edit
from flow_folders import make_flow_folder, sd3_pipeline

from trainer.backbones import load_backbone
from trainer.backbones.families import family_of
from trainer.config.lineage import backbone_spec
from trainer.config.load import methods_of
from trainer.methods.apply import apply_methods

Open = Callable[[Path], Any]
WITHOUT = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> checks.Case:
    folder = make_flow_folder(tmp_path_factory.mktemp("sd3") / "sd3", sd3_pipeline)
    return checks.Case(folder, StableDiffusion3Pipeline, channels=4, grid=(16, 24))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> checks.Case:
    """The same without T5."""
    folder = make_flow_folder(tmp_path_factory.mktemp("sd3") / "bare", sd3_pipeline, t5=False)
    return checks.Case(folder, StableDiffusion3Pipeline, 4, grid=(16, 24), given=WITHOUT)


@pytest.fixture
def model(case: checks.Case, open_folder: Open) -> Any:
    return open_folder(case.folder)


def test_a_folder_says_its_family(model: Any, case: checks.Case) -> None:
    assert family_of(case.folder) == model.family == "sd3"
    assert list(model.text_encoders) == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert model.text_shapes == {"tokens": (32 + 256, 40), "pooled": (24,)}
    assert (model.resolution, model.divisor, model.multiple) == (32, 2, 4)
    checks.check_folder_facts(model, case.folder)
    kinds = {site.name.partition(".")[2]: site.kind for site in model.sites}
    assert kinds == {"0.attn": "joint", "0.attn2": "self", "1.attn": "joint"}


@torch.no_grad()
@pytest.mark.parametrize("which", ["case", "bare"])
def test_prompts_and_pictures_are_those_of_the_stock_pipeline(
    which: str, open_folder: Open, request: pytest.FixtureRequest
) -> None:
    case = request.getfixturevalue(which)
    model, pipe = open_folder(case.folder), case.stock()
    text, empty, pooled, nothing = pipe.encode_prompt(checks.PROMPTS, None, None)
    own = model.encode_prompts([*checks.PROMPTS, "", ""])
    torch.testing.assert_close(own.tokens, torch.cat([text, empty]), rtol=0, atol=1e-6)
    torch.testing.assert_close(own.pooled, torch.cat([pooled, nothing]), rtol=0, atol=1e-6)
    assert bool(own.tokens[:, 32:].any()) == (which == "case")
    wanted = case.painted(pipe, guidance_scale=4.0, negative_prompt=["a tree"] * 2)
    assert checks.close(checks.drawn(model, guidance=4.0, negative="a tree"), wanted)


def test_other_sizes_shift_as_the_stock_pipeline_shifts(case: checks.Case, tmp_path: Path) -> None:
    """With a scheduler whose shift depends on the size."""
    folder = Path(shutil.copytree(case.folder, tmp_path / "copy"))
    edit(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    own = load_backbone(backbone_spec(str(folder)), str(folder)).eval()
    other = checks.Case(folder, StableDiffusion3Pipeline, channels=4, grid=(16, 24))
    wanted = other.painted(other.stock(), guidance_scale=1.0)
    assert checks.close(checks.drawn(own, guidance=1.0), wanted)
    fixed = case.painted(case.stock(), guidance_scale=1.0)
    assert float((fixed - wanted).abs().max()) > checks.CLOSE


@torch.no_grad()
def test_a_prediction_is_the_call_of_the_stock_network(model: Any, case: checks.Case) -> None:
    pipe, x_t, t = case.stock(), checks.noise(4, 16, 24), torch.tensor([3.0, 700.5])
    text, _, pooled, _ = pipe.encode_prompt(checks.PROMPTS, None, None)
    wanted = pipe.transformer(x_t, text, pooled, t).sample
    own = model.predict(x_t, t, model.encode_prompts(checks.PROMPTS))
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5)


def test_the_loss_is_that_of_a_flow(model: Any) -> None:
    checks.check_loss(model)


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"sites": "all", "rank": 2, "text_encoder": ["q", "v"]}},
    "text keys": {"selective": {}},
}


@pytest.mark.parametrize("name", METHODS)
def test_what_trains_is_saved_and_read_again(
    name: str, model: Any, case: checks.Case, tmp_path: Path
) -> None:
    checks.check_saved(model, case, METHODS[name], tmp_path / "a.safetensors")


@pytest.mark.parametrize("written", ["diffusers", "peft"])
def test_a_stock_pipeline_paints_with_the_adapter(
    written: str, model: Any, case: checks.Case, tmp_path: Path
) -> None:
    out = checks.check_export(model, case, written, tmp_path)
    pipe, base = case.stock(), case.stock()
    if written == "diffusers":
        pipe.load_lora_weights(out)
    else:
        from peft import PeftModel

        pipe.transformer = PeftModel.from_pretrained(pipe.transformer, out / "transformer")
    wanted = case.painted(pipe, guidance_scale=1.0)
    assert checks.close(checks.drawn(model.eval(), guidance=1.0), wanted)
    assert float((wanted - case.painted(base, guidance_scale=1.0)).abs().max()) > 2 * checks.CLOSE


def test_the_call_of_an_export_names_what_the_folder_lacks(
    bare: checks.Case, open_folder: Open, tmp_path: Path
) -> None:
    out = checks.check_export(open_folder(bare.folder), bare, "diffusers", tmp_path)
    text = (out / "README.md").read_text()
    assert "text_encoder_3=None, tokenizer_3=None" in text and "max_sequence_length=256" in text


def test_the_memory_of_a_step_is_estimated(model: Any, case: checks.Case) -> None:
    checks.check_plan(model, case)


def test_keys_of_the_image_are_refused_by_name(model: Any) -> None:
    tree = {"selective": {"sites": "joint", "projections": ["k", "v"]}}
    with pytest.raises(ValueError, match=r"selective: k, v of .*read the image.*add_k,add_v"):
        apply_methods(model, methods_of(tree))


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "family": ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline; this"),
    "clip": ("model_index.json", {"text_encoder_2": [None, None]}, "names no text_encoder_2"),
    "t5": (
        "model_index.json",
        {"text_encoder_3": ["transformers", "GemmaModel"]},
        "text_encoder_3 is a GemmaModel of transformers; this family has T5EncoderModel",
    ),
    "scheduler": (
        "scheduler/scheduler_config.json",
        {"_class_name": "DDIMScheduler"},
        "scheduler is a DDIMScheduler of prediction_type=epsilon; this family was trained on a",
    ),
    "channels": (
        "transformer/config.json", {"in_channels": 9}, "a mask and the masked picture beside",
    ),
    "width": ("text_encoder_3/config.json", {"d_model": 48}, "reads text of width 40.*then 48"),
    "pooled": ("text_encoder/config.json", {"projection_dim": 16}, "is told 24 values.*give 28"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_spoiled_folder_is_refused(name: str, case: checks.Case, tmp_path: Path) -> None:
    checks.check_spoiled(case, "sd3", BAD[name], tmp_path / "copy")


@pytest.mark.parametrize("name", ["sd3", "sd35_medium", "sd35_large"])
def test_the_backbones_of_the_hub_are_pinned(name: str) -> None:
    spec = backbone_spec(name)
    assert spec.family == "sd3" and str(spec.hub).startswith("stabilityai/stable-diffusion-3")
    assert len(str(spec.revision)) == 40


def test_text_lies_where_it_is_declared(model: Any) -> None:
    checks.text_lies_where_declared(model)
