"""The family without a VAE: pixels are the latents, no part of a VAE is asked for, ancestral
sampling is DDPM's, and what needs a pipeline of diffusers is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.backbones import load_backbone
from trainer.backbones.families import find_family
from trainer.backbones.folder_facts import facts_of
from trainer.backbones.part_digests import digests_in_use
from trainer.backbones.pipeline_folder import parts_to_read
from trainer.common.paths import DATA
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.export.export import export
from trainer.runs.adapter import load_adapted
from trainer.training.fit import fit

SMALL = (
    "recipe=ddpm_pixels", "denoiser.width=[16,32]", "denoiser.groups=8", "denoiser.heads=2",
    "denoiser.sample_size=16", "denoiser.self_attention=[8]", "denoiser.cross_attention=[8]",
)  # fmt: skip


def opened(*more: str) -> Any:
    words = {word.partition("=")[0]: word for word in (*SMALL, *more)}
    loaded = load_recipe(list(words.values()))
    return load_backbone(loaded.backbone, loaded.backbone_name).eval()


def test_latents_are_the_pixels() -> None:
    backbone = opened()
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = backbone.moments(pixels)
    assert torch.equal(moments[:, :3], pixels)
    drawn = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(backbone.latents(moments, drawn), pixels, rtol=0, atol=1e-5)
    assert torch.equal(backbone.decode(pixels), pixels)
    assert (backbone.divisor, backbone.resolution, backbone.latent_channels) == (1, 16, 3)
    assert not list(backbone.vae.parameters())


def test_no_part_of_a_vae_is_asked_for() -> None:
    spec = backbone_spec("pixels_scratch")
    assert "vae" not in parts_to_read(spec)
    assert "vae" not in digests_in_use(spec) and "scheduler" in digests_in_use(spec)
    facts = facts_of(spec)
    assert facts is not None and (facts.divisor, facts.side, facts.flow) == (1, 32, False)
    assert find_family("pixel_unet").vae_parts == () and find_family("sd").vae_parts == ("vae",)
    with pytest.raises(RecipeError, match=r"parts.vae: backbone pixels_scratch has no such part"):
        load_recipe([*SMALL, "parts.vae=./tiny"])


def test_a_folder_with_a_unet_of_its_own(tmp_path: Path) -> None:
    """And one whose U-Net is of latents is refused by its channels."""
    backbone = opened()
    folder = tmp_path / "made"
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(DATA / "tiny" / part, folder / part)
    shutil.copytree(DATA / "tiny_pixels", folder, dirs_exist_ok=True)
    backbone.denoiser.save_pretrained(folder / "unet")
    again = load_backbone(backbone_spec(str(folder)), "made").eval()
    assert again.family == "pixel_unet"
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (
            each.predict(x, torch.tensor([9]), each.encode_prompts(["a fox"]))
            for each in (backbone, again)
        )
    assert torch.equal(one, other)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 8}))
    with pytest.raises(RecipeError, match="unet takes 8 channels, and the latents of its VAE"):
        backbone_spec(str(folder))


def test_ancestral_sampling_is_that_of_the_paper() -> None:
    """Algorithm 2 of arXiv 2006.11239 in all of its 1,000 steps would take long: here in 5, with
    alpha_t the ratio of two products of the schedule."""
    backbone, steps = opened(), 5
    own: list[Tensor] = []
    settings = Sampling(steps, 1.0, sampler="ddpm")
    sample(backbone, ["a fox"], [3], settings=settings, on_step=lambda _, x: own.append(x))
    products = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    times, generator = [999, 799, 599, 399, 199], torch.Generator().manual_seed(3)
    x = torch.randn(1, 3, 16, 16, generator=generator)
    for t, before, seen in zip(times, [*times[1:], None], own, strict=True):
        product, lower = products[t], 1.0 if before is None else products[before]
        alpha = product / lower
        with torch.no_grad():
            noise = backbone.predict(x, torch.tensor([t]), backbone.encode_prompts(["a fox"]))
        x0 = ((x - (1 - product).sqrt() * noise) / product.sqrt()).clamp(-1, 1)
        mean = (lower**0.5 * (1 - alpha) * x0 + alpha.sqrt() * (1 - lower) * x) / (1 - product)
        if before is None:
            x = mean
        else:
            variance = (1 - lower) / (1 - product) * (1 - alpha)
            x = mean + variance.sqrt() * torch.randn(1, 3, 16, 16, generator=generator)
        torch.testing.assert_close(x, seen, rtol=1e-4, atol=1e-4)


def test_a_run_is_a_backbone_and_cannot_be_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (
        "run.steps=2", "run.batch_size=2", "data.count=4", "data.validation=0", "preview.every=0",
        "run.id=mine", "tracker=none", "run.validate_every=0", "run.device=cpu",
    )  # fmt: skip
    fit(load_recipe([*SMALL, *words]))
    path = tmp_path / "runs" / "ddpm_pixels" / "mine" / "adapter.safetensors"
    adapted, _ = load_adapted(path)
    moved = [
        name
        for name, value in adapted.denoiser.named_parameters()
        if not torch.equal(value, opened().denoiser.get_parameter(name))
    ]
    assert "conv_in.weight" in moved and "conv_out.weight" in moved
    later = load_recipe(["recipe=ddpm_pixels", f"backbone={path.parent}", "denoiser=null"])
    assert later.backbone.family == "pixel_unet" and later.backbone.adapters == (str(path),)
    with pytest.raises(ValueError, match="diffusers has no pipeline of the parts of the family"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
