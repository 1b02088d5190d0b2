"""Layers through time with other methods, on clips: adapters, 4 bits and kernels on spatial and
temporal sites, on both kinds of denoiser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.backbones.four_bits import is_packed
from trainer.config.load import methods_of
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_adapted, save_adapter

OWN: dict[str, dict[str, Any]] = {
    name: {"heads": 2}
    for name in ("animatediff", "vdm", "make_a_video", "imagen_video", "gen1", "magicvideo")
}
# what a form is to go with; projections without `out`, whose rows are zero in most
SITES = "temporal | cross"
STACKS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"sites": SITES, "rank": 2}},
    "dora": {"dora": {"sites": SITES, "rank": 2, "projections": ["q", "k", "v"]}},
    "nf4+lora": {"nf4": {"min_size": 256}, "lora": {"sites": SITES, "rank": 2}},
    "linear": {"linear_attention": {"sites": "temporal | self", "distill": 1.0}},
    "gated": {"gated_linear": {"sites": "temporal | self", "rank": 2, "scans": 2}},
    "agents": {"agent_attention": {"sites": "temporal | self", "side": 2}},
}
# a linear kernel has no place for the distances or the mask of these
MASKED = ("vdm", "imagen_video", "magicvideo")


@pytest.fixture(params=["unet", "dit"])
def denoiser(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def tiny_folder(denoiser: str, tiny_folder: Path, dit_folder: Path) -> Path:
    return tiny_folder if denoiser == "unet" else dit_folder


def painted(backbone: Any) -> Tensor:
    return sample(
        backbone, ["a fox moving left"], [3], settings=Sampling(steps=2, guidance=3, frames=2)
    )


@pytest.mark.sampled(10)
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("form", OWN)
def test_it_goes_with(
    form: str,
    stack: str,
    tiny: Any,
    tiny_folder: Path,
    tmp_path: Path,
    train: Callable[..., list[float]],
) -> None:
    tree = {form: OWN[form], **STACKS[stack]}
    if form in MASKED and stack in ("linear", "gated", "agents"):
        other = next(iter(STACKS[stack]))
        with pytest.raises(ValueError) as error:
            apply_methods(tiny, methods_of(tree))
        assert f"methods.{form}" in str(error.value)
        assert f"methods.{other}" in str(error.value)
        return
    plan = apply_methods(tiny, methods_of(tree))
    for name in STACKS[stack]:
        if name != "nf4":
            kinds = {s.kind for s in tiny.sites if s.name in plan.edits[name].sites}
            assert "temporal" in kinds and len(kinds) == 2
    for edit in plan.edits.values():
        assert set(edit.trains) <= {path for path, _ in edit.claims}
    before = {name: value.detach().clone() for name, value in tiny.named_parameters()}
    losses = train(tiny, plan, frames=2)
    assert all(torch.isfinite(torch.tensor(losses)))
    after = dict(tiny.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == set(plan.names)
    tiny.requires_grad_(False)  # a LoRA rounds otherwise over a weight that trains
    trained = painted(tiny)
    tensors = {name: after[name] for name in plan.stored}
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, tensors, {"backbone": str(tiny_folder), "methods": tree}, tiny.identity())
    assert torch.equal(painted(load_adapted(path)[0]), trained)


def test_what_trains_stays_out_of_4_bits(tiny: Any) -> None:
    tree = {"animatediff": {"heads": 2}, "nf4": {"min_size": 256}}
    plan = apply_methods(tiny, methods_of(tree))
    packed = [name for name, layer in tiny.named_modules() if is_packed(layer)]
    assert packed and not any("motion_modules" in name for name in packed)
    assert set(plan.names) == set(plan.edits["animatediff"].trains)


def test_a_trained_layer_keeps_its_place_in_the_plan_when_an_adapter_wraps_it(tiny: Any) -> None:
    tree = {"vdm": {"heads": 2}, "lora": {"sites": "temporal", "rank": 2}}
    plan = apply_methods(tiny, methods_of(tree))
    wrapped = [name for name in plan.edits["vdm"].trains if ".base_layer." in name]
    assert wrapped and set(wrapped) <= set(plan.names)
    tree["selective"] = {"sites": "temporal", "projections": ["q"]}
    with pytest.raises(ValueError, match=r"vdm and methods\.selective both claim weight"):
        apply_methods(_fresh(tiny), methods_of(tree))


def _fresh(backbone: Any) -> Any:
    from trainer.backbones import load_backbone
    from trainer.config.lineage import backbone_spec

    return load_backbone(backbone_spec(str(backbone.folder)), str(backbone.folder))


def test_two_forms_at_one_place_are_refused_by_name(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"methods\.vdm and methods\.animatediff both claim what"):
        apply_methods(tiny, methods_of({"vdm": {"heads": 2}, "animatediff": {"heads": 2}}))


def test_dora_of_rows_of_zeros_is_refused(tiny: Any) -> None:
    tree = {"vdm": {"heads": 2}, "dora": {"sites": "temporal", "rank": 2}}
    with pytest.raises(ValueError, match=r"methods\.dora: .*to_out\.0 holds rows of zeros"):
        apply_methods(tiny, methods_of(tree))


def test_layers_of_an_adapter_of_ours_are_read_and_go_on(
    tiny: Any, tiny_folder: Path, tmp_path: Path, open_folder: Callable[[Path], Any],
    randomise: Callable[..., None], save: Callable[..., Any],
) -> None:  # fmt: skip
    """Beside a domain adapter, which stays behind."""
    tree = {"vdm": {"heads": 2}, "lora": {"sites": "cross", "rank": 2}}
    plan = apply_methods(tiny, methods_of(tree))
    randomise(tiny, plan, 0.2)
    save(tmp_path / "adapter.safetensors", tiny, plan)
    other = open_folder(tiny_folder)
    again = apply_methods(other, methods_of({"vdm": {"heads": 2, "weights": str(tmp_path)}}))
    own, read = dict(tiny.named_parameters()), dict(other.named_parameters())
    assert set(again.names) == set(plan.edits["vdm"].trains)
    assert all(torch.equal(read[name], own[name]) for name in again.names)
