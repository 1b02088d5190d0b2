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
from chat_folders import flux2_pipeline
from diffusers import Flux2KleinPipeline
from edited import edit
from flow_folders import make_flow_folder

from trainer.backbones import load_backbone
from trainer.backbones.families import family_of
from trainer.backbones.prompt_tokens import prompt_reader
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
    checks.check_folder_facts(model, case.folder)


@torch.no_grad()
def test_prompts_are_those_of_the_stock_pipeline(model: Any, case: checks.Case) -> None:
    text, _ = case.stock().encode_prompt(checks.PROMPTS)
    own = model.encode_prompts(checks.PROMPTS)
    torch.testing.assert_close(own.tokens, text, rtol=0, atol=1e-6)
    assert float((own.tokens[0] - own.tokens[1]).abs().max()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["a fox left of an owl", "left, a fox " * 90])
def test_a_word_is_where_the_stock_pipeline_feeds_it(
    prompt: str, model: Any, case: checks.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens that its text encoder gets, those of the template and padding too, of a prompt
    that is read whole and of one that is cut."""
    pipe, fed = case.stock(), []
    forward = pipe.text_encoder.forward

    def noting(**given: Any) -> Any:
        fed.append(given["input_ids"])
        return forward(**given)

    monkeypatch.setattr(pipe.text_encoder, "forward", noting)
    pipe.encode_prompt([prompt])
    row = fed[0][0].tolist()
    assert model.prompts.tokens([prompt]).input_ids.tolist() == [row]
    ids = {form: model.tokenizer(form).input_ids for form in ("left", " left", "user")}
    assert all(len(own) == 1 for own in ids.values())
    wanted = [i for i, token in enumerate(row) if [token] in (ids["left"], ids[" left"])]
    assert model.prompts.places(prompt, "left") == wanted
    assert min(wanted) > row.index(ids["user"][0]) == 1, "the template comes before the prompt"


def test_a_prompt_is_counted_with_its_template(model: Any, case: checks.Case) -> None:
    """As many tokens are read of a prompt as the template leaves, with and without torch."""
    chunk = model.prompts.reader.chunk
    row = model.prompts.tokens(["left " * 600]).input_ids[0]
    left = model.tokenizer(" left").input_ids[0]
    before = len(model.tokenizer("<|im_start|>user\n").input_ids)
    assert int((row == left).sum()) == 512 - before - 1  # whose first word is another token
    after = len(
        model.tokenizer("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n").input_ids
    )
    assert chunk == 512 - before - after
    reader = prompt_reader(backbone_spec(str(case.folder)))
    assert reader is not None and reader.chunk == chunk


def test_another_chat_template_is_refused(case: checks.Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(case.folder, tmp_path / "copy"))
    template = folder / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<think>", ""))
    with pytest.raises(ValueError, match=r"the chat template of its tokenizer gives .*</think>"):
        load_backbone(backbone_spec(str(folder)), "mine")


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
