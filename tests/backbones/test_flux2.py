"""The family of FLUX.2 klein against stock diffusers: Qwen3 as text encoder, folded latents under
batch norm, levels by size and steps; the distilled one, which samples and is not trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flow_checks as checks
import pytest
import torch
from diffusers import Flux2KleinPipeline
from edited import edit
from flow_folders import flux2_pipeline, make_flow_folder

from trainer.backbones import load_backbone
from trainer.backbones.families import family_of
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError

Open = Callable[[Path], Any]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> checks.Case:
    folder = make_flow_folder(tmp_path_factory.mktemp("flux2") / "base", flux2_pipeline)
    return checks.Case(folder, Flux2KleinPipeline, channels=16, grid=(8, 12))


@pytest.fixture
def model(case: checks.Case, open_folder: Open) -> Any:
    return open_folder(case.folder)


@pytest.fixture
def distilled(case: checks.Case, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(case.folder, tmp_path / "distilled"))
    edit(folder / "model_index.json", is_distilled=True)
    return folder


def test_a_folder_says_its_family(model: Any, case: checks.Case) -> None:
    assert family_of(case.folder) == model.family == "flux2"
    assert model.text_shapes == {"tokens": (512, 48)}
    assert (model.latent_channels, model.resolution, model.divisor) == (16, 256, 4)
    assert (model.multiple, model.embeds_guidance) == (4, False)


@torch.no_grad()
def test_prompts_are_those_of_the_stock_pipeline(model: Any, case: checks.Case) -> None:
    text, _ = case.stock().encode_prompt(checks.PROMPTS)
    own = model.encode_prompts(checks.PROMPTS)
    torch.testing.assert_close(own.tokens, text, rtol=0, atol=1e-6)
    assert float((own.tokens[0] - own.tokens[1]).abs().max()) > 1e-3


@torch.no_grad()
def test_latents_are_those_the_stock_pipeline_makes_of_a_picture(
    model: Any, case: checks.Case
) -> None:
    """Of the posterior's mean: folded, then normed by the batch norm; and back."""
    pipe, pixels = case.stock(), checks.batch_of().pixels
    wanted = pipe._encode_vae_image(pixels[:1], generator=torch.Generator())
    moments = model.moments(pixels[:1])
    own = model.latents(moments, torch.zeros_like(moments[:, :16]))
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5)
    z = pipe.vae.encode(pixels[:1]).latent_dist.mode()
    picture = pipe.vae.decode(z).sample.clamp(-1, 1)
    torch.testing.assert_close(model.decode(own), picture, rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_those_of_the_stock_pipeline(
    guidance: float, model: Any, case: checks.Case
) -> None:
    wanted = case.painted(case.stock(), guidance_scale=guidance)
    assert checks.close(checks.drawn(model, guidance=guidance), wanted)


def test_the_distilled_one_samples_and_is_not_trained(distilled: Path, case: checks.Case) -> None:
    model = load_backbone(backbone_spec(str(distilled)), str(distilled)).eval()
    pipe = case.stock()
    pipe.register_to_config(is_distilled=True)
    wanted = case.painted(pipe, guidance_scale=4.0)
    assert checks.close(checks.drawn(model, guidance=4.0), wanted)
    words = ["recipe=lora", "data.prior_weight=0", f"backbone={distilled}"]
    with pytest.raises(RecipeError, match=r"klein was distilled to four steps.*flux2_klein"):
        load_recipe([*words, "run.resolution=32"])


def test_the_loss_is_that_of_a_flow(model: Any) -> None:
    checks.check_loss(model)


def test_what_trains_is_saved_and_read_again(model: Any, case: checks.Case, tmp_path: Path) -> None:
    checks.check_saved(model, case, checks.LORA, tmp_path / "a.safetensors")


def test_a_stock_pipeline_paints_with_the_adapter(
    model: Any, case: checks.Case, tmp_path: Path
) -> None:
    out = checks.check_export(model, case, "diffusers", tmp_path)
    pipe = case.stock()
    base = case.painted(pipe, guidance_scale=1.0)
    pipe.load_lora_weights(out)
    wanted = case.painted(pipe, guidance_scale=1.0)
    assert checks.close(checks.drawn(model.eval(), guidance=1.0), wanted)
    assert float((wanted - base).abs().max()) > 2 * checks.CLOSE


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "vae": ("vae/config.json", {"_class_name": "AutoencoderKL"}, "these are known: AutoencoderKLF"),
    "width": ("text_encoder/config.json", {"hidden_size": 32}, "of width 48, and three layers.*96"),
    "layers": ("text_encoder/config.json", {"num_hidden_layers": 20}, "has fewer than 27 layers"),
    "channels": ("transformer/config.json", {"in_channels": 32}, "takes 32 channels"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_spoiled_folder_is_refused(name: str, case: checks.Case, tmp_path: Path) -> None:
    checks.check_spoiled(case, "flux2", BAD[name], tmp_path / "copy")


def test_the_backbone_of_the_hub_is_pinned() -> None:
    spec = backbone_spec("flux2_klein")
    assert (spec.family, spec.hub) == ("flux2", "black-forest-labs/FLUX.2-klein-base-4B")
    assert len(str(spec.revision)) == 40


def test_text_lies_where_it_is_declared(model: Any) -> None:
    checks.text_lies_where_declared(model)


def test_prompts_are_counted_before_loading(model: Any, case: checks.Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(case.folder, tmp_path / "copy"))
    checks.prompts_are_counted_before_loading(model, folder, "tokenizer")
