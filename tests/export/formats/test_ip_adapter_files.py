"""`format=ip_adapter`: files that `load_ip_adapter` of diffusers reads to the same picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from trainer.backbones import load_backbone
from trainer.config.lineage import backbone_spec
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.export.export import export
from trainer.export.formats.ip_adapter import EXTRACTOR, FILE
from trainer.media.images import to_pil, to_tensor
from trainer.runs.adapter import load_adapted

FORMS: dict[str, dict[str, Any]] = {
    "pooled": {"scales": {"up": 0.5}, "sites": "cross & up | cross & mid"},
    "resampler": {"form": "resampler", "heads": 1, "inner": 16, "count": 3},
}


@pytest.fixture
def reference() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("form", FORMS)
def test_the_stock_pipeline_makes_the_same_picture(
    form: str,
    tiny_folder: Path,
    save_trained_on: Callable[..., Path],
    tmp_path: Path,
    reference: Image.Image,
) -> None:
    adapter = save_trained_on(tiny_folder, {"ip_adapter": FORMS[form]})
    lines: list[str] = []
    export(adapter, tmp_path / "out", "ip_adapter", say=lines.append)
    assert any("read back by diffusers' load_ip_adapter" in line for line in lines)
    assert any("the call in README.md gives a picture" in line for line in lines)
    model, _ = load_adapted(adapter)
    ours = sample(
        model,
        ["a fox"],
        [0],
        settings=Sampling(steps=3, guidance=3),
        inputs={"reference": to_tensor(reference)[None, None]},
    )
    pipe = load_backbone(backbone_spec(str(tiny_folder)), str(tiny_folder)).pipeline()
    out = tmp_path / "out"
    pipe.register_modules(feature_extractor=CLIPImageProcessor.from_pretrained(out / EXTRACTOR))
    pipe.load_ip_adapter(
        str(out), subfolder="", weight_name=FILE, image_encoder_folder="image_encoder"
    )
    pipe.set_progress_bar_config(disable=True)
    side = model.resolution // model.divisor
    shape = (1, model.latent_channels, side, side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    theirs = pipe(
        "a fox",
        ip_adapter_image=reference,
        latents=noise,
        num_inference_steps=3,
        guidance_scale=3.0,
    ).images[0]
    own = np.asarray(to_pil(ours[0])).astype(int)
    assert np.abs(own - np.asarray(theirs).astype(int)).max() <= 2


def test_sites_that_read_no_picture_have_no_values(
    tiny_folder: Path, save_trained_on: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = save_trained_on(tiny_folder, {"ip_adapter": FORMS["pooled"]})
    export(adapter, tmp_path / "out", "ip_adapter", say=lambda line: None)
    found = load_file(tmp_path / "out" / FILE)
    assert not found["ip_adapter.1.to_v_ip.weight"].any()  # of the first down block
    image = found["image_proj.proj.weight"]
    assert image.shape == (4 * 128, 128)


@pytest.mark.parametrize(
    ("methods", "name", "why"),
    [
        ({"ip_adapter": {"count": 5}}, "ip_adapter", "every reader assumes 4"),
        (
            {"ip_adapter": {**FORMS["resampler"], "depth": 2}},
            "ip_adapter",
            "2 blocks: every reader assumes 4",
        ),
        ({"ip_adapter": {}, "lora": {"rank": 2}}, "ip_adapter", "beside the IP-Adapter"),
        ({"lora": {"rank": 2}}, "ip_adapter", "is for methods.ip_adapter, which is not here"),
        ({"ip_adapter": {}}, "diffusers", "format=ip_adapter carries it"),
    ],
)
def test_what_a_format_cannot_carry_is_refused(
    methods: dict[str, Any],
    name: str,
    why: str,
    tiny_folder: Path,
    save_trained_on: Callable[..., Path],
    tmp_path: Path,
) -> None:
    adapter = save_trained_on(tiny_folder, methods)
    with pytest.raises(ValueError, match=why):
        export(adapter, tmp_path / "out", name, say=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_transformer_has_no_such_files(
    dit_folder: Path, save_trained_on: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = save_trained_on(dit_folder, {"ip_adapter": {}})
    with pytest.raises(ValueError, match=r"is for U-Nets: no tool reads such files"):
        export(adapter, tmp_path / "out", "ip_adapter", say=lambda line: None)
