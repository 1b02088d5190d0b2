"""Agent attention against plain loops; agents from pooling and from merged tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.agent_attention import (
    agent_attention,
    in_blocks,
    pooled,
)
from trainer.kernels.token_merging import (
    Grid,
    joined_heads,
    match,
    num_merged,
    split_again,
)
from trainer.ops.grid_modules import AgentBias, Shortcut


def merged(q: Tensor, x: Tensor, grid: Grid, *, cell: int, ratio: float, seed: int) -> Tensor:
    groups = match(x, grid, cell=cell, seed=seed).groups(ratio)
    return split_again(groups.merge(joined_heads(q)), q.shape[1])


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("biased", [False, True])
def test_equals_a_plain_loop(biased: bool) -> None:
    q, a, k, v, first, second = tensors(
        (2, 3, 6, 4), (2, 3, 2, 4), (2, 3, 6, 4), (2, 3, 6, 4), (3, 2, 6), (3, 6, 2)
    )
    bias = (first, second) if biased else None
    own = agent_attention(q, a, k, v, 0.5, 0.7, bias)
    rows = []
    for b in range(2):
        for h in range(3):
            asked = []
            for i in range(2):
                scores = k[b, h] @ a[b, h, i] * 0.5 + (first[h, i] if biased else 0)
                asked.append(scores.softmax(0) @ v[b, h])
            for i in range(6):
                scores = a[b, h] @ q[b, h, i] * 0.7 + (second[h, i] if biased else 0)
                rows.append(scores.softmax(0) @ torch.stack(asked))
    wanted = torch.stack(rows).view(2, 3, 6, 4)
    torch.testing.assert_close(own, wanted, atol=1e-12, rtol=1e-10)
    inputs = [q, a, k, v, *(bias or ())]
    found = torch.autograd.grad(own.square().sum(), inputs)
    for mine, other in zip(found, torch.autograd.grad(wanted.square().sum(), inputs), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=1e-8)


def test_queries_take_the_scale_of_the_agents_unless_they_have_their_own() -> None:
    q, a, k, v = tensors((1, 2, 6, 4), (1, 2, 2, 4), (1, 2, 6, 4), (1, 2, 6, 4))
    same = agent_attention(q, a, k, v, scale=0.3, query_scale=0.3)
    assert torch.equal(agent_attention(q, a, k, v, scale=0.3), same)
    assert not torch.equal(agent_attention(q, a, k, v), same)


@pytest.mark.parametrize(("grid", "side"), [((4, 6), 2), ((5, 3), 2), ((2, 2), 3)], ids=str)
def test_pooled_agents_are_means_over_parts_of_the_grid(grid: tuple[int, int], side: int) -> None:
    (q,) = tensors((2, 3, grid[0] * grid[1], 4))
    own = pooled(q, grid, side).unflatten(2, (side, side))
    image = q.unflatten(2, grid)

    def part(index: int, length: int) -> slice:
        return slice(index * length // side, -(-(index + 1) * length // side))

    for y in range(side):
        for x in range(side):
            cell = image[:, :, part(y, grid[0]), part(x, grid[1])].mean((2, 3))
            torch.testing.assert_close(own[:, :, y, x], cell)


def test_a_bias_is_zero_at_the_start_and_fits_any_grid() -> None:
    bias = AgentBias(heads=2, agents=3)
    assert bias((5, 8)).shape == (2, 3, 40) and not bias((5, 8)).any()
    with torch.no_grad():
        bias.down.copy_(torch.linspace(0, 1, bias.down.shape[-1]).expand_as(bias.down))
    rising = bias((5, 8)).view(2, 3, 5, 8)
    assert bool((rising.diff(dim=2) > 0).all()) and not rising.diff(dim=3).any()
    bias((5, 8)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in bias.parameters())


def stretched(values: Tensor, size: int) -> Tensor:
    """values (..., n) at `size` places between its edges, each mixed of its two neighbours."""
    count = values.shape[-1]
    found = []
    for place in range(size):
        at = min(max((place + 0.5) * count / size - 0.5, 0), count - 1)
        low = int(at)
        high = min(low + 1, count - 1)
        found.append(values[..., low] * (1 - (at - low)) + values[..., high] * (at - low))
    return torch.stack(found, -1)


@pytest.mark.parametrize("grid", [(5, 8), (14, 3)], ids=str)
def test_a_bias_is_a_map_and_two_lines_added(grid: tuple[int, int]) -> None:
    """block + down + across, arXiv 2312.08874, section 3.3, each stretched over the grid."""
    bias = AgentBias(heads=2, agents=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in bias.parameters():
            part.copy_(torch.randn(part.shape, generator=generator))
        block = stretched(stretched(bias.block, grid[1]).mT, grid[0]).mT
        down, across = stretched(bias.down, grid[0]), stretched(bias.across, grid[1])
        for y in range(grid[0]):
            for x in range(grid[1]):
                wanted = block[:, :, y, x] + down[..., y] + across[..., x]
                torch.testing.assert_close(bias(grid)[:, :, y * grid[1] + x], wanted)


def test_the_shortcut_is_a_depthwise_convolution_over_the_values() -> None:
    shortcut = Shortcut(channels=6)
    v = torch.randn(2, 2, 12, 3, generator=torch.Generator().manual_seed(1))
    assert not shortcut(v, (3, 4)).any()
    with torch.no_grad():
        shortcut.weight[4, 0, 1, 2] = 2.0  # head 1, channel 1: twice the right neighbour
    wanted = F.pad(v.unflatten(2, (3, 4)), (0, 0, 0, 1))[:, :, :, 1:].flatten(2, 3) * 2
    own = shortcut(v, (3, 4))
    assert torch.equal(own[:, 1, :, 1], wanted[:, 1, :, 1])
    assert not own[:, 0].any()


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.95])
@pytest.mark.parametrize("grid", [(8, 8), (9, 6), (3, 5)], ids=str)
def test_merged_agents_are_means_of_like_tokens(grid: tuple[int, int], ratio: float) -> None:
    tokens = grid[0] * grid[1]
    q, x = tensors((2, 3, tokens, 4), (2, tokens, 7))
    agents = merged(q, x, grid, cell=4, ratio=ratio, seed=2)
    assert agents.shape == (2, 3, num_merged(grid, 4, ratio), 4)
    again = merged(q, x, grid, cell=4, ratio=ratio, seed=2)
    assert torch.equal(agents, again)
    # each token goes into one agent, and does so whole: the gradient of an agent sums to 1
    into = torch.zeros(agents.shape[2], tokens, dtype=torch.float64)
    for index in range(agents.shape[2]):
        (grad,) = torch.autograd.grad(agents[0, 1, index, 3], q, retain_graph=True)
        into[index] = grad[0, 1, :, 3]
    torch.testing.assert_close(into.sum(1), torch.ones(len(into), dtype=torch.float64))
    assert bool(((into > 0).sum(0) == 1).all())


def test_the_tokens_most_alike_are_merged() -> None:
    x = torch.eye(16, dtype=torch.float64)[None]
    q = torch.arange(16, dtype=torch.float64).view(1, 1, 16, 1)
    target = merged(q, x, (4, 4), cell=4, ratio=1.0, seed=0)
    assert target.shape[2] == 1
    kept = merged(q, x, (4, 4), cell=4, ratio=0.0, seed=0)[0, 0, -1, 0].long()
    twin = (int(kept) + 5) % 16
    x[0, twin] = x[0, kept] * 3  # cosine 1, all others less
    long = (int(kept) + 7) % 16
    x[0, long] = x[0, long] * 100 + x[0, kept] * 50  # a larger product, a smaller cosine
    agents = merged(q, x, (4, 4), cell=4, ratio=1 / 16, seed=0)
    assert agents.shape[2] == 15
    assert float(agents[0, 0, -1, 0]) == (float(kept) + twin) / 2


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_queries_equal_the_whole(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.kernels.softmax import eager

    # 3 queries at once, and one that is left
    monkeypatch.setattr("trainer.kernels.agent_attention.SCORES", 7 * 3)
    q, k, v, mask = tensors((2, 3, 7, 4), (2, 3, 7, 4), (2, 3, 7, 4), (3, 7, 7))
    added = mask if masked else None
    for scale in (None, 0.3):
        torch.testing.assert_close(in_blocks(q, k, v, added, scale), eager(q, k, v, added, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_without_a_gradient_is_that_with_one(dtype: torch.dtype) -> None:
    q, a, k, v, first, second = (
        x.detach().to(dtype)
        for x in tensors(
            (1, 2, 40, 8), (1, 2, 5, 8), (1, 2, 40, 8), (1, 2, 40, 8), (2, 5, 40), (2, 40, 5)
        )
    )
    wanted = agent_attention(
        *(x.double() for x in (q, a, k, v)), bias=(first.double(), second.double())
    )
    with torch.no_grad():
        own = agent_attention(q, a, k, v, bias=(first, second))
    by_sdpa = agent_attention(q, a, k, v, bias=(first, second))
    for found in (own, by_sdpa):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("grid", [(8, 8), (5, 7)])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.9])
def test_unmerging_gives_every_token_its_targets_mean(grid: tuple[int, int], ratio: float) -> None:
    """Token by token: one that was averaged into a target gets the mean of that target's group, any
    other its own value back."""
    count = grid[0] * grid[1]
    (x,) = tensors((2, count, 6))
    q = torch.arange(2 * 3 * count * 4, dtype=torch.float64).view(2, 3, count, 4)
    found = match(x, grid, cell=2, seed=3)
    groups = found.groups(ratio)
    back = split_again(groups.unmerge(groups.merge(joined_heads(q))), 3)
    cosines = torch.cosine_similarity(x[:, :, None], x[:, None], dim=-1)
    for row in range(2):
        targets = found.targets.tolist()
        best = {
            i: max((float(cosines[row, i, j]), j) for j in targets)
            for i in range(count)
            if i not in targets
        }
        goes = sorted(best, key=lambda i: -best[i][0])[: int(ratio * count)]
        group = {j: [j, *(i for i in goes if best[i][1] == j)] for j in targets}
        for i in range(count):
            own = group[best[i][1]] if i in goes else group.get(i, [i])
            wanted = q[row][:, own].mean(1)
            torch.testing.assert_close(back[row][:, i], wanted)
