"""Merging by matching against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.kernels.token_merging import Groups, match, num_merged


def of_a_loop(x: Tensor, grid: tuple[int, int], *, cell: int, ratio: float, seed: int) -> Tensor:
    """The means of groups (m, c) of tokens x (n, c), group by group: the tokens that stay alone, by
    how similar they are to their targets, then the targets, each with what joined it."""
    height, width = (min(cell, length) for length in grid)
    rows, columns = grid[0] // height, grid[1] // width
    drawn = torch.randint(
        height * width, (rows, columns), generator=torch.Generator().manual_seed(seed)
    )
    kept = []
    for row in range(rows):
        for column in range(columns):
            y, across = divmod(int(drawn[row, column]), width)
            kept.append((row * height + y) * grid[1] + column * width + across)
    nearest = {}
    x_ = x.detach()
    for token in range(len(x)):
        if token not in kept:
            likeness = [float(torch.cosine_similarity(x_[token], x_[k], dim=0)) for k in kept]
            best = max(range(len(kept)), key=likeness.__getitem__)
            nearest[token] = (likeness[best], kept[best])
    order = sorted(nearest, key=lambda token: -nearest[token][0])
    goes = order[: int(ratio * len(x))]
    found = [x[token] for token in order if token not in goes]
    for k in kept:
        found.append(x[[k, *(token for token in goes if nearest[token][1] == k)]].mean(0))
    return torch.stack(found)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75])
@pytest.mark.parametrize(("grid", "cell"), [((6, 4), 2), ((5, 7), 3), ((2, 3), 4)], ids=str)
def test_groups_are_those_of_a_loop(grid: tuple[int, int], cell: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = grid[0] * grid[1]
    x = torch.randn(3, tokens, 5, generator=generator, dtype=torch.float64).requires_grad_()
    groups = match(x, grid, cell=cell, seed=4).groups(ratio)
    own = groups.merge(x)
    wanted = torch.stack([of_a_loop(row, grid, cell=cell, ratio=ratio, seed=4) for row in x])
    assert own.shape[1] == num_merged(grid, cell, ratio)
    torch.testing.assert_close(own, wanted)
    slope = torch.randn(own.shape, generator=generator, dtype=torch.float64)
    found = [torch.autograd.grad((y * slope).sum(), x)[0] for y in (own, wanted)]
    torch.testing.assert_close(*found)


def test_sizes_and_copies() -> None:
    groups = Groups(
        torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0]]), torch.tensor([[2, 3], [1, 4.0]])
    )
    x = torch.arange(20.0).view(2, 5, 2)
    merged = groups.merge(x)
    torch.testing.assert_close(merged[0, 0], x[0, [0, 3]].mean(0))
    torch.testing.assert_close(merged[1, 1], x[1, :4].mean(0))
    back = groups.unmerge(merged)
    assert torch.equal(back[0, [1, 2, 4]], merged[0, 1].expand(3, -1))
    assert torch.equal(back[1, 4], x[1, 4])
    found = match(torch.randn(2, 35, 3), (5, 7), cell=2, seed=0).groups(0.5)
    assert found.sizes.sum(1).tolist() == [35, 35]


def test_blocks_of_similarities_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = match(x, (8, 8), cell=2, seed=0)
    monkeypatch.setattr("trainer.kernels.token_merging.BLOCK", 5)
    parts = match(x, (8, 8), cell=2, seed=0)
    assert torch.equal(parts.choice, whole.choice) and torch.equal(parts.order, whole.order)
