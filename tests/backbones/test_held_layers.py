"""Weights that are read as they are stored: half the memory, and not a value that differs from one
that was read in fp32 and then rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_folders import flux2_pipeline, qwen_image_pipeline, z_image_pipeline
from flow_folders import flux1_pipeline, make_flow_folder, sd3_pipeline
from pixart_folder import SIGMA, make_pixart_folder
from safetensors.torch import load_file, save_file
from sdxl_folder import make_sdxl_folder
from video_folders import make_video_folder

from trainer.attention.context import StepContext, use
from trainer.backbones.device import Placement, cast_stored, place
from trainer.config.lineage import backbone_spec
from trainer.config.load import methods_of
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_adapted, load_base, save_adapter

BF16 = Placement(torch.device("cpu"), "bf16")
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "sdxl": make_sdxl_folder,
    "pixart": lambda folder: make_pixart_folder(folder, SIGMA),
    "sd3": lambda folder: make_flow_folder(folder, sd3_pipeline),
    "flux1": lambda folder: make_flow_folder(folder, flux1_pipeline),
    "flux2": lambda folder: make_flow_folder(folder, flux2_pipeline),
    "z_image": lambda folder: make_flow_folder(folder, z_image_pipeline),
    "qwen_image": lambda folder: make_flow_folder(folder, qwen_image_pipeline),
    "wan": lambda folder: make_video_folder("wan", folder),
}


def stored_in(folder: Path, dtype: torch.dtype) -> Path:
    """The folder, its weights stored in another precision."""
    for path in folder.rglob("*.safetensors"):
        halves = {
            n: v.to(dtype) if v.is_floating_point() else v for n, v in load_file(path).items()
        }
        save_file(halves, path, {"format": "pt"})
    return folder


def opened(folder: Path, read_held: bool, hold: bool = False) -> Any:
    spec = backbone_spec(str(folder))
    return load_base(spec, "mine", BF16, hold=hold, read_held=read_held)


def values(model: Any) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def differing(one: Any, other: Any) -> list[str]:
    ours, theirs = values(one), values(other)
    assert ours.keys() == theirs.keys()
    return [
        name
        for name, value in ours.items()
        if value.dtype != theirs[name].dtype or not torch.equal(value, theirs[name])
    ]


@pytest.mark.parametrize("family", FOLDERS)
def test_read_as_stored_is_what_holding_makes(family: str, tmp_path: Path) -> None:
    folder = stored_in(FOLDERS[family](tmp_path / family), torch.bfloat16)
    read = opened(folder, read_held=True)
    assert differing(read, opened(folder, read_held=False, hold=True)) == []
    kinds = {value.dtype for value in read.denoiser.parameters()}
    assert kinds == {torch.bfloat16, torch.float32}
    assert {value.dtype for value in read.vae.parameters()} == {torch.float32}


def test_what_is_stored_otherwise_is_read_in_fp32(tmp_path: Path) -> None:
    folder = make_sdxl_folder(tmp_path / "sdxl")
    for read in (opened(folder, True), opened(stored_in(folder, torch.float16), True)):
        assert {value.dtype for value in read.parameters()} == {torch.float32}
    path = next((stored_in(folder, torch.bfloat16) / "unet").glob("*.safetensors"))
    mixed = load_file(path)
    mixed["conv_in.bias"] = mixed["conv_in.bias"].float() + 1e-6
    save_file(mixed, path, {"format": "pt"})
    read = opened(folder, read_held=True)
    assert {value.dtype for value in read.unet.parameters()} == {torch.float32}
    assert read.text_encoder_2.text_projection.weight.dtype == torch.bfloat16


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 2}},
    "pissa": {"lora": {"rank": 2, "init": "pissa"}},
    "dora": {"dora": {"rank": 2}},
    "text": {"lora": {"rank": 2, "text_encoder": ["q", "v"]}, "new_token": {}},
    "selective": {"selective": {}},
    "full": {"full": {}},
    "qlora": {"nf4": {"min_size": 256}, "lora": {"rank": 2}},
    "tlora": {"tlora": {"rank": 2, "init": "weight"}},
}


@pytest.mark.parametrize("methods", METHODS)
def test_methods_begin_at_the_same_values(methods: str, tmp_path: Path) -> None:
    """Whether or not they calculate with weights, and what they put beside them."""
    folder = stored_in(make_sdxl_folder(tmp_path / "sdxl"), torch.bfloat16)
    found = []
    for read_held in (True, False):
        model = opened(folder, read_held)
        plan = apply_methods(model, methods_of(METHODS[methods]), seed=3)
        found.append(place(model, BF16, plan.stored))
        own = dict(model.named_parameters())
        assert {own[name].dtype for name in plan.names} == {torch.float32}
    assert differing(*found) == []


LEAN = Placement(torch.device("cpu"), lean=True)


@torch.no_grad()
def predicted(model: Any) -> torch.Tensor:
    frames = 5 if model.layout == "tokens" else 2
    shape = (model.clip_frames.latent(frames), model.latent_channels, 16, 16)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    condition = model.encode_prompts(["a fox"]).per_frame(len(x))
    context = StepContext(0, 1, torch.full((len(x),), 300), frames=len(x))
    if model.embeds_guidance:
        condition = replace(condition, guidance=torch.full((len(x),), 3.5))
    with use(context):
        found: torch.Tensor = model.predict(x, context.timestep, condition)
    return found


def layer_types(part: Any) -> set[torch.dtype]:
    return {each.weight.dtype for each in part.modules() if isinstance(each, torch.nn.Linear)}


@pytest.mark.parametrize(
    ("family", "dtype"), [*((name, torch.bfloat16) for name in FOLDERS), ("sdxl", torch.float16)]
)
def test_a_model_that_is_only_used_stays_as_it_is_stored(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """It computes in fp32, and not a bit differs from one that was read in fp32."""
    folder = stored_in(FOLDERS[family](tmp_path / family), dtype)
    spec = backbone_spec(str(folder))
    lean, exact = load_base(spec, "mine", LEAN, read_held=True), load_base(spec, "mine")
    assert lean.computes_in == torch.float32
    for part in (lean.denoiser, *lean.text_encoders.values()):
        assert dtype in layer_types(part)
    assert torch.equal(predicted(lean), predicted(exact))
    kept = cast_stored(load_base(spec, "mine", LEAN, hold=False, read_held=True))
    assert kept.fingerprint() == exact.fingerprint()
    assert torch.equal(predicted(kept), predicted(exact))


def test_what_is_stored_in_fp32_is_used_as_ever(tmp_path: Path) -> None:
    spec = backbone_spec(str(make_sdxl_folder(tmp_path / "sdxl")))
    lean, exact = load_base(spec, "mine", LEAN, read_held=True), load_base(spec, "mine")
    assert differing(lean, exact) == []
    assert [type(each) for each in lean.modules()] == [type(each) for each in exact.modules()]


def test_one_half_precision_in_the_place_of_the_other(tmp_path: Path) -> None:
    """Read in fp16, computed in bf16: as of weights that were read in fp32 and rounded."""
    spec = backbone_spec(str(stored_in(make_sdxl_folder(tmp_path / "sdxl"), torch.float16)))
    lean = load_base(spec, "mine", replace(BF16, lean=True), read_held=True)
    assert differing(lean, load_base(spec, "mine", BF16)) == []


@pytest.mark.parametrize("methods", METHODS)
def test_an_adapter_over_weights_as_they_are_stored(methods: str, tmp_path: Path) -> None:
    """What it trained is as exact as in its file."""
    folder = stored_in(make_sdxl_folder(tmp_path / "sdxl"), torch.bfloat16)
    trained = opened(folder, read_held=False)
    plan = apply_methods(trained, methods_of(METHODS[methods]), seed=3)
    own = values(trained)
    for name in plan.names:
        own[name].data = own[name].data + 0.01
    tree = {"backbone": str(folder), "methods": METHODS[methods]}
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, {n: own[n] for n in plan.stored}, tree, identity=trained.identity())
    (lean, _), (exact, _) = load_adapted(path, placement=LEAN), load_adapted(path)
    for name in plan.stored:
        assert torch.equal(values(lean)[name], own[name])
    torch.testing.assert_close(predicted(lean), predicted(exact), rtol=1e-4, atol=1e-5)
    assert torch.bfloat16 in layer_types(lean.text_encoder_2) or methods in (
        "pissa",
        "dora",
        "tlora",
    )
