"""How Lightning trains: on which devices together, and in which precision."""

from __future__ import annotations

import torch
from lightning.pytorch.plugins.precision.amp import MixedPrecision
from lightning.pytorch.strategies import (
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from trainer.config.run_section import RunSpec


def strategy_of(run: RunSpec, device: torch.device) -> Strategy | str:
    """How Lightning trains on the devices of a run."""
    ranks = run.devices * run.nodes
    if run.shards:
        return ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    return "ddp" if ranks > 1 else SingleDeviceStrategy(device)


def mixed_precision(dtype: torch.dtype, device: torch.device) -> MixedPrecision | None:
    """Lightning's plugin for half precision; None for fp32. In fp16, whose small gradients would be
    0, the loss is scaled, on a CPU too: there Lightning by itself would take bf16 instead."""
    if dtype == torch.float32:
        return None
    if dtype == torch.bfloat16:
        return MixedPrecision("bf16-mixed", device.type)
    return MixedPrecision("16-mixed", device.type, torch.amp.GradScaler(device.type))
