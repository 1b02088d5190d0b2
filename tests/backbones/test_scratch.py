"""Denoisers made from nothing: what stands where, what they start as, and that an adapter brings
its network back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel, Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from trainer.backbones import load_backbone, pixart, sd
from trainer.backbones.spec import BackboneSpec, TransformerSpec, UNetSpec
from trainer.config.lineage import spec_of
from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError
from trainer.export.export import export
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_adapted, save_adapter
from trainer.training.fit import fit

SMALL = ("denoiser.width=[16,32,32]", "denoiser.groups=8", "denoiser.heads=2")
SMALL_DIT = ("denoiser.width=32", "denoiser.depth=2", "denoiser.heads=4")
PROMPTS = ["a fox on a red background", "an apple left of a cat"]
# self-attention, cross-attention
PLACES: dict[str, tuple[list[Any], list[Any]]] = {
    "none": ([], []),
    "self": ([8], []),
    "cross": ([], [8]),
    "both": ([8], [8]),
    "apart": ([16], [4]),
    "overlapping": ([16, 8], [8, 4]),
    "mid": (["mid"], ["mid"]),
    "mid-apart": ([4], ["mid"]),
    "all-self": ([16, 8, 4, "mid"], []),
    "all": ([16, 8, 4, "mid"], [16, 8, 4, "mid"]),
}
each_place = pytest.mark.parametrize("case", PLACES)


def words(*more: str, name: str = "unet_scratch") -> list[str]:
    """Later words replace earlier ones of the same key."""
    every = (f"recipe={name}", *(SMALL if name == "unet_scratch" else SMALL_DIT), *more)
    return list({word.partition("=")[0]: word for word in every}.values())


def at(case: str) -> tuple[str, str]:
    self_, cross = (str(places).replace("'", "") for places in PLACES[case])
    return f"denoiser.self_attention={self_}", f"denoiser.cross_attention={cross}"


def opened(*more: str, name: str = "unet_scratch") -> Any:
    loaded = load_recipe(words(*more, name=name))
    return load_backbone(loaded.backbone, loaded.backbone_name).eval()


def predicted(backbone: Any, prompts: list[str] = PROMPTS) -> Tensor:
    x_t = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        output: Tensor = backbone.predict(
            x_t, torch.tensor([20, 700]), backbone.encode_prompts(prompts)
        )
    return output


class Passed(nn.Module):
    """In the place of a transformer of a U-Net."""

    def forward(self, hidden_states: Tensor, **rest: Any) -> tuple[Tensor]:
        return (hidden_states,)


class Silent(nn.Module):
    """In the place of an attention layer."""

    def forward(self, hidden_states: Tensor, **rest: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


def replaced(model: nn.Module, kind: Any, other: Callable[[], nn.Module]) -> int:
    names = [name for name, module in model.named_modules() if isinstance(module, kind)]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, other())
    return len(names)


@each_place
def test_attention_stands_where_the_recipe_says(case: str) -> None:
    backbone = opened(*at(case))
    found = {
        (site.kind, "mid" if site.place == "mid" else 16 // (site.divisor or 0))
        for site in backbone.sites
    }
    self_, cross = PLACES[case]
    assert found == {("self", place) for place in self_} | {("cross", place) for place in cross}
    assert {site.heads for site in backbone.sites} <= {2}
    assert torch.isfinite(predicted(backbone)).all()


@pytest.mark.sampled(5)
@each_place
def test_attention_starts_as_nothing(case: str) -> None:
    """To the last bit what the network is without it; and with zero_init=false it is not."""
    backbone, random = opened(*at(case)), opened(*at(case), "denoiser.zero_init=false")
    start, other = predicted(backbone), predicted(random)
    count = replaced(backbone.unet, Transformer2DModel, Passed)
    assert torch.equal(predicted(backbone), start)
    assert start.abs().max() > 1e-3
    assert torch.equal(other, start) == (count == 0)


@pytest.mark.parametrize(
    "case", [case for case, places in PLACES.items() if "mid" not in [*places[0], *places[1]]]
)
def test_all_placements_start_as_the_network_without_attention(case: str) -> None:
    """The layers they share start alike, whatever the process has drawn before."""
    none = opened(*at("none"))
    torch.manual_seed(len(case))
    backbone = opened(*at(case))
    assert torch.equal(predicted(backbone), predicted(none))
    own = backbone.unet.state_dict()
    assert all(torch.equal(own[name], value) for name, value in none.unet.state_dict().items())


def test_no_two_layers_start_alike() -> None:
    """Two layers of one shape that began as one would learn less than two."""
    own = opened(*at("all"), "denoiser.zero_init=false").unet.named_parameters()
    drawn = [(name, value) for name, value in own if value.ndim > 1]
    firsts = {tuple(value.flatten()[:4].tolist()) for _, value in drawn}
    assert len(drawn) > 100
    assert len(firsts) == len(drawn)


def test_both_outputs_of_a_layer_are_zero_weight_and_bias() -> None:
    backbone = opened(*at("all"))
    last = [site.projection("out") for site in backbone.sites]
    last += [m.proj_out for m in backbone.unet.modules() if isinstance(m, Transformer2DModel)]
    assert len(last) == 3 * 10  # 3 levels of 1 + 2 layers, and the middle: self, cross, around
    assert not any(layer.weight.any() or layer.bias.any() for layer in last)
    assert all(site.projection("q").weight.any() for site in backbone.sites)


@pytest.mark.parametrize("name", ["unet_scratch", "dit_scratch"])
def test_it_learns_everywhere(name: str) -> None:
    """What lies behind a zero has its first gradient a step after that has left 0."""
    backbone = opened(*(at("all") if name == "unet_scratch" else ()), name=name)
    x_t, t = torch.randn(2, 8, 16, 16), torch.tensor([10.0, 900.0])
    backbone.text_encoder.requires_grad_(False)
    condition = backbone.encode_prompts(PROMPTS)
    optimizer = torch.optim.SGD(backbone.denoiser.parameters(), 0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (backbone.predict(x_t, t, condition) - x_t).square().mean().backward()
        optimizer.step()
    without = [name for name, p in backbone.denoiser.named_parameters() if not p.grad.any()]
    assert without == []


def test_the_text_is_seen_where_there_is_cross_attention() -> None:
    for case, seen in (("self", False), ("cross", True)):
        backbone = opened(*at(case), "denoiser.zero_init=false")
        apart = predicted(backbone, ["a cat", "a star"]) - predicted(backbone)
        assert bool(apart.any()) == seen
    for cross, seen in (("false", False), ("true", True)):
        backbone = opened(
            f"denoiser.cross_attention={cross}", "denoiser.zero_init=false", name="dit_scratch"
        )
        nn.init.normal_(backbone.transformer.proj_out.weight)
        for site in backbone.sites:
            nn.init.normal_(site.projection("out").weight)
        apart = predicted(backbone, ["a cat", "a star"]) - predicted(backbone)
        assert bool(apart.any()) == seen
        assert (backbone.transformer.caption_projection is not None) == seen


@pytest.mark.parametrize("cross", ["true", "false"])
def test_attention_of_a_transformer_starts_as_nothing(cross: str) -> None:
    backbone = opened(f"denoiser.cross_attention={cross}", name="dit_scratch")
    assert {site.kind for site in backbone.sites} == {"self"} | (
        {"cross"} if cross == "true" else set()
    )
    nn.init.normal_(backbone.transformer.proj_out.weight)  # else it predicts 0 whatever it does
    start = predicted(backbone)
    assert replaced(backbone.transformer, Attention, Silent) == len(backbone.sites)
    assert torch.equal(predicted(backbone), start)
    assert start.any()
    learned = opened(
        f"denoiser.cross_attention={cross}", "denoiser.zero_init=false", name="dit_scratch"
    )
    outputs = {site.kind: bool(site.projection("out").weight.any()) for site in learned.sites}
    assert outputs == {"self": True, **({"cross": False} if cross == "true" else {})}


def test_a_transformer_is_all_in_its_config_and_of_the_size_that_is_asked() -> None:
    made = opened("denoiser.patch=4", "denoiser.sample_size=32", name="dit_scratch")
    assert {site.divisor for site in made.sites} == {4}
    assert (made.resolution, len(made.blocks()), {site.heads for site in made.sites}) == (
        128,
        2,
        {4},
    )
    again = PixArtTransformer2DModel.from_config(dict(made.transformer.config))
    assert again.state_dict().keys() == made.transformer.state_dict().keys()


def test_levels_go_down_to_a_grid_of_2() -> None:
    backbone = opened(
        "denoiser.width=[16,16,32,32]", "denoiser.self_attention=[2]", "denoiser.cross_attention=[]"
    )
    assert {(site.divisor, site.kind) for site in backbone.sites} == {(8, "self")}


def test_making_one_draws_nothing_from_the_process() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    unets = [sd.make(UNetSpec(width=(16, 16), groups=8, seed=seed), 8, 128) for seed in (0, 0, 1)]
    spec = TransformerSpec(width=24, heads=2, depth=1)
    transformers = [pixart.make(spec, 8, 128) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (unet.conv_in.weight for unet in unets)
    assert torch.equal(first, same) and not torch.equal(first, other)
    states = [transformer.state_dict() for transformer in transformers]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("case", ["both", "mid-apart"])
def test_an_adapter_brings_its_network_back(
    case: str, tmp_path: Path, train: Callable[..., list[float]]
) -> None:
    """What it did not train as well: those weights are in no file. An export of it is a folder that
    loads without a word of how it was made, or it is refused."""
    options = ("methods.full=null", "methods.selective.sites=cross", "denoiser.zero_init=false")
    chosen = load_recipe(words(*at(case), *options))
    backbone = load_backbone(chosen.backbone, chosen.backbone_name)
    plan = apply_methods(backbone.requires_grad_(False), chosen.methods)
    train(backbone, plan)
    tensors, path = dict(backbone.named_parameters()), tmp_path / "adapter.safetensors"
    stored = {name: tensors[name] for name in plan.stored}
    save_adapter(path, stored, chosen.tree, backbone.identity())
    again, tree = load_adapted(path)
    assert tree["denoiser"] == chosen.tree["denoiser"]
    own = backbone.unet.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in again.unet.state_dict().items())
    if case == "both":
        folder = export(path, tmp_path / "merged", say=lambda line: None)
        assert torch.equal(predicted(load_adapted(path, str(folder))[0]), predicted(again))
    else:
        says = r"made from its config it has .*attn2.*, \d+ tensors in all; generate from the"
        with pytest.raises(ValueError, match=says):
            export(path, tmp_path / "merged", say=lambda line: None)


@pytest.mark.parametrize(
    ("name", "part"), [("unet_scratch", "unet"), ("dit_scratch", "transformer")]
)
def test_a_run_from_nothing(name: str, part: str, tmp_path: Path) -> None:
    """Trained by the recipe itself, the network loads with its heads, which no tensor shows."""
    size = ["data.count=8", "data.validation=0", "run.batch_size=2", "run.steps=3"]
    size += ["optim.warmup=1", "tracker=none"]
    quiet = ["run.validate_every=0", "run.checkpoint_every=0", "preview.prompts=[]"]
    place = [f"run.out={tmp_path}", "run.id=it", "denoiser.heads=8", "run.precision=fp32"]
    folder = fit(load_recipe(words(*size, *quiet, *place, name=name)))
    loaded, tree = load_adapted(folder / "adapter.safetensors")
    assert {site.heads for site in loaded.sites} == {8}
    assert (tree["backbone"], tree["denoiser"]["heads"]) == (name, 8)
    start = load_backbone(spec_of(tree), name).denoiser.state_dict()
    trained = getattr(loaded, part).state_dict()
    assert trained.keys() == start.keys()
    assert any(not torch.equal(trained[key], start[key]) for key in start)
    again = load_recipe([f"recipe={folder / 'recipe.yaml'}"])  # as a run folder keeps it
    assert again.backbone == spec_of(tree)


def test_the_recipe_lies_over_the_backbone() -> None:
    words = ["recipe=lora", "backbone=unet_scratch", "data.class_word=animal"]
    chosen = load_recipe([*words, "denoiser.heads=2"])
    assert chosen.backbone.denoiser == UNetSpec(heads=2)
    assert chosen.tree["denoiser"]["self_attention"] == [16, 8, "mid"]
    kept = load_recipe(["recipe=unet_scratch", "backbone=tiny", "denoiser=null"])
    assert kept.backbone.denoiser is None and "denoiser" not in kept.tree


# words -> a part of what they are answered with, before torch is imported
REFUSED = """
denoiser.self_attention=[32] -> denoiser.self_attention=32: no such grid; this U-Net has 16, 8
denoiser.cross_attention=[middle] -> denoiser.cross_attention=middle: no such grid; this U-Net has
denoiser.self_attention=8 -> denoiser.self_attention=8: a list is needed
denoiser.heads=3 -> denoiser.heads=3 does not divide 16, the width at 16
denoiser.heads=0 -> denoiser.heads=0: a whole number is needed, at least 1
denoiser.groups=5 -> denoiser.groups=5 does not divide the width 16
denoiser.sample_size=18 -> denoiser.sample_size=18 does not halve for each of 3 widths;
denoiser.width=[] -> denoiser.width=[]: Tuple should have at least 1 item
denoiser.width=[16,0] -> denoiser.width.1=0: Input should be greater than 0
denoiser.widht=[16] -> denoiser.widht: no such key; did you mean denoiser.width?
denoiser=3 -> denoiser is 3; it takes sample_size, width, layers, heads
backbone=tiny -> denoiser: backbone tiny has a network of its own, which denoiser=null keeps;
backbone=dit_scratch -> denoiser.layers: no such key; there are: sample_size, patch
"""
REFUSED_DIT = """
denoiser.heads=5 -> denoiser.heads=5 does not divide width=32
denoiser.patch=3 -> denoiser.patch=3 does not divide sample_size=16
denoiser.width=30 & denoiser.heads=2 -> denoiser.width=30 is not a multiple of 4
denoiser.self_attention=[] -> denoiser.self_attention: no such key; did you mean denoiser.cross_
"""
ROWS = [
    pytest.param(name, *line.split(" -> "), id=line.split(" -> ")[0])
    for name, table in (("unet_scratch", REFUSED), ("dit_scratch", REFUSED_DIT))
    for line in table.strip().splitlines()
]


@pytest.mark.parametrize(("name", "given", "says"), ROWS)
def test_what_cannot_be_made_is_refused(name: str, given: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(words(*given.split(" & "), name=name))
    assert says in str(error.value)


def test_a_family_makes_what_is_its_own() -> None:
    spec = BackboneSpec(folder="tiny", denoiser=TransformerSpec())
    with pytest.raises(ValueError, match="a TransformerSpec, which the family sd does not make"):
        load_backbone(spec, "mine")
