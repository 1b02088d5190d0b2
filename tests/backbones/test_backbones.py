"""The Stable Diffusion loader: what it refuses, what a scheduler of another class means to it."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edited import edit
from safetensors.torch import load_file, save_file

from trainer.backbones import load_backbone
from trainer.backbones.spec import BackboneSpec
from trainer.config.lineage import backbone_spec
from trainer.config.schema import RecipeError

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
# as runwayml/stable-diffusion-v1-5 has it
PNDM = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def open_anyhow(folder: Path) -> Any:
    return load_backbone(BackboneSpec(folder=str(folder)), "mine")


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / UNET_FILE), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / UNET_FILE).unlink()


def _lacking(folder: Path) -> None:
    tensors = load_file(folder / UNET_FILE)
    del tensors["conv_in.bias"]
    save_file(tensors, folder / UNET_FILE)


def _text_lacking(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if name.endswith("final_layer_norm.bias"))]
    save_file(tensors, path, {"format": "pt"})


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "other-pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        "is a StableDiffusionXLPipeline; this family loads StableDiffusionPipeline",
    ),
    "no-unet": (lambda f: shutil.rmtree(f / "unet"), r"unet: config\.json is missing"),
    "no-vae": (lambda f: shutil.rmtree(f / "vae"), r"vae: config\.json is missing"),
    "no-text": (
        lambda f: shutil.rmtree(f / "text_encoder"),
        "text_encoder: config.json is missing",
    ),
    "no-tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer: tokenizer_config.json"),
    "no-scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler: scheduler_config.json"),
    "no-weights": (lambda f: (f / UNET_FILE).unlink(), "unet: no safetensors file;"),
    "pickled": (_pickled, r"found diffusion_pytorch_model\.bin; pickles are never loaded"),
    "lacking": (_lacking, r"unet: the weights lack conv_in\.bias, 1 in all"),
    "text-lacking": (_text_lacking, r"text_encoder: the weights lack .*final_layer_norm\.bias"),
    "prediction": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", prediction_type="flow"),
        "prediction_type is 'flow'; this family has epsilon, v_prediction, sample",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_folder_is_refused(case: str, copy: Path) -> None:
    spoil, message = SPOILED[case]
    spoil(copy)
    with pytest.raises(ValueError, match=message):
        open_anyhow(copy)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_truncated_weights_are_no_traceback(
    part: str, copy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from trainer.__main__ import main

    (weights,) = (copy / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    words = ["sample", f"backbone={copy}", "prompt=a fox", f"out={tmp_path / 'out'}"]
    assert main(words) not in (0, None)
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert str(copy / part) in shown


def test_a_missing_backbone_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean tiny"):
        backbone_spec("tny")
    with pytest.raises(RecipeError, match=r"the folder has no model_index\.json"):
        backbone_spec(str(tmp_path))
    with pytest.raises(ValueError, match="no family is called 'nothing'"):
        load_backbone(BackboneSpec(family="nothing", folder="tiny"), "mine")


def test_a_hub_checkpoint_offline_says_what_to_do() -> None:
    spec = BackboneSpec(hub="nobody/nothing", revision="0" * 40)
    with pytest.raises(
        ValueError, match=r"nobody/nothing could not be fetched .*backbone=<folder>"
    ):
        load_backbone(spec, "nothing")


def test_a_hub_checkpoint_is_pinned() -> None:
    with pytest.raises(ValueError, match="needs revision"):
        BackboneSpec(hub="nobody/nothing")
    with pytest.raises(ValueError, match="either folder or hub"):
        BackboneSpec()


def test_scratch_parts_start_anew(copy: Path) -> None:
    (copy / UNET_FILE).unlink()
    spec = BackboneSpec(folder=str(copy), scratch=("unet",))
    torch.manual_seed(1)
    first = load_backbone(spec, "mine").unet.conv_in.weight
    torch.manual_seed(2)
    second = load_backbone(spec, "mine").unet.conv_in.weight
    assert torch.isfinite(first).all()
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "left_out", [(), ("clip_sample", "set_alpha_to_one")], ids=["sd15", "bare"]
)
def test_a_pndm_folder_is_sampled_with_ddim(
    left_out: tuple[str, ...],
    copy: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What PNDM leaves unsaid is PNDM's, not DDIM's own default: it never clips latents."""
    from diffusers import DDIMScheduler, PNDMScheduler

    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({k: v for k, v in PNDM.items() if k not in left_out}))
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    loaded = open_anyhow(copy)
    scheduler = loaded.scheduler()
    assert isinstance(scheduler, DDIMScheduler)
    assert loaded.target == "eps"
    assert scheduler.config.clip_sample is False
    assert scheduler.config.set_alpha_to_one is False
    assert scheduler.config.steps_offset == 1
    assert caplog.text == ""  # no talk of ignored keys
    reference = PNDMScheduler.from_pretrained(path.parent)
    assert torch.equal(loaded.alphas_cumprod, reference.alphas_cumprod)
    assert torch.equal(scheduler.final_alpha_cumprod, reference.final_alpha_cumprod)


def test_the_shipped_scheduler_is_kept(tiny: Any, tiny_folder: Path) -> None:
    from diffusers import DDIMScheduler

    stock, own = DDIMScheduler.from_pretrained(tiny_folder / "scheduler"), tiny.scheduler()
    for name in inspect.signature(DDIMScheduler.__init__).parameters:
        assert own.config.get(name) == stock.config.get(name), name
    assert tiny.target == "v"


def test_parts_load_in_fp32_and_names_start_with_the_part(tiny: Any) -> None:
    assert {value.dtype for value in tiny.parameters()} == {torch.float32}
    parts = {name.split(".")[0] for name, _ in tiny.named_parameters()}
    assert parts == {"unet", "text_encoder", "vae"}


def test_latents_go_there_and_back(tiny: Any, photos: Any) -> None:
    """Through the shipped VAE a scene comes back as itself; the posterior's mean is at noise 0."""
    pixels = photos.image(0)[None]
    moments = tiny.moments(pixels)
    latents = tiny.latents(moments, torch.zeros(1, 8, 8, 8))
    mean = tiny.vae.encode(pixels).latent_dist.mode() * tiny.vae.config.scaling_factor
    torch.testing.assert_close(latents, mean)
    assert float((tiny.decode(latents) - pixels).abs().mean()) < 0.25


def test_identity_is_of_the_shapes_before_any_edit(
    tiny: Any, open_folder: Any, other_folder: Any
) -> None:
    from trainer.methods.apply import apply_methods
    from trainer.methods.weight.new_token import NewToken

    before = tiny.identity()
    apply_methods(tiny, {"new_token": NewToken()})
    other = open_folder(other_folder).identity()
    assert tiny.identity() == before
    assert other["unet"] != before["unet"]
    assert other["text_encoder"] == before["text_encoder"]


def test_a_fingerprint_changes_with_any_weight(tiny: Any) -> None:
    whole, vae = tiny.fingerprint(), tiny.vae_fingerprint()
    with torch.no_grad():
        tiny.unet.conv_in.bias[0] += 1e-3
    assert tiny.vae_fingerprint() == vae
    assert tiny.fingerprint() != whole


@pytest.mark.slow
def test_compiled_blocks_give_the_same_output(
    dit_folder: Path, open_folder: Callable[[Path], Any]
) -> None:
    """Every block is compiled, the two of a transformer; those of a U-Net take a minute."""
    model = open_folder(dit_folder)
    x_t, t = torch.randn(2, 8, 8, 8), torch.tensor([10, 900])
    text = model.encode_prompts(["a fox", ""])
    with torch.no_grad():
        plain = model.predict(x_t, t, text)
        model.compile_blocks()
        compiled = model.predict(x_t, t, text)
    assert all(block._compiled_call_impl is not None for block in model.blocks())
    assert torch.allclose(plain, compiled, atol=1e-4)
    assert not torch.equal(plain, compiled)  # computed in another order


def test_no_block_of_a_unet_is_left_uncompiled(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks share functions, each with more shapes than torch compiles one for by default."""
    from torch._dynamo import config as dynamo

    plain = torch.nn.Module.compile  # traced as by inductor, without its minutes of C++
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: plain(self, backend="eager", **kw)
    )
    assert len(tiny.sites) == 14
    text = tiny.encode_prompts(["a fox"])
    with dynamo.patch(recompile_limit=dynamo.recompile_limit, fail_on_recompile_limit_hit=True):
        tiny.compile_blocks()
        tiny.predict(torch.randn(1, 8, 16, 16), torch.tensor([10]), text).mean().backward()
