"""T-LoRA: the rank at every timestep, the equation row by row, LyCORIS on the same tensors, and
what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from trainer.attention.context import StepContext, use
from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.export.formats.merged import merge
from trainer.methods.apply import apply_methods
from trainer.ops.adapters.inject import fold
from trainer.ops.adapters.tlora import (
    Factors,
    RankSchedule,
    TimestepRank,
    of_random,
    of_rows,
    of_weight,
)

LAYER = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
RANK = 6


def tree(**more: Any) -> dict[str, Any]:
    return {"tlora": {"sites": "all", "rank": RANK} | more}


def layer_at(backbone: Any, path: str = LAYER) -> Any:
    return backbone.get_submodule(path)


def at(backbone: Any, t: Any, frames: int = 1) -> StepContext:
    """The layers see this context as if the denoiser were running."""
    ctx = StepContext(0, 1, torch.as_tensor(t), frames)
    backbone.host.holder.ctx = ctx
    return ctx


def by_hand(layer: Any, x: Tensor, ranks: list[int]) -> Tensor:
    """W0 x + B S M A x - B0 S0 M A0 x with the first so many ranks of every row."""
    a, b, s = layer.lora_A.tlora.weight, layer.lora_B.tlora.weight, layer.lora_S.tlora
    start = layer.tlora_start
    rows = []
    for row, rank in zip(x, ranks, strict=True):
        delta = b[:, :rank] @ torch.diag(s[:rank]) @ a[:rank]
        old = start.B.weight[:, :rank] @ torch.diag(start.S[:rank]) @ start.A.weight[:rank]
        weight = layer.base_layer.weight + layer.scaling["tlora"] * (delta - old)
        rows.append(row @ weight.T)
    return torch.stack(rows)


def test_the_rank_falls_with_the_noise() -> None:
    """Every timestep against exact fractions; floats would lose a rank at some whole numbers."""
    schedule, t = RankSchedule(share=0.25), torch.arange(1001)
    found = schedule.ranks(t, 100).tolist()
    assert found == [int(Fraction(75 * (1000 - int(i)), 1000)) + 25 for i in t]
    assert (found[0], found[999], found[1000]) == (100, 25, 25)


def test_the_power_and_the_last_timestep() -> None:
    schedule = RankSchedule(share=0.5, power=2, num_timesteps=1)
    assert schedule.ranks(torch.tensor([0.0, 0.5, 1.0, 2.0]), 16).tolist() == [16, 10, 8, 8]


def test_the_mask_keeps_the_first_ranks() -> None:
    mask = RankSchedule(share=0.0).mask(torch.tensor([0, 400, 1000]), 5)
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("t", "rows", "frames", "wanted"),
    [
        ([7], 3, 1, [7]),
        ([1, 2, 3], 3, 1, [1, 2, 3]),
        ([1, 2], 6, 1, [1, 1, 1, 2, 2, 2]),
        ([1, 1, 2, 2], 4, 2, [1, 1, 2, 2]),
        ([1, 1, 1, 2, 2, 2], 4, 3, [1, 1, 2, 2]),  # two places of each clip, not three frames
        ([1, 1, 1, 2, 2, 2], 2, 3, [1, 2]),
    ],
)
def test_the_timestep_of_each_row(t: list[int], rows: int, frames: int, wanted: list[int]) -> None:
    assert of_rows(torch.tensor(t), rows, frames).tolist() == wanted


def test_rows_without_a_timestep_are_refused() -> None:
    with pytest.raises(ValueError, match="has 5 rows for 2 timesteps"):
        of_rows(torch.tensor([1, 2]), 5, 1)


def test_the_equation(tiny: Any, randomise: Callable[..., None]) -> None:
    """Two rows of one batch at two timesteps: output, and the gradient of all that trains."""
    plan = apply_methods(tiny, methods_of(tree(alpha=3.0)))
    randomise(tiny, plan, 0.3)
    layer = layer_at(tiny)
    at(tiny, [990, 500])
    x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
    own, wanted = layer(x), by_hand(layer, x, [3, 4])
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)
    trained = [layer.lora_A.tlora.weight, layer.lora_B.tlora.weight, layer.lora_S.tlora, x]
    found = torch.autograd.grad(own.square().sum(), trained)
    reference = torch.autograd.grad(wanted.square().sum(), trained)
    for mine, other in zip(found, reference, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    assert not found[2][4:].any() and found[2][:4].all(), "ranks that are masked learn nothing"


def test_a_convolution(tiny: Any, randomise: Callable[..., None]) -> None:
    options = {"sites": None, "layers": ["conv_in"], "rank": 4}
    randomise(tiny, apply_methods(tiny, methods_of({"tlora": options})), 0.3)
    layer = layer_at(tiny, "unet.conv_in")
    at(tiny, [1000, 0])
    x = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(1))
    a, b, s = layer.lora_A.tlora.weight, layer.lora_B.tlora.weight, layer.lora_S.tlora
    start, base = layer.tlora_start, layer.base_layer
    rows = []
    for row, rank in zip(x, (2, 4), strict=True):
        delta = (b[:, :rank, 0, 0] * s[:rank]) @ a[:rank].flatten(1)
        old = (start.B.weight[:, :rank, 0, 0] * start.S[:rank]) @ start.A.weight[:rank].flatten(1)
        weight = base.weight + (delta - old).view_as(base.weight)
        rows.append(conv2d(row[None], weight, base.bias, padding=1))
    torch.testing.assert_close(layer(x), torch.cat(rows), rtol=1e-4, atol=1e-4)


def test_vanilla_subtracts_nothing(tiny: Any, randomise: Callable[..., None]) -> None:
    plan = apply_methods(tiny, methods_of(tree(init="zero")))
    layer = layer_at(tiny)
    assert not layer.lora_B.tlora.weight.any() and layer.lora_A.tlora.weight.any()
    assert layer.lora_S.tlora.tolist() == [1.0] * RANK
    assert not plan.keeps
    randomise(tiny, plan, 0.3)
    at(tiny, 990)
    x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1))
    a, b, s = layer.lora_A.tlora.weight, layer.lora_B.tlora.weight, layer.lora_S.tlora
    weight = layer.base_layer.weight + b[:, :3] @ torch.diag(s[:3]) @ a[:3]
    torch.testing.assert_close(layer(x), linear(x, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [0, 333, 1000])
def test_it_does_what_lycoris_does(t: int, tiny: Any, randomise: Callable[..., None]) -> None:
    from lycoris.modules import tlora as lycoris

    plan = apply_methods(tiny, methods_of(tree(alpha=3.0)))
    layer = layer_at(tiny)
    other = lycoris.TLoraModule("x", copy.deepcopy(layer.base_layer), lora_dim=RANK, alpha=3.0)
    start = layer.tlora_start
    other.base_q, other.base_p, other.base_lambda = start.A.weight, start.B.weight, start.S[None]
    randomise(tiny, plan, 0.3)
    other.q_layer.weight, other.p_layer.weight = (
        layer.lora_A.tlora.weight,
        layer.lora_B.tlora.weight,
    )
    other.lambda_layer = nn.Parameter(layer.lora_S.tlora[None])
    mask = lycoris.compute_timestep_mask(t, 1000, RANK, RANK // 2)
    assert torch.equal(RankSchedule().mask(torch.tensor([t]), RANK).float(), mask)
    at(tiny, t)
    x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1))
    lycoris.set_timestep_mask(mask)
    try:
        wanted = other(x)
    finally:
        lycoris.clear_timestep_mask()
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("singular", ["last", "middle", "principal"])
def test_it_starts_in_singular_vectors(singular: Any) -> None:
    weight = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(weight)
    rows = {"principal": slice(0, 2), "middle": slice(1, 3), "last": slice(3, 5)}[singular]
    own = of_weight(weight, 2, singular)
    torch.testing.assert_close(own.S, values[rows])
    torch.testing.assert_close(weight @ own.A.T, own.B * own.S)
    random = of_random((9, 5), 2, singular, values={(9, 5): 2 * values})
    torch.testing.assert_close(random.S, values[rows])
    for factors in (own, random):
        torch.testing.assert_close(factors.A @ factors.A.T, torch.eye(2))
        torch.testing.assert_close(factors.B.T @ factors.B, torch.eye(2))


def test_a_random_start_is_that_of_a_random_matrix() -> None:
    """The mean over many draws, of values and of the squares of the vectors' entries, beside those
    of whole decompositions."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(2000, 7, 4, generator=generator) / 2
    _, s, v = torch.linalg.svd(matrices, full_matrices=False)
    torch.manual_seed(0)
    own = [of_random((7, 4), 2, "last", values={}) for _ in range(2000)]
    torch.testing.assert_close(mean(own, "S"), s[:, 2:].mean(0), rtol=0.03, atol=0)
    square = torch.stack([each.A.square() for each in own]).mean(0)
    torch.testing.assert_close(square, v[:, 2:].square().mean(0), rtol=0.1, atol=0)
    torch.testing.assert_close(mean(own, "A"), torch.zeros(2, 4), rtol=0, atol=0.05)


def mean(found: list[Factors], name: str) -> Tensor:
    return torch.stack([getattr(each, name) for each in found]).mean(0)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The timesteps that masks are made for, call by call."""
    found: list[list[float]] = []
    real = RankSchedule.mask

    def mask(self: RankSchedule, t: Tensor, rank: int) -> Tensor:
        found.append(t.tolist())
        return real(self, t, rank)

    monkeypatch.setattr(RankSchedule, "mask", mask)
    return found


def test_each_step_of_the_sampler_has_its_own_rank(tiny: Any, seen: list[list[float]]) -> None:
    apply_methods(tiny, methods_of(tree()))
    sample(tiny, ["a fox"], [3], settings=Sampling(steps=3, guidance=3))
    steps = [tuple(t) for t in seen]  # of each step one, for all layers
    assert len(steps) == len(set(steps)) == 3 and steps == sorted(steps, reverse=True)
    assert all(len(set(t)) == 1 for t in steps)


def test_training_masks_every_row_by_its_own_timestep(
    tiny: Any, seen: list[list[float]], train: Callable[..., list[float]]
) -> None:
    train(tiny, apply_methods(tiny, methods_of(tree())), steps=1)
    assert {len(set(t)) for t in seen} == {len(seen[0])}
    assert len(seen[0]) > 1


@pytest.mark.parametrize("over", [{}, {"nf4": {"min_size": 256}}], ids=["plain", "over-4-bits"])
def test_it_acts_inside_the_network(
    over: dict[str, Any],
    tiny: Any,
    predict: Callable[[Any], Tensor],
    randomise: Callable[..., None],
) -> None:
    """All ranks at every timestep is another network than half of them at high noise: row 1, at
    timestep 900, differs and row 0, at 3, nearly does not (rank 5 of 6 there, by the floor)."""
    plan = apply_methods(tiny, methods_of(over | tree(sites="cross")))
    randomise(tiny, plan, 0.3)
    own = predict(tiny)
    for layer in tiny.modules():
        for name, variant in getattr(layer, "lora_variant", {}).items():
            layer.lora_variant[name] = TimestepRank(RankSchedule(share=1.0), variant.holder)
    whole = predict(tiny)
    assert not torch.allclose(own[1], whole[1], atol=1e-3)


def test_gradient_checkpointing_recomputes_with_the_same_mask(
    tiny: Any, randomise: Callable[..., None]
) -> None:
    plan = apply_methods(tiny, methods_of(tree()))
    randomise(tiny, plan, 0.3)
    x_t = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    condition = tiny.encode_prompts(["a fox", ""])
    found = []
    for checkpoint in (False, True):
        if checkpoint:
            tiny.denoiser.enable_gradient_checkpointing()
            tiny.denoiser.train()
        t = torch.tensor([20, 900])
        with use(StepContext(0, 1, t)):
            output = tiny.predict(x_t, t, condition)
        with use(StepContext(0, 1, torch.tensor([500, 500]))):
            tiny.predict(x_t, torch.tensor([500, 500]), condition)
        output.square().sum().backward()
        found.append(layer_at(tiny).lora_S.tlora.grad.clone())
        tiny.zero_grad()
    torch.testing.assert_close(found[1], found[0])


def test_a_copy_follows_its_own_timesteps(
    tiny: Any, predict: Callable[[Any], Tensor], randomise: Callable[..., None]
) -> None:
    randomise(tiny, apply_methods(tiny, methods_of(tree())), 0.3)
    copied = copy.deepcopy(tiny)
    live = predict(tiny).detach()
    at(tiny, 0)
    assert torch.equal(predict(copied), live)


def test_no_weight_and_no_file_holds_it(
    tiny: Any, tiny_folder: Path, tmp_path: Path, save: Callable[..., dict[str, Tensor]]
) -> None:
    from trainer.export.export import export

    plan = apply_methods(tiny, methods_of(tree()))
    path, out = tmp_path / "adapter.safetensors", tmp_path / "out"
    save(path, tiny, plan, {"backbone": str(tiny_folder), "methods": tree()})
    with pytest.raises(ValueError, match=r"methods\.tlora uses another rank at every timestep"):
        export(path, out)
    assert list(tmp_path.iterdir()) == [path]
    layer = layer_at(tiny)
    for refused in (lambda: fold(tiny), lambda: merge(tiny), layer.merge):
        with pytest.raises(ValueError, match=r"methods\.tlora uses another rank"):
            refused()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_encoder": ["v"]}, "the text encoder is called without a timestep"),
        ({"text_layers": ["*fc1"]}, "the text encoder is called without a timestep"),
        ({"min_share": 1.5}, "min_share=1.5"),
        ({"init": "qr"}, "init='qr'"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods_of(tree(**options))
    assert message in str(error.value)


def test_over_4_bits_there_is_no_weight_to_start_from(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"init=weight starts from W0 itself, and methods\.nf4"):
        apply_methods(tiny, methods_of({"nf4": {"min_size": 256}} | tree(init="weight")))
