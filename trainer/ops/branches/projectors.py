"""From what an image encoder sees to tokens that attention reads, in the two forms of IP-Adapter
(Ye et al., arXiv 2308.06721, section 3.2.1, and its released Plus models). The parameters are named
as in the released files."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.backbones.image_encoder import Seen

HEAD_DIM = 64  # of the resampler's attention: readers of released files assume it


class PooledProjector(nn.Module):
    """tokens = norm(proj(pooled)), split into `count` tokens: `Seen` of n pictures to (n, count,
    width)."""

    def __init__(self, pooled: int, *, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.proj = nn.Linear(pooled, count * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, seen: Seen) -> Tensor:
        made: Tensor = self.norm(self.proj(seen.pooled).unflatten(1, (self.count, -1)))
        return made


class ResamplerAttention(nn.Module):
    """Latent queries (n, l, c) attend to the picture's tokens and themselves, all normalised."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * HEAD_DIM
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        keys, values = self.to_kv(torch.cat([self.norm1(x), latents], 1)).chunk(2, dim=-1)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(latents), keys, values)
        )
        o = F.scaled_dot_product_attention(q, k, v)
        made: Tensor = self.to_out(o.transpose(1, 2).flatten(2))
        return made


class Resampler(nn.Module):
    """`depth` blocks of attention and a feed-forward layer over `count` learned queries: `Seen` of
    n pictures to (n, count, width). tokens: the width of the picture's tokens; inner: that of the
    blocks."""

    def __init__(
        self, tokens: int, *, width: int, count: int, inner: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.count = count
        self.latents = nn.Parameter(torch.randn(1, count, inner) / inner**0.5)
        self.proj_in, self.proj_out = nn.Linear(tokens, inner), nn.Linear(inner, width)
        self.norm_out = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.ModuleList([ResamplerAttention(inner, heads), _feed_forward(inner)])
            for _ in range(depth)
        )

    def forward(self, seen: Seen) -> Tensor:
        x, latents = self.proj_in(seen.tokens), self.latents.repeat(len(seen.tokens), 1, 1)
        for block in self.layers:
            attention, feed = cast(nn.ModuleList, block)
            latents = attention(x, latents) + latents
            latents = feed(latents) + latents
        made: Tensor = self.norm_out(self.proj_out(latents))
        return made


def _feed_forward(width: int) -> nn.Sequential:
    """4 times as wide inside."""
    layers = (
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        nn.GELU(),
        nn.Linear(4 * width, width, bias=False),
    )
    return nn.Sequential(*layers)
