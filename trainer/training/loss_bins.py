"""The training loss by timestep: a mean for each eighth of the range, by the names that validation
has for its levels, which are the middles of the eighths."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.training.distributed import summed
from trainer.training.module import QUANTILES


class LossBins:
    """Sums losses (b,) at levels (b,) in [0, 1), the shares of the range of timesteps, since they
    were last asked for. Nothing is copied from the device before that."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    @torch.no_grad()
    def add(self, losses: Tensor, levels: Tensor) -> None:
        """Of one batch; those that are not finite are left out."""
        if self.sums is None:
            self.sums = torch.zeros((2, len(QUANTILES)), device=losses.device)
        own, bins = losses.detach().float(), (levels * len(QUANTILES)).long()
        bins = bins.clamp(0, len(QUANTILES) - 1).to(own.device)
        good = torch.isfinite(own)
        self.sums[0].index_add_(0, bins, torch.where(good, own, 0))
        self.sums[1].index_add_(0, bins, good.float())

    def take(self) -> dict[str, float]:
        """The means over all ranks, of the bins that had a sample. Every rank must call this."""
        if self.sums is None:
            return {}
        totals, counts = summed(self.sums).tolist()
        self.sums = None
        return {
            f"train/loss_t{round(level * 1000):03d}": total / count
            for level, total, count in zip(QUANTILES, totals, counts, strict=True)
            if count
        }
