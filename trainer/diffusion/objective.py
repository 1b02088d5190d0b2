r"""What the network learns to predict: path, target, timesteps, weighting, as pure functions.

A path gives x_t = alpha(t) x0 + sigma(t) noise. Every target is a linear combination of the two:

    eps  = noise
    v    = alpha noise - sigma x0     arXiv 2202.00512, appendix D
    flow = noise - x0                 arXiv 2209.03003

and every prediction converts to x0 (`to_x0`), from which the others follow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.backbones.noise_levels import shifted

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone

TARGETS = ("eps", "v", "x0", "flow")
ALMOST_ONE = 1 - 2**-24  # the float32 below 1, to which a draw just under 1 may have been rounded


@dataclass(frozen=True)
class Objective:
    """alphas_cumprod (T,) fixes the discrete VP path; None is the flow path alpha = 1 - t, sigma =
    t.

    shift: s of t' = s t / (1 + (s - 1) t) on the flow path, which moves the timesteps that are
    trained towards the noise (arXiv 2403.03206, equation 23). It is the recipe's alone: what
    sampling shifts by, see `noise_levels`, is not taken over. Trainers differ here: the scripts of
    diffusers train on the timesteps of the folder's scheduler, shifted where its shift is fixed and
    not where it depends on the size.
    """

    target: str
    alphas_cumprod: Tensor | None = None
    timesteps: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    weighting: str = "none"
    min_snr_gamma: float = 5.0
    offset_noise: float = 0.0
    shift: float = 1.0

    @classmethod
    def of(cls, backbone: Backbone) -> Objective:
        """What a backbone's output means, and on which path."""
        return cls(backbone.target, backbone.alphas_cumprod)

    @property
    def num_timesteps(self) -> int:
        return 1000 if self.alphas_cumprod is None else len(self.alphas_cumprod)


def draw_timesteps(objective: Objective, u: Tensor) -> Tensor:
    """u (b,) uniform in [0, 1) to timesteps (b,): integers 0..T-1 on a VP path, floats in [0, T) on
    the flow path.

    logit_normal: t = sigmoid(mean + std * z), z = Phi^-1(u) (SD3, arXiv 2403.03206, equation 19),
    before the shift.
    """
    if objective.timesteps == "logit_normal":
        z = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-6, 1 - 1e-6))
        u = torch.sigmoid(objective.logit_mean + objective.logit_std * z)
    if objective.shift != 1:
        u = shifted(u, objective.shift)
    t = u.clamp(max=ALMOST_ONE) * objective.num_timesteps
    return t if objective.alphas_cumprod is None else t.long()


def alpha_sigma(objective: Objective, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """alpha and sigma at timesteps t (b,), each (b, 1, ..., 1) with `ndim` axes."""
    if objective.alphas_cumprod is None:
        sigma = t / objective.num_timesteps
        alpha = 1 - sigma
    else:
        squared = objective.alphas_cumprod.to(t.device)[t.long()]
        alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
    shape = (-1, *[1] * (ndim - 1))
    return alpha.reshape(shape), sigma.reshape(shape)


def add_noise(objective: Objective, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t (b, ...) from x0 and noise (b, ...)."""
    alpha, sigma = alpha_sigma(objective, t, x0.ndim)
    return alpha.to(x0.dtype) * x0 + sigma.to(x0.dtype) * noise


def target_of(objective: Objective, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network should output for (x_t, t)."""
    if objective.target == "eps":
        return noise
    if objective.target == "x0":
        return x0
    if objective.target == "flow":
        return noise - x0
    alpha, sigma = alpha_sigma(objective, t, x0.ndim)
    return alpha.to(x0.dtype) * noise - sigma.to(x0.dtype) * x0


def to_x0(objective: Objective, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The x0 (b, ...) that a network output at (x_t, t) means."""
    alpha, sigma = (part.to(x_t.dtype) for part in alpha_sigma(objective, t, x_t.ndim))
    if objective.target == "x0":
        return output
    if objective.target == "eps":
        return (x_t - sigma * output) / alpha
    if objective.target == "flow":
        return (x_t - sigma * output) / (alpha + sigma)
    return (alpha * x_t - sigma * output) / (alpha.square() + sigma.square())


def from_x0(objective: Objective, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The network output (b, ...) that means x0 at (x_t, t): the inverse of `to_x0`."""
    if objective.target == "x0":
        return x0
    alpha, sigma = (part.to(x_t.dtype) for part in alpha_sigma(objective, t, x_t.ndim))
    return target_of(objective, x0, (x_t - alpha * x0) / sigma, t=t)


def to_noise(objective: Objective, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The noise (b, ...) that a network output at (x_t, t) means; from the output itself where
    dividing would lose it."""
    if objective.target == "eps":
        return output
    alpha, sigma = (part.to(x_t.dtype) for part in alpha_sigma(objective, t, x_t.ndim))
    if objective.target == "v":
        return (sigma * x_t + alpha * output) / (alpha.square() + sigma.square())
    if objective.target == "flow":
        return (x_t + alpha * output) / (alpha + sigma)
    return (x_t - alpha * output) / sigma


def snr(objective: Objective, t: Tensor) -> Tensor:
    """alpha^2 / sigma^2 at t (b,)."""
    alpha, sigma = alpha_sigma(objective, t, 1)
    return (alpha / sigma).square()


def loss_weight(objective: Objective, t: Tensor) -> Tensor:
    """Weight (b,) of each sample's squared error, in the units of the target.

    min_snr: min(snr, gamma) on the x0 error (arXiv 2303.09556, section 3.4), carried over to the
    target in use. sigma_sqrt, cosmap: the flow weightings of SD3 (arXiv 2403.03206, section 3.1), t
    = sigma.
    """
    if objective.weighting == "none":
        return torch.ones_like(t, dtype=torch.float32)
    alpha, sigma = alpha_sigma(objective, t, 1)
    if objective.weighting == "min_snr":
        ratio = snr(objective, t).float()
        if objective.target == "eps":  # min(snr, gamma) / snr, and its limit 1 where snr is 0
            return (objective.min_snr_gamma / ratio).clamp(max=1)
        capped = ratio.clamp(max=objective.min_snr_gamma)
        if objective.target == "x0":
            return capped
        # the x0 error over the target's; alpha^2 + sigma^2 is 1 on the VP path only
        norm = alpha.square() + sigma.square() if objective.target == "v" else alpha + sigma
        return capped * (sigma / norm).square().float()
    if objective.weighting == "sigma_sqrt":
        return sigma.float().clamp(min=1e-3) ** -2
    return (2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))).float()
