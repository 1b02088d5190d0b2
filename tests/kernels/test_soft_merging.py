"""ToMA's choice, shares, merging and unmerging against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.kernels.soft_merging import Tiling, chosen_tokens, soft_groups


def tokens(rows: int, count: int, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, count, width, generator=generator, dtype=torch.float64)


def members(grid: tuple[int, int], tile: tuple[int, int]) -> list[list[int]]:
    """The tokens of every tile, tile after tile."""
    return [
        [(top + y) * grid[1] + left + x for y in range(tile[0]) for x in range(tile[1])]
        for top in range(0, grid[0], tile[0])
        for left in range(0, grid[1], tile[1])
    ]


@pytest.mark.parametrize(
    ("grid", "side", "tile"), [((6, 4), 3, (3, 2)), ((8, 8), 8, (8, 8)), ((9, 5), 4, (3, 1))]
)
def test_tiles(grid: tuple[int, int], side: int, tile: tuple[int, int]) -> None:
    tiling = Tiling.of(grid, side)
    assert tiling.tile == tile
    x = tokens(2, grid[0] * grid[1])
    parts = tiling.split(x)
    assert torch.equal(parts, torch.stack([x[:, own] for own in members(grid, tile)], 1))
    assert torch.equal(tiling.join(parts), x)


def test_the_choice_is_the_greedy_one() -> None:
    """Each further token is the one that raises sum_i max_d cos(x_i, x_d) the most."""
    x, tiling = tokens(2, 12), Tiling((3, 4), (3, 2))
    chosen = chosen_tokens(x, tiling, 4)
    for row in range(2):
        for tile, own in enumerate(members((3, 4), (3, 2))):
            part = torch.nn.functional.normalize(x[row, own], dim=-1)
            alike, found = part @ part.T, chosen[row, tile].tolist()
            assert len(set(found)) == 4
            for count, own_choice in enumerate(found):
                before = found[:count]
                worth = {
                    d: float(alike[[*before, d]].amax(0).sum()) for d in range(6) if d not in before
                }
                assert worth[own_choice] >= max(worth.values()) - 1e-6


def test_no_token_is_chosen_twice_where_all_are_equal() -> None:
    chosen = chosen_tokens(torch.ones(1, 6, 3), Tiling((2, 3), (2, 3)), 6)
    assert sorted(chosen.flatten().tolist()) == list(range(6))


def test_merging_and_unmerging_are_those_of_loops() -> None:
    grid, tile = (4, 6), (2, 3)
    x = tokens(2, 24).requires_grad_()
    tiling = Tiling(grid, tile)
    chosen = chosen_tokens(x, tiling, 2)
    groups = soft_groups(x, tiling, chosen, sharpness=3.0)
    own, y = groups.merge(x), tokens(2, 8, 3)
    back = groups.unmerge(y)
    for row in range(2):
        for number, tokens_of in enumerate(members(grid, tile)):
            kept = [tokens_of[i] for i in chosen[row, number].tolist()]
            pairs = [
                [float(torch.cosine_similarity(x[row, k], x[row, i], dim=0)) for i in tokens_of]
                for k in kept
            ]
            a = (3.0 * torch.tensor(pairs, dtype=torch.float64)).softmax(0)
            for d in range(2):
                wanted = sum(a[d, i] * x[row, t] for i, t in enumerate(tokens_of)) / a[d].sum()
                torch.testing.assert_close(own[row, 2 * number + d], wanted, atol=1e-5, rtol=1e-5)
                size = groups.sizes[row, 2 * number + d].double()
                torch.testing.assert_close(size, a[d].sum(), atol=1e-5, rtol=1e-5)
            for i, token in enumerate(tokens_of):
                wanted = sum(a[d, i] * y[row, 2 * number + d] for d in range(2))
                torch.testing.assert_close(back[row, token], wanted, atol=1e-5, rtol=1e-5)
    own.sum().backward()
    assert bool((x.grad != 0).all())
