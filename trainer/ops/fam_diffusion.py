"""FAM diffusion: pictures above the size a model was trained at, in the layout and with the
attention of one at that size.

    z <- F^-1[K F(z) + (1 - K) F(z_native)]     after each step, K = r at low frequencies, 1 above
    A <- (1 - w) A + w up(A_native)             self-attention of the decoder's coarsest layers

Yang et al., arXiv 2411.18552, sections 3.2 (frequency modulation) and 3.3 (attention modulation):
the picture is first made at the native size, enlarged, and noised to every level (z_native); r is
the share of the steps that are done, so that layout comes from the native picture early and detail
is free; A_native are the maps of the native picture at the same step. Its released constants: w and
the low-pass share 0.5. The picture is enlarged as latents, bicubic, where the paper decodes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.attention.bank import FeatureBank
from trainer.attention.op import Op, Traits
from trainer.ops.editing.installed import edited_sites
from trainer.ops.editing.word_reader import TARGET

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.context import StepContext
    from trainer.attention.hooks import Prediction, Sampler
    from trainer.attention.sites import Site

Grid = tuple[int, int]


@dataclass(frozen=True)
class Enlargement:
    """factor: how many times larger than native; weight: w; low_pass: the share of frequencies that
    count as low, 0 for none."""

    owner: str
    sites: str
    factor: int = 2
    weight: float = 0.5
    low_pass: float = 0.5


class Modulation:
    """An op of self-attention, and hooks that make the native picture first; `bank` has its
    maps."""

    def __init__(self, told: Enlargement, bank: FeatureBank) -> None:
        self.told, self.bank = told, bank
        self.name = f"{told.owner}_maps"
        self.traits = Traits(owner=told.owner, scores=True)
        self.native = False
        self.grids: dict[str, Grid] = {}  # of the native picture, by site
        self.levels: list[tuple[float, float]] = []
        self.enlarged: Tensor | None = None
        self.noise: Tensor | None = None

    def begin(self, sampler: Sampler) -> Mapping[Op, Sequence[Site]]:
        if not self.told.weight:
            return {}
        return {self: edited_sites(sampler, self.told.sites, kinds=("self",), op=self)}

    def end(self) -> None:
        self.bank.clear()
        self.enlarged = self.noise = None
        self.levels, self.grids = [], {}

    def start(self, x_t: Tensor, sampler: Sampler) -> tuple[Tensor, int]:
        """A hook of the sampler: makes the native picture from the corner of the noise
        (b, c, h, w), and begins from that picture, enlarged and noised."""
        factor = self.told.factor
        size = (x_t.shape[-2], x_t.shape[-1])
        if any(side % factor for side in size):
            raise ValueError(
                f"methods.{self.told.owner}: factor={factor} does not divide the latents' size of "
                f"{size[0]}x{size[1]}; give another size"
            )
        steps = sampler.steps
        self.native = True
        try:
            made = sampler(x_t[..., : size[0] // factor, : size[1] // factor], 0, steps)
        finally:
            self.native = False
        self.levels = [sampler.level(step) for step in range(steps)] + [(1.0, 0.0)]
        self.noise = x_t
        self.enlarged = F.interpolate(made, size=size, mode="bicubic")
        return self._noised(0), 0

    def _noised(self, step: int) -> Tensor:
        """The native picture (b, c, h, w), enlarged, at the level before a step."""
        assert self.enlarged is not None and self.noise is not None
        alpha, sigma = self.levels[step]
        return alpha * self.enlarged + sigma * self.noise

    def gate(self, q: Tensor, call: SiteCall) -> bool:
        return TARGET in call.ctx.groups.slices

    @torch.compiler.disable  # it reads the step: compiled, every step would recompile
    def probs(self, probs: Tensor, call: SiteCall) -> Tensor:
        ctx, place = call.ctx, call.site.name
        grid = call.grid(probs.shape[2], f"methods.{self.told.owner}")
        if self.native:
            self.grids[place] = grid
            self.bank.put(ctx.step, place, {"maps": probs})
            return probs
        if (ctx.step, place) not in self.bank:
            return probs
        kept = self.bank.get(ctx.step, place, like=probs)["maps"]
        return probs.lerp(enlarged_maps(kept, self.grids[place], grid), self.told.weight)

    def after_step(self, x_t: Tensor, prediction: Prediction, ctx: StepContext) -> Tensor:
        """A hook of the sampler: x_t (b, c, h, w) with the layout of the native picture."""
        if self.native or self.enlarged is None or not self.told.low_pass:
            return x_t
        done = (ctx.step + 1) / ctx.num_steps
        return mixed_frequencies(x_t, self._noised(ctx.step + 1), self.told.low_pass, own=done)


def enlarged_maps(maps: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Attention maps (rows, heads, n, n) of a grid at a larger one, bilinear in queries and keys;
    every query's weights still add up to 1."""
    rows, heads = maps.shape[:2]
    own = maps.flatten(0, 1)  # r n n
    queries = own.transpose(1, 2).unflatten(2, grid)  # r keys h w
    queries = F.interpolate(queries, size=size, mode="bilinear").flatten(2).transpose(1, 2)
    keys = F.interpolate(queries.unflatten(2, grid), size=size, mode="bilinear").flatten(2)
    found = keys / keys.sum(-1, keepdim=True)
    return found.unflatten(0, (rows, heads))


def mixed_frequencies(x: Tensor, other: Tensor, low_pass: float, *, own: float) -> Tensor:
    """x (b, c, h, w), of whose low frequencies a share `own` stays and the rest is `other`'s.
    low_pass: the share of frequencies along each side that are low."""
    height, width = x.shape[-2:]
    rows, columns = torch.fft.fftfreq(height).abs(), torch.fft.fftfreq(width).abs()
    low = (rows[:, None] < low_pass / 2) & (columns[None] < low_pass / 2)
    keep = torch.where(low, own, 1.0).to(x.device)
    mixed = keep * torch.fft.fft2(x.float()) + (1 - keep) * torch.fft.fft2(other.float())
    return torch.fft.ifft2(mixed).real.to(x)
