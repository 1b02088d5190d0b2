"""Attention to chosen blocks of keys, and the masks that choose them, against dense attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer.kernels import block_masks, block_sparse
from trainer.kernels.block_masks import BlockMask
from trainer.kernels.block_sparse import ChosenBlocks
from trainer.kernels.softmax import eager


def tensors(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 2, tokens, 3, 4)  # as layers make them, heads after tokens
    made = torch.randn(shape, generator=generator, dtype=dtype)
    return [x.requires_grad_().transpose(1, 2) for x in made]


def dense_of(chosen: ChosenBlocks, heads: int, tokens: int) -> Tensor:
    """Who may attend to whom, (heads, n, n)."""
    size = chosen.size
    count = -(-tokens // size)
    found = torch.zeros(heads, count * size, count * size, dtype=torch.bool)
    for head in range(heads):
        for block, row in enumerate(chosen.index[head % len(chosen.index)].tolist()):
            for place, other in enumerate(row):
                part = True if chosen.visible is None else chosen.visible[block, :, place]
                rows = slice(block * size, (block + 1) * size)
                found[head, rows, other * size : (other + 1) * size] = part
    return found[:, :tokens, :tokens]


@pytest.mark.parametrize("tokens", [12, 11])
@pytest.mark.parametrize("each_head", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_dense_attention_to_the_chosen(
    tokens: int, each_head: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        block_sparse, "GATHERED", 2 * 6 * 3 * 3 * 4
    )  # two blocks of queries at once
    generator = torch.Generator().manual_seed(1)
    heads = 6 if each_head else 1
    index = torch.rand(heads, 4, 3, generator=generator).argsort(-1)  # of blocks 0, 1 and 2
    index[..., 2] = 3  # the last block, which 11 tokens do not fill
    visible = None
    if masked:
        visible = torch.rand(4, 3, 3, 3, generator=generator) < 0.7
        visible[:, :, 0, 0] = True
    chosen = ChosenBlocks(index, 3, visible)
    q, k, v = tensors(tokens)
    own = block_sparse.block_sparse(q, k, v, chosen, 0.4)
    seen = dense_of(chosen, 6, tokens).view(2, 3, tokens, tokens)
    wanted = eager(q, k, v, seen, 0.4)
    torch.testing.assert_close(own, wanted)
    slope = torch.randn(own.shape, generator=generator, dtype=torch.float64)
    found = [torch.autograd.grad((o * slope).sum(), (q, k, v)) for o in (own, wanted)]
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def test_half_precision_is_the_same_up_to_rounding() -> None:
    q, k, v = tensors(12, torch.float32)
    chosen = ChosenBlocks(torch.tensor([[[0, 1], [1, 2], [2, 3], [3, 0]]]), 3)
    wanted = block_sparse.block_sparse(q, k, v, chosen)
    own = block_sparse.block_sparse(*(x.bfloat16() for x in (q, k, v)), chosen=chosen)
    assert own.dtype == torch.bfloat16
    torch.testing.assert_close(own.float(), wanted, atol=0.03, rtol=0.03)
    (slope,) = torch.autograd.grad(own.sum(), v)
    assert bool(slope.any())


def tile_sees(i: tuple[int, int], j: tuple[int, int]) -> bool:
    """Tiles of 2 x 2 in a grid of 8 x 10, one around in every direction, moved inwards."""
    for a, b, count in ((i[0] // 2, j[0] // 2, 4), (i[1] // 2, j[1] // 2, 5)):
        start = min(max(a - 1, 0), count - 3)
        if not start <= b < start + 3:
            return False
    return True


def radial_sees(i: int, j: int) -> bool:
    """Frames of 8 tokens, width 6."""
    (a, k), (b, m) = divmod(i, 8), divmod(j, 8)
    if b == 0:
        return True
    power = int(math.log2(max(abs(a - b), 1)))
    if 2**power <= 6:
        return abs(k - m) + 1 <= 6 / 2**power
    return k == m and abs(a - b) % math.ceil(2**power / 6) == 0


MASKS: dict[str, tuple[int, BlockMask, Callable[[int, int], bool]]] = {
    "sliding_tiles": (
        80,
        block_masks.sliding_tiles((8, 10), (2, 2), 1),
        lambda i, j: tile_sees(divmod(i, 10), divmod(j, 10)),
    ),
    "circle": (
        48,
        block_masks.circle((6, 8), (3, 2), 2.5),
        lambda i, j: (i // 8 - j // 8) ** 2 + (i % 8 - j % 8) ** 2 <= 6.25,
    ),
    "radial": (96, block_masks.radial(12, 8, 6, size=5), radial_sees),
    "everything": (48, block_masks.circle((6, 8), (3, 4), 99), lambda i, j: True),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_their_definitions(name: str) -> None:
    tokens, mask, sees = MASKS[name]
    own = dense_of(mask.chosen, 1, tokens)[0]
    order = list(range(tokens)) if mask.order is None else mask.order.tolist()
    wanted = torch.tensor([[sees(i, j) for j in order] for i in order])
    assert torch.equal(own, wanted)
    assert mask.shown == pytest.approx(float(wanted.float().mean()))
    assert sorted(order) == list(range(tokens))


def test_far_blocks_are_not_gathered() -> None:
    mask = block_masks.circle((16, 16), (4, 4), 2.0)
    assert mask.chosen.index.shape == (1, 16, 9)
    assert block_masks.sliding_tiles((16, 16), (4, 4), 1).chosen.visible is None
