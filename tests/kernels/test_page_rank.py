"""The map of attention, the importance of tokens and who gives pruned ones back, against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.kernels.page_rank import attention_map, donors, page_rank


def heads(count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, count, 4, generator=generator, dtype=torch.float64)
    return q, k


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_map_is_the_mean_over_heads(
    stride: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.kernels.page_rank.SCORES", 2 * 3 * 7 * 2)  # two rows at once
    q, k = heads()
    own = attention_map(q, k, scale, stride=stride)
    rows = range(0, 7, stride)
    assert own.shape == (2, len(rows), 7)
    for b in range(2):
        for place, i in enumerate(rows):
            s = 0.5 if scale is None else scale
            wanted = sum((k[b, h] @ q[b, h, i] * s).softmax(0) for h in range(3)) / 3
            torch.testing.assert_close(own[b, place].double(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_importance_is_that_of_a_loop(stride: int) -> None:
    q, k = heads()
    a = attention_map(q, k, stride=stride)
    own = page_rank(a, stride=stride, iterations=3)
    s = [1 / 7] * 7
    for _ in range(3):
        s = [sum(float(a[1, i, j]) * s[i * stride] for i in range(a.shape[1])) for j in range(7)]
        s = [x / sum(s) for x in s]
    torch.testing.assert_close(own[1], torch.tensor(s))


def test_it_comes_to_the_left_eigenvector_and_leaves_what_is_uniform() -> None:
    q, k = heads()
    a = attention_map(q, k)
    s = page_rank(a, iterations=60)
    torch.testing.assert_close((s[:, None] @ a)[:, 0], s, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(s.sum(1), torch.ones(2))
    uniform = page_rank(torch.full((1, 5, 5), 0.2), iterations=4)
    torch.testing.assert_close(uniform, torch.full((1, 5), 0.2))


def test_a_donor_is_the_kept_token_of_the_largest_geometric_mean() -> None:
    q, k = heads()
    kept, left = torch.tensor([[0, 2, 5, 6], [1, 2, 3, 4]]), torch.tensor([[1, 3, 4], [0, 5, 6]])
    own = donors(q, k, kept=kept, left=left)
    for b in range(2):
        for place, i in enumerate(left[b].tolist()):
            logs = sum((k[b, h] @ q[b, h, i] * 0.5).softmax(0).log() for h in range(3))
            best = max(range(4), key=lambda j: float(logs[kept[b, j]]))
            assert int(own[b, place]) == best
