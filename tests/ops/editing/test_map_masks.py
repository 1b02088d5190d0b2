"""Masks from maps: to_unit, cut at a threshold, in clusters of self-attention."""

from __future__ import annotations

import pytest
import torch

from trainer.ops.editing.map_clusters import clusters, segments_of_words
from trainer.ops.editing.word_maps import WordMaps, mask_above, to_unit


def test_each_row_is_scaled_to_its_own_range() -> None:
    maps = torch.tensor([[[1.0, 3.0], [2.0, 5.0]], [[7.0, 7.0], [7.0, 7.0]]])
    assert to_unit(maps).tolist() == [[[0.0, 0.5], [0.25, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]


def test_a_mask_is_what_lies_above_the_threshold_at_every_size() -> None:
    maps = torch.tensor([[[1.0, 3.0], [2.0, 5.0]]])
    mask = mask_above(maps, (4, 4), 0.3)
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[0, 0, 1, 1]] * 2 + [[0, 0, 1, 1]] * 2
    assert not mask_above(torch.ones(1, 2, 2), (4, 4), 0.3).any()


def test_maps_begin_anew_at_another_size() -> None:
    maps = WordMaps()
    for size in (2, 2, 4, 4, 4):
        maps.add("site", torch.ones(1, size, size))
    assert torch.equal(maps.average(), torch.full((1, 4, 4), 3.0))


def test_clusters_are_found_whatever_the_order() -> None:
    """Three clouds far apart, against which cloud each point was drawn from."""
    drawn = torch.Generator().manual_seed(0)
    cloud = torch.arange(3).repeat_interleave(7)[torch.randperm(21, generator=drawn)]
    points = torch.randn(21, 2, generator=drawn) * 0.1
    points[:, 0] += cloud * 5
    labels = clusters(points, 3)
    pairs = {(int(own), int(other)) for own, other in zip(cloud, labels, strict=True)}
    assert len(pairs) == 3
    assert torch.equal(labels, clusters(points, 3))
    assert clusters(points, 1).tolist() == [0] * 21


def test_segments_are_those_whose_mean_is_above_the_threshold() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2])
    maps = torch.tensor([1.0, 0.0, 0.5, 0.3, 0.1])  # means 0.5, 0.4, 0.1
    assert segments_of_words(labels, maps, 0.45).tolist() == [True, True, False, False, False]
    assert segments_of_words(labels, maps, 0.3).tolist() == [True, True, True, True, False]


def test_more_clusters_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens cannot make 5 clusters; give from 1"):
        clusters(torch.zeros(3, 2), 5)
