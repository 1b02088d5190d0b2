"""Maps of words over steps and sites, and the masks they make."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.ops.editing.word_maps import WordMaps, word_mask


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_average_is_over_the_steps_and_the_sites_of_the_finest_grid() -> None:
    maps = WordMaps(16)
    one, two, coarse = drawn(3, 2, 4, 4), drawn(3, 2, 4, 4, seed=1), drawn(3, 2, 2, 2)
    for step in range(3):
        maps.add("one", one[step])
        maps.add("two", two[step])
        maps.add("coarse", coarse[step])
    torch.testing.assert_close(maps.average(), (one.sum(0) + two.sum(0)) / 2)
    assert maps.takes(16) and not maps.takes(17)


def test_no_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has at most 9 tokens.*give more blend_tokens"):
        WordMaps(9).average()


@pytest.mark.parametrize("size", [(6, 9), (3, 3), (12, 6)])
def test_a_mask_is_what_loops_over_its_cells_give(size: tuple[int, int]) -> None:
    maps = drawn(2, 3, 3)
    found = word_mask(maps, size, 0.6)
    assert found.shape == (2, 1, *size) and found.dtype == torch.bool
    for row in range(2):
        grown = torch.zeros(3, 3)
        for y in range(3):
            for x in range(3):
                near = [
                    float(maps[row, b, a])
                    for b in range(max(0, y - 1), min(3, y + 2))
                    for a in range(max(0, x - 1), min(3, x + 2))
                ]
                grown[y, x] = max(near)
        for y in range(size[0]):
            for x in range(size[1]):
                own = grown[y * 3 // size[0], x * 3 // size[1]]
                assert bool(found[row, 0, y, x]) == bool(own / grown.max() > 0.6)
    assert found.any() and not found.all()


def test_each_row_has_its_own_largest_value_and_one_of_zeros_is_empty() -> None:
    maps = torch.zeros(3, 8, 8)
    maps[0, 1, 1], maps[1, 6, 6] = 100, 0.01
    found = word_mask(maps, (8, 8), 0.3)[:, 0]
    assert found.flatten(1).sum(1).tolist() == [9, 9, 0]
    assert found[1, 5:8, 5:8].all()
