"""Segments of a picture by its self-attention: tokens whose maps are alike belong together."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.ops.editing.word_maps import to_unit


def clusters(features: Tensor, count: int, iterations: int = 20) -> Tensor:
    """The number of the cluster of each of n features (n, d), (n,), by k-means.

    The first centre is the feature nearest to the mean, each further one the feature farthest from
    all centres before it, so that the same features always give the same clusters.

    Raises:
        ValueError: fewer features than clusters, or no cluster.
    """
    if not 1 <= count <= len(features):
        raise ValueError(
            f"{len(features)} tokens cannot make {count} clusters; give from 1 to that many"
        )
    features = features.double()
    chosen = [int((features - features.mean(0)).square().sum(1).argmin())]
    while len(chosen) < count:
        far = torch.cdist(features, features[chosen]).amin(1)
        chosen.append(int(far.argmax()))
    centres = features[chosen]
    labels = torch.cdist(features, centres).argmin(1)
    for _ in range(iterations):
        for number in range(count):
            if bool((own := labels == number).any()):
                centres[number] = features[own].mean(0)
        after = torch.cdist(features, centres).argmin(1)
        if torch.equal(after, labels):
            break
        labels = after
    return labels


def segments_of_words(labels: Tensor, maps: Tensor, threshold: float) -> Tensor:
    """True at the tokens (n,) of each cluster in which a word's map (n,), `to_unit`, is above
    `threshold` on average. labels (n,): of `clusters`. Localizing Object-level Shape Variations,
    arXiv 2303.11306, section 4.3."""
    own = to_unit(maps[None])[0]
    found = torch.zeros_like(labels, dtype=torch.bool)
    for number in labels.unique():
        inside = labels == number
        found |= inside & (own[inside].mean() > threshold)
    return found
