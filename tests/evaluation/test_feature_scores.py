"""Scores of features, by hand and by plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.evaluation.feature_scores import alike, diversity, kernel_distance, text_alignment


def drawn(count: int, seed: int, move: float = 0.0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + move


def test_alike_is_the_mean_over_all_pairs() -> None:
    """Of the four pairs the cosines are 1, 0, 0.6 and 0.8, whatever the lengths."""
    one = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    assert alike(one, torch.tensor([[5.0, 0.0], [0.0, 0.1]])) == pytest.approx(
        (1 + 0 + 0.6 + 0.8) / 4
    )


def test_text_alignment_is_of_each_picture_and_its_own_text() -> None:
    pictures = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    texts = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    assert text_alignment(pictures, texts) == pytest.approx((0.6 + 0.0) / 2)
    assert text_alignment(pictures, texts.flip(0)) == pytest.approx((1.0 + 0.8) / 2)


def test_diversity_is_of_pairs_of_one_prompt() -> None:
    """The pairs of a have the cosines 0, 0.6 and 0.8, the pair of b has -1."""
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [3.0, 4.0], [0.0, -1.0]])
    prompts = ["a", "a", "b", "a", "b"]
    assert diversity(features, prompts) == pytest.approx(1 - (0 + 0.6 + 0.8 - 1) / 4)
    assert diversity(features[:3], ["a", "b", "c"]) is None


def squared_discrepancy(real: Tensor, made: Tensor) -> float:
    """The unbiased estimate of Binkowski et al., with their cubic kernel, in plain loops."""

    def kernel(x: Tensor, y: Tensor) -> float:
        return (sum(float(a) * float(b) for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3

    n, m = len(real), len(made)
    within = sum(kernel(real[i], real[j]) for i in range(n) for j in range(n) if i != j)
    other = sum(kernel(made[i], made[j]) for i in range(m) for j in range(m) if i != j)
    across = sum(kernel(x, y) for x in real for y in made)
    return within / (n * (n - 1)) + other / (m * (m - 1)) - 2 * across / (n * m)


@pytest.mark.parametrize("move", [0.0, 0.5])
def test_kid_of_equal_numbers_is_the_unbiased_estimate(move: float) -> None:
    real, made = drawn(11, 0), drawn(11, 1, move)
    assert kernel_distance(real, made) == pytest.approx(squared_discrepancy(real, made), rel=1e-6)


def test_kid_of_unequal_numbers_is_a_mean_over_subsets() -> None:
    real, made = drawn(10, 0), drawn(40, 1, 0.5)
    before = torch.get_rng_state()
    found = kernel_distance(real, made)
    assert found == kernel_distance(real, made)
    assert torch.equal(torch.get_rng_state(), before)
    assert found == pytest.approx(squared_discrepancy(real, made), rel=0.2)
    assert kernel_distance(made, real) == pytest.approx(found, rel=0.2)


def test_kid_of_a_few_is_not_told() -> None:
    assert kernel_distance(drawn(9, 0), drawn(40, 1)) is None
    assert kernel_distance(drawn(40, 0), drawn(9, 1)) is None
