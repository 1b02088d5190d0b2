"""What families declare: read without torch, and true of a denoiser of the family."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from denoisers import BACKBONES, FAMILIES, traits_of
from torch import nn

from trainer.attention.anatomy import input_convolution, time_point
from trainer.attention.denoiser_traits import PLAIN, UNDECLARED
from trainer.attention.host import Host
from trainer.attention.sites import scan
from trainer.backbones.families import family_names, family_of, find_family

# in files of their own
ALONE = "chroma cogvideox flux1 flux2 ltx pixel_unet qwen_image sd3 sdxl wan z_image"
DECLARED = [name for name in BACKBONES if name != "dit"]


def test_every_family_is_known_without_torch() -> None:
    code = (
        "import sys; from trainer.backbones import family_names, find_family\n"
        "print(tuple(name for name in family_names() if find_family(name).pipelines))\n"
        "print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert printed.stdout.split("\n")[:2] == [str(family_names()), "set()"]
    assert {*FAMILIES.values(), *ALONE.split()} == set(family_names())


@pytest.mark.parametrize(
    ("pipeline", "family"),
    [
        ("StableDiffusionPipeline", "sd"),
        ("PixArtAlphaPipeline", "pixart"),
        ("PixArtSigmaPipeline", "pixart"),
        ("SanaPipeline", "sana"),
        ("DiTPipeline", "dit"),
        ("StableDiffusionXLPipeline", "sdxl"),
        ("StableDiffusion3Pipeline", "sd3"),
        ("FluxPipeline", "flux1"),
        ("ChromaPipeline", "chroma"),
        ("Flux2KleinPipeline", "flux2"),
        ("WanPipeline", "wan"),
        ("CogVideoXPipeline", "cogvideox"),
        ("LTXPipeline", "ltx"),
        ("QwenImagePipeline", "qwen_image"),
        ("ZImagePipeline", "z_image"),
        ("KolorsPipeline", "sd"),
    ],
)
def test_a_folder_belongs_to_the_family_that_loads_it(
    pipeline: str, family: str, tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{pipeline}"}}')
    assert family_of(tmp_path) == family


def test_no_pipeline_has_two_families() -> None:
    pipelines = [name for family in family_names() for name in find_family(family).pipelines]
    assert len(pipelines) == len(set(pipelines))


@pytest.mark.parametrize("name", DECLARED)
def test_what_is_declared_is_there(name: str) -> None:
    model: Any = BACKBONES[name][0]()
    family = find_family(FAMILIES[type(model).__name__])
    point, first = input_convolution(model, family.traits)
    assert model.get_submodule(point.after) is first
    assert first.in_channels == model.config.in_channels
    time = time_point(model, family.traits)
    seen: list[tuple[int, ...]] = []
    hook = lambda module, args, output: seen.append(output.shape)  # noqa: E731
    model.get_submodule(time.after).register_forward_hook(hook)
    BACKBONES[name][1](model)
    assert [shape[-1] for shape in seen] == [time.width]
    assert all(model.get_submodule(block) is not None for block in family.blocks)
    assert family.traits.layout == "rows"


def test_only_what_a_family_declares_is_hosted() -> None:
    model = BACKBONES["sana"][0]()
    declared = {site.native.linear for site in scan(model, traits_of(model))}
    assert declared == {True, False}
    assert {site.native for site in scan(model)} == {PLAIN}
    # its linear layers are not; the others are by their call of attention
    others = {site.name for site in scan(model, traits_of(model)) if not site.native.linear}
    assert set(Host.attach(model).processors) == others
    host = Host.attach(model, traits_of(model))
    assert set(host.processors) == {site.name for site in host.sites}
    assert Host.attach(model).traits is host.traits  # those of before stay


def test_a_denoiser_that_declares_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear declares no convolution that reads its input"):
        input_convolution(nn.Linear(2, 2), UNDECLARED)
    with pytest.raises(ValueError, match="no family is called 'nothing'; choose from chroma"):
        find_family("nothing")
