"""Layers held in a lower precision than they compute in: the outputs of diffusers' own casting, the
gradients of the rounded weights, and nothing kept for the backward but what is held."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_folders import z_image_pipeline
from flow_folders import flux1_pipeline, make_flow_folder
from safetensors.torch import load_file, save_file
from sdxl_folder import make_sdxl_folder
from torch import Tensor, nn

from trainer.backbones.device import Placement, choose_placement, place
from trainer.backbones.held_layers import FP8
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe, methods_of
from trainer.data.source import Generation
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_base
from trainer.training.build import needs
from trainer.training.memory_estimate import memory_of
from trainer.training.step_memory import step_bytes
from trainer.training.without_weights import planned

CPU = torch.device("cpu")
DENOISER = (("denoiser", "fp8"),)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cast")
    return {
        "sdxl": make_sdxl_folder(root / "sdxl"),
        "flux1": make_flow_folder(root / "flux1", flux1_pipeline),
        "z_image": make_flow_folder(root / "z_image", z_image_pipeline),
    }


def opened(folder: Path, biases: bool = True) -> Any:
    """biases: whether they are as stored, or rounded to fp8, as diffusers has them."""
    model = load_base(backbone_spec(str(folder)), "mine")
    for layer in model.denoiser.modules():
        bias = getattr(layer, "bias", None)
        if not biases and isinstance(layer, nn.Linear | nn.Conv2d) and bias is not None:
            bias.data = bias.data.to(FP8).float()
    return model


def predicted(model: Any, grad: bool = False) -> Tensor:
    side = 16
    x = torch.randn(
        2, model.latent_channels, side, side, generator=torch.Generator().manual_seed(0)
    )
    condition = model.encode_prompts(["a fox", "a cat"])
    with torch.set_grad_enabled(grad):
        found: Tensor = model.predict(x, torch.tensor([10, 700]), condition)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["sdxl", "flux1"])
def test_fp8_computes_what_diffusers_does(
    family: str, precision: str, folders: dict[str, Path]
) -> None:
    theirs = place(opened(folders[family], biases=False), Placement(CPU, precision))
    exact = predicted(theirs)
    own = copy.deepcopy(theirs)
    place(own, Placement(CPU, precision, DENOISER))
    compute = torch.float32 if precision == "fp32" else torch.bfloat16
    theirs.denoiser.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=compute)
    wanted, found = predicted(theirs), predicted(own)
    kinds = [each.weight.dtype for each in own.denoiser.modules() if isinstance(each, nn.Linear)]
    assert kinds.count(FP8) > 0.5 * len(kinds)
    assert not torch.equal(found, exact)
    if precision == "fp32":
        assert torch.equal(found, wanted)
    else:  # diffusers casts norms to bf16 as well
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["sdxl", "flux1"])
def test_gradients_are_those_of_the_rounded_weights(
    family: str, checkpointing: bool, folders: dict[str, Path]
) -> None:
    gradients = []
    for cast in (True, False):
        model = opened(folders[family])
        plan = apply_methods(model, methods_of({"lora": {"rank": 2, "init": "gaussian"}}))
        own = dict(model.named_parameters())
        for name in plan.names:  # B is 0 at first, and then A has no gradient
            own[name].data = own[name].data + 0.01
        place(model, Placement(CPU, "fp32", DENOISER), plan.stored)
        if not cast:
            for layer in model.denoiser.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.dtype == FP8:
                    layer.weight.data = layer.weight.data.float()
                    layer.__class__ = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.denoiser.train()
        predicted(model, grad=True).square().mean().backward()
        gradients.append({name: own[name].grad for name in plan.names})
    for name, value in gradients[1].items():
        assert value is not None and value.any()
        torch.testing.assert_close(gradients[0][name], value, rtol=1e-3, atol=1e-7)


def recipe_of(folder: Path, *words: str) -> Any:
    own = ["recipe=lora", "data.concept=sprite:penguin", "data.prior_weight=0", "data.token=sks"]
    own += ["methods.new_token=null", "run.batch_size=1", "run.resolution=32", "run.device=cpu"]
    own += ["run.gradient_checkpointing=false"]
    given = {word.split("=")[0] for word in words}
    own = [word for word in own if word.split("=")[0] not in given]
    return load_recipe([*own, f"backbone={folder}", *words])


def test_a_plan_knows_of_it_and_nothing_more_is_kept(folders: dict[str, Path]) -> None:
    found = []
    for word in ("run.base_precision={}", "run.base_precision.denoiser=fp8"):
        recipe = recipe_of(folders["sdxl"], word, "run.precision=bf16")
        run = recipe.run
        where = choose_placement(run.device, run.precision, parts=run.base_precision)
        backbone, plan = planned(recipe, where)
        found.append((memory_of(recipe, backbone, plan), step_bytes(recipe, backbone, 1)))
    (plain, kept), (cast, less) = found
    assert cast.parts["unet"] < 0.7 * plain.parts["unet"]
    assert cast.parts["text_encoder"] == plain.parts["text_encoder"]
    assert less < 1.1 * kept


def in_halves(folder: Path, copy: Path) -> Path:
    """A copy of a folder, its weights stored in bf16."""
    shutil.copytree(folder, copy)
    for path in copy.rglob("*.safetensors"):
        save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path, {"format": "pt"})
    return copy


@pytest.mark.parametrize("family", ["sdxl", "flux1", "z_image"])
def test_half_precision_for_fp32_is_exact(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Of weights that are stored so: they take half the memory, and not a bit differs."""
    folder = in_halves(folders[family], tmp_path / "half")
    halves = Placement(CPU, "fp32", (("denoiser", "bf16"), ("text_encoders", "bf16")))
    spec = backbone_spec(str(folder))
    found = load_base(spec, "mine", halves, read_held=True)
    kinds = [x.weight.dtype for x in found.denoiser.modules() if isinstance(x, nn.Linear)]
    assert kinds.count(torch.bfloat16) > 0.5 * len(kinds)
    assert found.text_encoder.dtype is not None and found.computes_in == torch.float32
    assert torch.equal(predicted(found), predicted(load_base(spec, "mine")))


@pytest.mark.parametrize("family", ["sdxl", "flux1", "z_image"])
def test_weights_read_in_halves_are_cast_as_those_read_whole(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Layers that are left out of fp8 then compute in fp32 all the same."""
    spec = backbone_spec(str(in_halves(folders[family], tmp_path / "half")))
    where = Placement(CPU, "fp32", DENOISER)
    found = load_base(spec, "mine", where, read_held=True)
    assert torch.equal(predicted(found), predicted(load_base(spec, "mine", where)))


def test_class_images_are_made_of_weights_read_in_halves(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Before the layers are cast: the same pictures as of weights read whole."""
    folder = in_halves(folders["sdxl"], tmp_path / "half")
    recipe = recipe_of(folder, "run.base_precision.denoiser=fp8", "run.precision=fp32")
    found = []
    for read_held in (True, False):
        where = Placement(CPU, "fp32", DENOISER)
        spec = backbone_spec(str(folder))
        model = load_base(spec, "mine", where, hold=False, read_held=read_held)
        how = Generation(steps=1, guidance=2.0, sampler=None)
        found.append(needs(recipe, model).generate(["a fox"], 3, how)[0].tobytes())
        own = {x.weight.dtype for x in model.denoiser.modules() if type(x) is nn.Linear}
        assert own == {torch.bfloat16 if read_held else torch.float32}
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_what_a_class_wants_uncast_stays_exact(dtype: str, folders: dict[str, Path]) -> None:
    model = load_base(backbone_spec(str(folders["z_image"])), "mine")
    exact = copy.deepcopy(model.denoiser.t_embedder)
    place(model, Placement(CPU, "fp32", (("denoiser", dtype),)))
    kept = dict(model.denoiser.t_embedder.named_parameters())
    for name, value in exact.named_parameters():
        assert torch.equal(kept[name], value)
    assert model.denoiser.layers[0].attention.to_q.weight.element_size() < 4


def test_it_is_refused_where_it_cannot_be(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run.base_precision.denoiser=fp8", "methods={full: {}, lora: null}")
    recipe = recipe_of(folders["sdxl"], *words)
    with pytest.raises(ValueError, match=r"denoiser=fp8 is for layers that do not train, and the"):
        planned(recipe, choose_placement("cpu", "fp32", parts=recipe.run.base_precision))
    with pytest.raises(ValueError, match=r"fp8 is for the denoiser; give bf16"):
        recipe_of(folders["sdxl"], "run.base_precision.text_encoders=fp8")
    with pytest.raises(ValueError, match=r"run\.base_precision"):
        recipe_of(folders["sdxl"], "run.base_precision.vae=fp8")
    monkeypatch.setattr("trainer.backbones.device._device", lambda name, rank: torch.device("mps"))
    with pytest.raises(ValueError, match="Apple's GPUs have no fp8; give bf16"):
        choose_placement("mps", parts={"denoiser": "fp8"})
