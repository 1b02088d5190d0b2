"""Relative positions of frames in temporal attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention.op import Traits
from trainer.kernels.softmax import attention_probs, attention_scores

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.sites import Site


class RelativeBias(nn.Module):
    """An op of a temporal site: a number for each head and each distance j - i is added to the
    score of frame j for frame i; beyond `reach` frames the last one holds. They start as the
    rows of an embedding do, normal with variance 1, so that heads attend to different frames
    from the start: from zero they would separate slowly.

    Distances are signed, so that frames know before from after.
    """

    name = "relative_bias"

    def __init__(self, site: Site, reach: int, owner: str) -> None:
        super().__init__()
        self.reach, self.traits = reach, Traits(owner=owner)
        self.table = nn.Parameter(torch.randn(site.heads, 2 * reach + 1))

    def bias(self, frames: int) -> Tensor:
        """(h, f, f)"""
        return self.table[:, distances(frames, self.reach, self.table.device)]

    def mask(self, mask: Tensor | None, q: Tensor, k: Tensor, call: SiteCall) -> Tensor:
        bias = self.bias(q.shape[2]).to(q.dtype)
        bias = F.pad(bias, (0, k.shape[2] - q.shape[2]))[None]  # appended keys have no distance
        if mask is None:
            return bias
        if mask.dtype == torch.bool:
            return bias.masked_fill(~mask, float("-inf"))
        return bias + mask


class RelativeVectors(nn.Module):
    """An op of a temporal site: keys and values hold how far they are,

        o_i = sum_j softmax_j(q_i (k_j + a_(j-i))^T / sqrt(d)) (v_j + b_(j-i)),

    Shaw et al., arXiv 1803.02155, equations 3 and 4. a and b (2 reach + 1, d) are shared by the
    heads, as there, and beyond `reach` frames the last one holds.

    What frame i gets of b depends on how many frames there are on either side, whatever they show:
    so the first and the last one differ in noise, too, where a bias moves weight between frames
    that look the same.
    """

    name = "relative_vectors"

    def __init__(self, site: Site, reach: int, owner: str) -> None:
        super().__init__()
        self.reach, self.traits = reach, Traits(owner=owner)
        self.keys = nn.Parameter(torch.randn(2 * reach + 1, site.head_dim))
        self.values = nn.Parameter(torch.randn(2 * reach + 1, site.head_dim))

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: SiteCall
    ) -> Tensor:
        frames, more = q.shape[2], k.shape[2] - q.shape[2]
        distance = distances(frames, self.reach, q.device)
        a, b = (  # i j d; appended keys have no distance
            F.pad(table.to(q.dtype)[distance], (0, 0, 0, more))
            for table in (self.keys, self.values)
        )
        site = call.site
        q = q * (site.head_dim**-0.5 if call.scale is None else call.scale)
        scores = attention_scores(q, k, 1.0) + torch.einsum("bhid,ijd->bhij", q, a)
        probs = attention_probs(scores, mask).to(v.dtype)
        return probs @ v + torch.einsum("bhij,ijd->bhid", probs, b)


RELATIVE = {"bias": RelativeBias, "vectors": RelativeVectors}


def distances(frames: int, reach: int, device: torch.device) -> Tensor:
    """(f, f): the row of frame j for frame i in a table of distances -reach ... reach."""
    number = torch.arange(frames, device=device)
    return (number - number[:, None]).clamp(-reach, reach) + reach
