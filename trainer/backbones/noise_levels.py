r"""Which noise levels a sampler goes through, where these depend on the size of the picture.

A flow's levels sigma in (0, 1] are shifted towards the noise, the more so the larger the picture:

    sigma' = s sigma / (1 + (s - 1) sigma),   s = exp(mu)      arXiv 2403.03206, equation 23

A fixed s is a scheduler's `shift`. With `use_dynamic_shifting` mu is linear in the number of image
tokens n: base_shift at base_image_seq_len, max_shift at max_image_seq_len. Which timesteps are
trained is the recipe's choice, `objective.shift`, and does not follow from this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# frames, height and width of the latents of a picture or clip
Extent = tuple[int, int, int]


@dataclass(frozen=True)
class NoiseLevels:
    """What a pipeline asks of its scheduler. mu: of the shift, see above; None for the scheduler's
    own. sigmas: the levels before they are shifted, the noisiest first; None for the scheduler's
    own."""

    mu: float | None = None
    sigmas: tuple[float, ...] | None = None


def shift_by_tokens(config: Mapping[str, Any], tokens: int) -> float | None:
    """mu for so many image tokens, by the config of a flow's scheduler; None where that shifts all
    sizes alike."""
    if not config.get("use_dynamic_shifting"):
        return None
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (most - least) / (high - low)
    return float(tokens * slope + (least - slope * low))


def levels_by_tokens(backbone: Any, steps: int, extent: Extent) -> NoiseLevels:
    """Even levels, shifted by the number of image tokens: what most pipelines of transformers ask
    for, a `levels` of a `Family`."""
    mu = shift_by_tokens(backbone.scheduler_config, backbone.image_tokens(extent))
    return NoiseLevels(mu, even_levels(steps))


def even_levels(steps: int) -> tuple[float, ...]:
    """1, 1 - 1/n, ..., 1/n for n steps, as most pipelines of transformers give them."""
    import numpy as np

    return tuple(np.linspace(1.0, 1 / steps, steps).tolist())


def shift_of(config: Mapping[str, Any], mu: float | None) -> float:
    """s of a flow's scheduler: its own, or with dynamic shifting that of mu."""
    if mu is None or not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or 1.0)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def shifted(sigma: Any, shift: float) -> Any:
    """Levels, a number or a tensor, shifted by s."""
    return shift * sigma / (1 + (shift - 1) * sigma)
