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
        self.batches: list[tuple[Tensor, Tensor]] = []

    def add(self, losses: Tensor, levels: Tensor) -> None:
        """Of one batch."""
        self.batches.append((losses.detach(), levels))

    @torch.no_grad()
    def take(self) -> dict[str, float]:
        """The means over all ranks, of the bins that had a sample; losses that are not finite are
        left out. Every rank must call this."""
        if not self.batches:
            return {}
        losses = torch.cat([own.float() for own, _ in self.batches])
        levels = torch.cat([own.to(losses) for _, own in self.batches])
        self.batches = []
        bins = (levels * len(QUANTILES)).long().clamp(0, len(QUANTILES) - 1)
        good = torch.isfinite(losses)
        sums = torch.zeros((2, len(QUANTILES)), device=losses.device)
        sums[0].index_add_(0, bins, torch.where(good, losses, 0))
        sums[1].index_add_(0, bins, good.float())
        totals, counts = summed(sums).tolist()
        return {
            f"train/loss_t{round(level * 1000):03d}": total / count
            for level, total, count in zip(QUANTILES, totals, counts, strict=True)
            if count
        }
