"""The family of FLUX.1 against stock diffusers: packing, guidance as an input, true guidance;
what trains and is read back; schnell, which samples and is not trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flow_checks as checks
import pytest
import torch
from commands import command
from diffusers import FluxPipeline
from flow_folders import flux1_pipeline, make_flow_folder
from PIL import Image

from trainer.backbones.families import family_of
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe, methods_of
from trainer.config.schema import RecipeError
from trainer.diffusion.objective import Objective
from trainer.media.made_by import facts_in
from trainer.methods.apply import apply_methods
from trainer.training.build import needs
from trainer.training.tasks.denoise import Denoise

Open = Callable[[Path], Any]


def pack(x_t: torch.Tensor) -> torch.Tensor:
    rows, channels, height, width = x_t.shape
    packed: torch.Tensor = FluxPipeline._pack_latents(x_t, rows, channels, height, width)
    return packed


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> checks.Case:
    folder = make_flow_folder(tmp_path_factory.mktemp("flux1") / "dev", flux1_pipeline)
    return checks.Case(folder, FluxPipeline, channels=4, grid=(16, 24), pack=pack)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> checks.Case:
    folder = tmp_path_factory.mktemp("flux1") / "schnell"
    make_flow_folder(folder, flux1_pipeline, schnell=True)
    return checks.Case(folder, FluxPipeline, channels=4, grid=(16, 24), pack=pack)


@pytest.fixture
def model(case: checks.Case, open_folder: Open) -> Any:
    return open_folder(case.folder)


def test_a_folder_says_its_family(model: Any, case: checks.Case) -> None:
    assert family_of(case.folder) == model.family == "flux1"
    assert model.text_shapes == {"tokens": (512, 40), "pooled": (16,)}
    assert (model.text_length, model.sequence_length) == (512, 512)
    assert (model.resolution, model.divisor, model.multiple) == (256, 2, 4)
    checks.check_folder_facts(model, case.folder)
    assert (model.latent_channels, model.embeds_guidance, model.distilled) == (4, True, None)
    assert {site.kind for site in model.sites} == {"joint"} and len(model.sites) == 4


@torch.no_grad()
def test_prompts_are_those_of_the_stock_pipeline(model: Any, case: checks.Case) -> None:
    text, pooled, _ = case.stock().encode_prompt(checks.PROMPTS)
    own = model.encode_prompts(checks.PROMPTS)
    assert set(own.tensors()) == {"tokens", "pooled"}
    torch.testing.assert_close(own.tokens, text, rtol=0, atol=1e-6)
    torch.testing.assert_close(own.pooled, pooled, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_prediction_is_the_call_of_the_stock_network(model: Any, case: checks.Case) -> None:
    """Trained at a guidance of 1, and told another where a sampler does."""
    pipe, x_t, t = case.stock(), checks.noise(4, 16, 24), torch.tensor([3.0, 700.5])
    text, pooled, text_ids = pipe.encode_prompt(checks.PROMPTS)
    _, places = pipe.prepare_latents(2, 4, 32, 48, torch.float32, "cpu", None, latents=x_t)
    condition = model.encode_prompts(checks.PROMPTS)
    for told in (1.0, 3.5):
        output = pipe.transformer(
            hidden_states=pack(x_t), encoder_hidden_states=text, pooled_projections=pooled,
            timestep=t / 1000, guidance=torch.tensor([told, told]),
            txt_ids=text_ids, img_ids=places,
        ).sample  # fmt: skip
        wanted = pipe._unpack_latents(output, 32, 48, pipe.vae_scale_factor)
        given = None if told == 1 else torch.tensor([told, told])
        own = model.predict(x_t, t, replace(condition, guidance=given))
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("guidance", "true"), [(1.0, 1.0), (3.5, 1.0), (3.5, 2.5)])
def test_pictures_are_those_of_the_stock_pipeline(
    guidance: float, true: float, model: Any, case: checks.Case
) -> None:
    more = {"negative": "a tree"} if true > 1 else {}
    wanted = case.painted(
        case.stock(), guidance_scale=guidance, true_cfg_scale=true, negative_prompt="a tree"
    )
    assert checks.close(checks.drawn(model, guidance=guidance, true_guidance=true, **more), wanted)
    assert more or float((checks.drawn(model, guidance=9.0) - wanted).abs().max()) > checks.CLOSE


def test_schnell_samples_as_the_stock_pipeline(schnell: checks.Case, open_folder: Open) -> None:
    """Without rows for guidance, whatever the settings ask for, and unshifted."""
    model = open_folder(schnell.folder)
    wanted = schnell.painted(schnell.stock(), guidance_scale=3.5)
    assert checks.close(checks.drawn(model, guidance=5.0), wanted)


def test_schnell_is_not_trained(schnell: checks.Case, open_folder: Open) -> None:
    words = ["recipe=lora", "data.prior_weight=0", "run.resolution=32"]
    with pytest.raises(RecipeError, match=r"schnell was distilled to four steps.*flux1_dev"):
        load_recipe([*words, f"backbone={schnell.folder}"])
    recipe = load_recipe([*words, "backbone=flux1_schnell"])  # not on this machine
    with pytest.raises(RecipeError, match="schnell was distilled"):
        needs(recipe, open_folder(schnell.folder))


def test_the_loss_is_that_of_a_flow(model: Any) -> None:
    checks.check_loss(model)


def test_timesteps_are_shifted_as_sampled_where_asked(model: Any) -> None:
    """By what the pipeline shifts by at the size of the batch: 64 tokens."""
    objective = Objective("flow")
    with torch.no_grad():
        plain = Denoise(model, objective).encode(checks.batch_of()).t / 1000
        moved = Denoise(model, objective, as_sampled=True).encode(checks.batch_of()).t / 1000
    slope = (1.15 - 0.5) / (4096 - 256)
    shift = torch.tensor(64 * slope + 0.5 - 256 * slope).exp()
    torch.testing.assert_close(moved, shift * plain / (1 + (shift - 1) * plain))


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"sites": "all", "rank": 2, "text_encoder": ["q", "v"]}},
    "text keys": {"selective": {}},
    "text of single blocks": {"selective": {"sites": "name:single*"}},
}


@pytest.mark.parametrize("name", METHODS)
def test_what_trains_is_saved_and_read_again(
    name: str, model: Any, case: checks.Case, tmp_path: Path
) -> None:
    checks.check_saved(model, case, METHODS[name], tmp_path / "a.safetensors")


def test_a_stock_pipeline_paints_with_the_adapter(
    model: Any, case: checks.Case, tmp_path: Path
) -> None:
    out = checks.check_export(model, case, "diffusers", tmp_path)
    pipe, base = case.stock(), case.stock()
    pipe.load_lora_weights(out)
    wanted = case.painted(pipe, guidance_scale=3.5)
    assert checks.close(checks.drawn(model.eval(), guidance=3.5), wanted)
    assert float((wanted - case.painted(base, guidance_scale=3.5)).abs().max()) > 2 * checks.CLOSE


def test_keys_of_single_blocks_are_refused_by_name(model: Any) -> None:
    tree = {"selective": {"sites": "joint", "projections": ["add_k", "add_v"]}}
    with pytest.raises(ValueError, match=r"selective: single_transformer_blocks.0.attn has no"):
        apply_methods(model, methods_of(tree))


def test_the_memory_of_a_step_is_estimated(model: Any, case: checks.Case) -> None:
    checks.check_plan(model, case)


def test_a_recipe_trains_and_its_adapter_samples(case: checks.Case, tmp_path: Path) -> None:
    """The whole road: fit, a preview, a picture of the finished adapter."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32), (90 * number, 40, 200)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text("a fox")
    words = [
        "fit", "recipe=lora_folder", f"backbone={case.folder}", f"data.folder={photos}",
        "run.steps=2", "run.batch_size=2", "run.resolution=32", "run.id=a", "run.device=cpu",
        "data.buckets=0", "preview.prompts=[a fox]", "preview.every=2", "preview.steps=1",
        "methods.lora.sites=all",
        "objective.shift=sampling", "objective.timesteps=logit_normal",
    ]  # fmt: skip
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (adapter,) = tmp_path.glob("runs/*/a/adapter.safetensors")
    told = ["prompt=a fox", "steps=1", "guidance=3.5", "true_guidance=2", "negative=a cat"]
    made = command("sample", f"adapter={adapter}", *told, "out=pictures", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    (picture,) = (tmp_path / "pictures").glob("*.png")
    facts = facts_in(picture)
    assert (facts["guidance"], facts["true_guidance"]) == (3.5, 2.0)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "kontext": ("model_index.json", {"_class_name": "FluxKontextPipeline"}, "is a FluxKontextPip"),
    "scheduler": (
        "scheduler/scheduler_config.json",
        {"_class_name": "PNDMScheduler"},
        "scheduler is a PNDMScheduler of prediction_type=epsilon; this family was trained on a",
    ),
    "channels": ("transformer/config.json", {"in_channels": 32}, "a picture to edit beside"),
    "t5": ("text_encoder_2/config.json", {"d_model": 48}, "width 40, and its text_encoder_2 gi"),
    "clip": ("text_encoder/config.json", {"hidden_size": 24}, "width 16, and its text_encoder gi"),
    "vae": ("vae/config.json", {"_class_name": "AutoencoderKLWan"}, "vae is a AutoencoderKLWan; "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_spoiled_folder_is_refused(name: str, case: checks.Case, tmp_path: Path) -> None:
    checks.check_spoiled(case, "flux1", BAD[name], tmp_path / "copy")


@pytest.mark.parametrize("name", ["flux1_dev", "flux1_schnell"])
def test_the_backbones_of_the_hub_are_pinned(name: str) -> None:
    spec = backbone_spec(name)
    assert spec.family == "flux1" and str(spec.hub).startswith("black-forest-labs/FLUX.1-")
    assert len(str(spec.revision)) == 40


def test_text_lies_where_it_is_declared(model: Any) -> None:
    checks.text_lies_where_declared(model)


def test_prompts_are_counted_before_loading(model: Any, case: checks.Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(case.folder, tmp_path / "copy"))
    checks.prompts_are_counted_before_loading(model, folder, "tokenizer_2")
