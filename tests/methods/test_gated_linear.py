"""Gated linear attention in a denoiser: the gates, the scans, the start, and the convolution after
its blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.kernels.gated_linear import ORDERS, ordered, recurrent, restored
from trainer.methods.apply import Plan, apply_methods
from trainer.ops.block_convolution import BlockConvolution
from trainer.ops.gated_linear import OPEN

Predict = Callable[[Any], Tensor]


def add(backbone: Any, **options: Any) -> Plan:
    return apply_methods(backbone, methods_of({"gated_linear": options}))


def ops(backbone: Any) -> list[Any]:
    return [op for p in backbone.host.processors.values() for op in p.ops]


@pytest.mark.parametrize("scans", [1, 2, 4])
def test_sites_take_turns_through_the_four_directions(scans: int, tiny: Any) -> None:
    add(tiny, scans=scans)
    found = [order for op in ops(tiny) for order in op.orders]
    assert all(len(op.orders) == scans for op in ops(tiny))
    assert found == [ORDERS[i % 4] for i in range(len(found))]


def test_the_equation(tiny: Any, predict: Predict, randomise: Callable[..., None]) -> None:
    plan = add(tiny, rank=3, tau=4.0)
    randomise(tiny, plan)
    op = next(op for op in ops(tiny) if op.orders == ("row_back",))
    seen: list[Any] = []

    def kernel(*given: Any, run: Any = op.kernel, **more: Any) -> Tensor:
        seen.append((more["call"].scratch(op)["x"], *given, run(*given, **more)))
        return seen[-1][4]

    op.kernel = kernel
    predict(tiny)
    ((x, q, k, v, o),) = seen
    heads = q.shape[1]
    up, let = (x @ op.down.weight.T) @ op.up.weight.T + op.up.bias, op.let(x)
    g, let = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (up.sigmoid().log() / 4, let))
    s = recurrent(*(t.flip(2) for t in (q, k, v, g))).flip(2)
    normed = s / (s.square().mean(-1, keepdim=True) + 1e-6).sqrt() * op.norm.weight
    torch.testing.assert_close(o, F.silu(let) * normed, atol=1e-4, rtol=1e-4)


def test_the_output_gate_is_open_at_the_start(tiny: Any) -> None:
    assert float(F.silu(torch.tensor(OPEN))) == pytest.approx(1, abs=1e-6)
    add(tiny)
    assert all(not op.let.weight.any() for op in ops(tiny))


def test_all_of_it_trains(tiny: Any, predict: Predict) -> None:
    plan = add(tiny, scans=2)
    predict(tiny).square().sum().backward()
    parameters = dict(tiny.named_parameters())
    assert plan.names and all(".gated_linear." in name for name in plan.names)
    for name in plan.names:
        grad = parameters[name].grad
        assert grad is not None and bool(grad.any()) and bool(grad.isfinite().all()), name


GRID = torch.arange(12).unflatten(0, (3, 4))
# the tokens of a grid of 3 x 4 as each scan meets them
SCANS = {
    "row": GRID.flatten(),
    "row_back": GRID.flatten().flip(0),
    "column": GRID.T.flatten(),
    "column_back": GRID.T.flatten().flip(0),
}


def test_scans_are_four_permutations_that_alternate() -> None:
    """As a token stands in the sequence of DiG's i-th block, which flips it after every block and
    transposes the grid after every second one."""
    tokens, grid = torch.arange(12.0)[:, None], (3, 4)
    dig, shape = torch.arange(12), grid
    for i, order in enumerate([*ORDERS, ORDERS[0]]):
        seen = ordered(tokens, order, grid)
        assert torch.equal(seen.flatten().long(), SCANS[order])
        assert torch.equal(dig, SCANS[order])
        assert torch.equal(restored(seen, order, grid), tokens)
        dig = dig.flip(0)
        if i % 2:
            dig, shape = dig.unflatten(0, shape).T.flatten(), shape[::-1]
    assert len({tuple(scan.tolist()) for scan in SCANS.values()}) == 4


@pytest.mark.parametrize("order", ORDERS)
def test_a_token_is_scanned_after_those_before_it(order: str, tiny: Any) -> None:
    """What a token says does not reach those that its scan meets before it."""
    add(tiny)
    op = next(op for op in ops(tiny) if op.orders == (order,))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 4, generator=generator) for _ in range(3))
    g = torch.full_like(q, -0.1)
    v.requires_grad_()
    o = op.scan((q, k, v, g), order, (3, 4))
    for place, token in enumerate(SCANS[order].tolist()):
        (grad,) = torch.autograd.grad(o[:, :, token].sum(), v, retain_graph=True)
        reached = grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist()
        assert reached == sorted(SCANS[order][: place + 1].tolist())


def test_keys_of_others_are_refused(tiny: Any, predict: Predict) -> None:
    add(tiny, sites="cross")
    with pytest.raises(ValueError, match=r"methods\.gated_linear needs the tokens of .* choose"):
        predict(tiny)


def convolutions(backbone: Any) -> list[BlockConvolution]:
    return [op for op in ops(backbone) if isinstance(op, BlockConvolution)]


def test_the_convolution_starts_as_the_identity(
    dit: Any, dit_folder: Any, open_folder: Any
) -> None:
    """To the bit, under autocast too: the tokens that go through it are not rounded."""
    other = open_folder(dit_folder)
    with torch.random.fork_rng():
        add(dit)
    add(other, convolution=3)
    assert [c.depthwise.weight.shape for c in convolutions(other)] == 2 * [(32, 1, 3, 3)]
    x_t, t = torch.randn(2, 8, 8, 12), torch.tensor([3, 900])
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plain, convolved = (
                model.predict(x_t, t, model.encode_prompts(["a fox", ""])) for model in (dit, other)
            )
        assert torch.equal(convolved, plain)


def test_the_convolution_follows_the_whole_block(dit: Any, randomise: Callable[..., None]) -> None:
    """On the grid of tokens, after attention and feed-forward layer, as in DiG."""
    plan = add(dit, convolution=3)
    randomise(dit, plan)
    block, convolution = dit.transformer.transformer_blocks[1], convolutions(dit)[1]
    given: list[Tensor] = []  # what the block itself puts out: this hook runs before the host's
    block.register_forward_hook(lambda module, args, x: given.append(x), prepend=True)
    after: list[Tensor] = []
    dit.transformer.norm_out.register_forward_pre_hook(lambda module, args: after.append(args[0]))
    with torch.no_grad():
        dit.predict(torch.randn(1, 8, 8, 12), torch.tensor([3]), dit.encode_prompts(["a fox"]))
    ((x,), (y,)) = given, after
    assert x.shape == (1, 24, 32)  # 4 x 6 tokens
    weight, bias = convolution.depthwise.weight, convolution.depthwise.bias
    wanted = torch.zeros(1, 4, 6, 32)
    image = F.pad(x.unflatten(1, (4, 6)), (0, 0, 1, 1, 1, 1))
    for row in range(3):
        for column in range(3):
            wanted += image[:, row : row + 4, column : column + 6] * weight[:, 0, row, column]
    torch.testing.assert_close(y, (wanted + bias).flatten(1, 2), atol=1e-5, rtol=1e-5)


def test_it_trains_beside_all_of_the_denoiser(dit: Any, train: Callable[..., list[float]]) -> None:
    """What `recipe=dig_scratch` does: neither method claims what the other trains."""
    plan = apply_methods(dit, methods_of({"gated_linear": {"convolution": 3}, "full": {}}))
    assert set(plan.names) == {f"transformer.{n}" for n, _ in dit.transformer.named_parameters()}
    before = {name: value.detach().clone() for name, value in dit.named_parameters()}
    train(dit, plan)
    after = dict(dit.named_parameters())
    assert {name for name in after if not after[name].equal(before[name])} == set(plan.names)


def test_an_even_convolution_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"methods\.gated_linear\.convolution=2: .*an odd size"):
        methods_of({"gated_linear": {"convolution": 2}})
