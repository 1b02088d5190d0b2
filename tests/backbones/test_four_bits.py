"""Text encoders in 4 bits: the outputs of a plain copy with the rounded weights, a quarter of the
memory, and a plan that knows both without reading a weight."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_folders import flux1_pipeline, make_flow_folder, t5_parts
from torch import Tensor, nn

from trainer.backbones import four_bits
from trainer.backbones.device import Placement, choose_placement, place
from trainer.backbones.four_bits import (
    can_be_packed,
    is_packed,
    numel,
    pack,
    pack_layers,
    scales,
    unpacked,
)
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe
from trainer.runs.adapter import load_base
from trainer.training.build import adapt
from trainer.training.memory_estimate import memory_of
from trainer.training.without_weights import planned, refuse_unfit

CPU = torch.device("cpu")
NF4 = (("text_encoders", "nf4"),)
# arXiv 2305.14314, appendix E: the values between -1 and 1 that a code stands for
QUANTILES = torch.tensor([
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
])  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of tiny text encoders are packed too."""
    monkeypatch.setattr(four_bits, "SMALLEST", 64)


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=64, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config)


def gemma() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return Gemma2Model(config)


def wide_flux1() -> Any:
    """With a T5 whose rows are whole blocks."""
    pipe = flux1_pipeline(joint_attention_dim=64)
    _, wide = t5_parts(width=64)
    pipe.register_modules(text_encoder_2=wide)
    return pipe


def encoder(kind: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = {"t5": t5, "gemma": gemma}[kind]().eval().requires_grad_(False)
        for value in made.parameters():
            value.data = 0.1 * torch.randn(value.shape)
    return made


@torch.no_grad()
def encoded(model: Any) -> Tensor:
    ids = torch.arange(24).reshape(2, 12) + 3
    found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return found


def rounded(weight: Tensor) -> Tensor:
    """Section 3, equation 3, with exact scales: every 64 values by their largest."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale)[..., None].sub(QUANTILES).abs().argmin(-1)
    return (QUANTILES[nearest] * scale).reshape(weight.shape)


@pytest.mark.parametrize("kind", ["t5", "gemma"])
def test_it_computes_with_the_rounded_weights(kind: str) -> None:
    """The scales have 8 bits themselves, which the plain copy has not."""
    model = encoder(kind)
    plain, exact = copy.deepcopy(model), encoded(model)
    pack_layers(model, torch.float32)
    packed = {name: each for name, each in model.named_modules() if is_packed(each)}
    linear = {name: each for name, each in plain.named_modules() if isinstance(each, nn.Linear)}
    wanted = {name for name in linear if not name.endswith(".wo")}  # which a T5 wants in fp32
    assert set(packed) == wanted and len(wanted) == (12 if kind == "t5" else 14)
    for name in packed:
        linear[name].weight.data = rounded(linear[name].weight)
    found, copied = encoded(model), encoded(plain)
    error = (found - copied).abs().mean() / (exact - copied).abs().mean()
    assert 0 < error < 0.2
    assert not torch.equal(found, exact)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_backbone_reads_prompts_so(precision: str, tmp_path: Path) -> None:
    folder = make_flow_folder(tmp_path / "flux1", wide_flux1)
    spec = backbone_spec(str(folder))
    plain = load_base(spec, "mine", Placement(CPU, precision))
    model = load_base(spec, "mine", Placement(CPU, precision, NF4), read_held=True)
    few = {name: [*map(is_packed, own.modules())] for name, own in model.text_encoders.items()}
    assert any(few["text_encoder_2"]) and not any(few["text_encoder"])  # of 16 inputs a layer
    assert not any(is_packed(each) for each in model.denoiser.modules())
    before = plain.encode_prompts(["a fox"]).tokens
    found = model.encode_prompts(["a fox"]).tokens
    assert found.shape == before.shape and bool(found.isfinite().all())
    assert 0 < (found - before).abs().mean() < before.abs().mean()
    place(model, Placement(CPU, precision, NF4))  # again, as at the end of a run
    assert torch.equal(model.encode_prompts(["a fox"]).tokens, found)


def recipe_of(folder: Path, *words: str) -> Any:
    own = ["recipe=lora", "data.concept=sprite:penguin", "data.prior_weight=0", "data.token=sks"]
    own += ["methods.new_token=null", "run.batch_size=1", "run.resolution=32", "run.device=cpu"]
    return load_recipe([*own, f"backbone={folder}", "run.precision=bf16", *words])


def test_a_plan_knows_of_it(tmp_path: Path) -> None:
    folder = make_flow_folder(tmp_path / "flux1", wide_flux1)
    found = {}
    for word in ("run.base_precision={}", "run.base_precision.text_encoders=nf4"):
        recipe = recipe_of(folder, word)
        where = choose_placement("cpu", "bf16", parts=recipe.run.base_precision)
        backbone, plan = planned(recipe, where)
        real = load_base(recipe.backbone, "mine", where, hold=False, read_held=True)
        own = adapt(recipe, real, where)
        ahead, then = memory_of(recipe, backbone, plan), memory_of(recipe, real, own)
        assert ahead.parts == then.parts and ahead.saved == then.saved
        found[word] = ahead.parts
    plain, packed = found.values()
    assert packed["text_encoder_2"] < 0.9 * plain["text_encoder_2"]
    assert packed["transformer"] == plain["transformer"]


def test_a_layer_that_was_not_read_takes_no_memory() -> None:
    layer = nn.Linear(4096, 1000)
    one = torch.ones((), dtype=torch.bfloat16)
    ahead = copy.deepcopy(layer)
    ahead.weight = nn.Parameter(one.expand(1000, 4096), requires_grad=False)
    packed: Any = pack(ahead, torch.bfloat16)
    real: Any = pack(layer.requires_grad_(False), torch.bfloat16)
    pieces = (packed.weight.data, *scales(packed.weight))
    sizes = [piece.numel() * piece.element_size() for piece in pieces]
    wanted = (real.weight.data, *scales(real.weight))
    assert sizes == [piece.numel() * piece.element_size() for piece in wanted]
    assert sum(piece.untyped_storage().nbytes() for piece in pieces) < 10_000
    assert numel(packed.weight) == numel(real.weight) == 4_096_000


def test_it_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    folder = make_flow_folder(tmp_path / "flux1", wide_flux1)
    words = ("run.base_precision.text_encoders=nf4", "methods.lora.text_encoder=[q]")
    with pytest.raises(ValueError, match=r"text_encoders=nf4 is for text encoders that do not"):
        refuse_unfit(recipe_of(folder, *words))
    with pytest.raises(ValueError, match=r"in 4 bits is a method.*give methods\.nf4=\{\}"):
        recipe_of(folder, "run.base_precision.denoiser=nf4")


@pytest.mark.parametrize("columns", [32, 48, 64, 96, 128, 320])
def test_a_layer_is_packed_where_it_comes_back_right(columns: int) -> None:
    """Of rows that are no whole blocks a CPU reads wrong scales: those layers stay."""
    torch.manual_seed(0)
    layer = nn.Linear(columns, 64, bias=False)
    nn.init.normal_(layer.weight)
    back = unpacked(pack(layer, torch.float32)).weight
    right = float((back - layer.weight).detach().abs().max()) < 0.6
    assert can_be_packed(layer, 1) == (columns % 64 == 0)
    assert right or not can_be_packed(layer, 1)
    assert not can_be_packed(layer, layer.weight.numel() + 1)
    assert not can_be_packed(nn.Conv2d(64, 64, 1), 1)
