"""Scores of pictures from the features (n, d) that a judge gives them. Plain functions of tensors.

DreamBooth (arXiv:2208.12242, sections 4.1 and 4.3) defines CLIP-I, DINO, CLIP-T, PRES and DIV; KID
is that of Binkowski et al. (arXiv:1801.01401).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.pairwise import pairwise_cosine_similarity
from torchmetrics.image.kid import KernelInceptionDistance

LEAST = 10  # pictures on each side; the KID of fewer is mostly chance
MOST = 1000  # pictures of a subset, as in the paper
SUBSETS = 100


def alike(one: Tensor, other: Tensor) -> float:
    """The mean cosine of all pairs of features (n, d) and (m, d): CLIP-I and DINO of generated
    pictures and photos, PRES of generated pictures of the plain class and photos."""
    return float(pairwise_cosine_similarity(one, other).mean())


def text_alignment(pictures: Tensor, texts: Tensor) -> float:
    """CLIP-T: the mean cosine of each picture and its own text, both (n, d). CLIPScore
    (arXiv:2104.08718) is a hundred times that, of cosines above 0."""
    return float(F.cosine_similarity(pictures, texts).mean())


def diversity(features: Tensor, prompts: Sequence[str]) -> float | None:
    """DIV: how unlike the pictures of one prompt are, 1 - the mean cosine of all pairs of features
    (n, d) that share their prompt; None without a pair. DreamBooth takes LPIPS, whose network is
    another one, so its figures are not on this scale."""
    unit = F.normalize(features, dim=-1)
    cosines: list[Tensor] = []
    for prompt in dict.fromkeys(prompts):
        rows = [row for row, own in enumerate(prompts) if own == prompt]
        first, second = torch.triu_indices(len(rows), len(rows), offset=1)
        own = unit[rows]
        cosines.append((own[first] * own[second]).sum(-1))
    every = torch.cat(cosines)
    return float(1 - every.mean()) if len(every) else None


def kernel_distance(real: Tensor, generated: Tensor) -> float | None:
    """KID: the squared maximum mean discrepancy of two sets of features (n, d) and (m, d) by the
    kernel (x y / d + 1)^3, the mean over subsets of as many as the smaller set has; 0 in the mean
    where both come from one distribution, so it can be below. None for fewer than `LEAST`."""
    smaller = min(len(real), len(generated))
    if smaller < LEAST:
        return None
    # the features are given, so there is no network to run
    metric = KernelInceptionDistance(
        feature=nn.Identity(), subsets=SUBSETS, subset_size=min(smaller, MOST)
    )
    metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # it draws its subsets from the global state
        torch.manual_seed(0)
        return float(metric.compute()[0])
