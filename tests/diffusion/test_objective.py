"""The objective against diffusers: noise, targets, timesteps, weights, and every way back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch import Tensor

from trainer.diffusion.objective import (
    TARGETS,
    Objective,
    add_noise,
    alpha_sigma,
    draw_timesteps,
    loss_weight,
    target_of,
    to_noise,
    to_x0,
)

SCHEDULERS = {
    "ddpm-linear": DDPMScheduler(),
    "ddim-scaled": DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    ),
    "ddpm-cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "ddim-zero-snr": DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True),
    "ddpm-short": DDPMScheduler(num_train_timesteps=50),
}
SCALED = SCHEDULERS["ddim-scaled"].alphas_cumprod
FLOW = torch.tensor([1e-3, 1, 120, 250.5, 500, 800, 999], dtype=torch.float64)
PATHS = {"vp": SCALED.double(), "flow": None}

schedulers = pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
targets = pytest.mark.parametrize("target", TARGETS)
paths = pytest.mark.parametrize("alphas", PATHS.values(), ids=PATHS)


def pair(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    x0, noise = torch.randn(2, count, 4, 5, 3, generator=generator, dtype=dtype)
    return x0, noise


def levels(alphas: Tensor | None) -> Tensor:
    """Timesteps from end to end, where no division by zero is."""
    return FLOW if alphas is None else torch.tensor([0, 1, 17, 250, 500, 980, len(alphas) - 1])


@schedulers
def test_vp_path_is_that_of_the_scheduler(scheduler: DDPMScheduler) -> None:
    t = torch.arange(0, len(scheduler.alphas_cumprod), 7)
    t = torch.cat([t, torch.tensor([len(scheduler.alphas_cumprod) - 1])])
    x0, noise = pair(len(t))
    objective = Objective("v", scheduler.alphas_cumprod)
    torch.testing.assert_close(
        add_noise(objective, x0, noise, t), scheduler.add_noise(x0, noise, t), rtol=0, atol=1e-6
    )
    velocity = scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(target_of(objective, x0, noise, t), velocity, rtol=0, atol=1e-6)
    assert target_of(replace(objective, target="eps"), x0, noise, t) is noise
    assert target_of(replace(objective, target="x0"), x0, noise, t) is x0


def test_flow_path_is_that_of_the_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    t = scheduler.timesteps[::90]
    x0, noise = pair(len(t))
    objective = Objective("flow")
    x_t = add_noise(objective, x0, noise, t)
    torch.testing.assert_close(x_t, scheduler.scale_noise(x0, t, noise), rtol=0, atol=1e-6)
    later = add_noise(objective, x0, noise, t + 10)
    slope = (later - x_t) / (10 / 1000)
    torch.testing.assert_close(target_of(objective, x0, noise, t), slope, rtol=0, atol=1e-3)


@paths
def test_half_precision_stays_what_it_is(alphas: Tensor | None) -> None:
    x0, noise = (part.bfloat16() for part in pair(2))
    objective = Objective("v", alphas)
    t = levels(alphas)[2:4]
    x_t = add_noise(objective, x0, noise, t)
    assert {x_t.dtype, target_of(objective, x0, noise, t).dtype} == {torch.bfloat16}
    assert to_x0(objective, noise, x_t, t).dtype == torch.bfloat16


@targets
@paths
def test_every_target_leads_back_to_x0_and_noise(alphas: Tensor | None, target: str) -> None:
    objective, t = Objective(target, alphas), levels(alphas)
    x0, noise = pair(len(t), torch.float64)
    x_t = add_noise(objective, x0, noise, t)
    output = target_of(objective, x0, noise, t)
    torch.testing.assert_close(to_x0(objective, output, x_t, t), x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(to_noise(objective, output, x_t, t), noise, rtol=0, atol=1e-9)


@targets
def test_the_ends_of_the_flow_path_are_exact_where_nothing_is_lost(target: str) -> None:
    objective = Objective(target)
    t = torch.tensor([0.0 if target != "x0" else 1.0, 1000.0 if target != "eps" else 999.0])
    x0, noise = pair(2, torch.float64)
    x_t = add_noise(objective, x0, noise, t.double())
    output = target_of(objective, x0, noise, t.double())
    torch.testing.assert_close(to_x0(objective, output, x_t, t.double()), x0)
    torch.testing.assert_close(to_noise(objective, output, x_t, t.double()), noise)


@schedulers
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_that_of_diffusers(scheduler: DDPMScheduler, gamma: float) -> None:
    t = torch.arange(len(scheduler.alphas_cumprod))
    t = t[scheduler.alphas_cumprod > 0]  # diffusers divides 0 by 0 at zero terminal SNR
    ratio = compute_snr(scheduler, t)
    capped = ratio.clamp(max=gamma)
    for target, wanted in (("eps", capped / ratio), ("v", capped / (ratio + 1)), ("x0", capped)):
        objective = Objective(
            target, scheduler.alphas_cumprod, weighting="min_snr", min_snr_gamma=gamma
        )
        torch.testing.assert_close(loss_weight(objective, t), wanted, rtol=1e-4, atol=1e-7)


@paths
def test_min_snr_weighs_the_same_x0_error_alike_whatever_the_target(alphas: Tensor | None) -> None:
    t = levels(alphas)
    x0, noise = pair(len(t), torch.float64)
    wrong = x0 + pair(len(t) + 1, torch.float64)[0][: len(t)]
    weighted = {}
    for target in TARGETS:
        objective = Objective(target, alphas, weighting="min_snr", min_snr_gamma=5.0)
        alpha, sigma = alpha_sigma(objective, t, 4)
        x_t = add_noise(objective, x0, noise, t)
        output = target_of(objective, wrong, (x_t - alpha * wrong) / sigma, t)
        torch.testing.assert_close(to_x0(objective, output, x_t, t), wrong, rtol=0, atol=1e-8)
        error = (output - target_of(objective, x0, noise, t)).square().mean(dim=(1, 2, 3))
        weighted[target] = loss_weight(objective, t) * error
    alpha, sigma = alpha_sigma(Objective("x0", alphas), t, 1)
    truth = (alpha / sigma).square().clamp(max=5.0) * (wrong - x0).square().mean(dim=(1, 2, 3))
    for target in TARGETS:
        torch.testing.assert_close(weighted[target], truth, rtol=1e-5, atol=0, msg=target)


@pytest.mark.parametrize("weighting", ["none", "min_snr", "sigma_sqrt", "cosmap"])
@targets
def test_weights_are_finite_at_both_ends(target: str, weighting: str) -> None:
    zero_snr = SCHEDULERS["ddim-zero-snr"].alphas_cumprod
    assert zero_snr[-1] == 0
    for objective, t in (
        (Objective(target, zero_snr, weighting=weighting), torch.tensor([0, 999])),
        (Objective(target, weighting=weighting), torch.tensor([0.0, 999.9999])),
    ):
        weights = loss_weight(objective, t)
        assert weights.shape == (2,)
        assert weights.dtype == torch.float32
        assert torch.isfinite(weights).all()
        assert (weights >= 0).all()


def test_min_snr_of_eps_is_one_where_only_noise_is_left() -> None:
    objective = Objective("eps", SCHEDULERS["ddim-zero-snr"].alphas_cumprod, weighting="min_snr")
    assert loss_weight(objective, torch.tensor([999])).item() == 1.0


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_sd3_weightings_are_those_of_diffusers(weighting: str) -> None:
    t = torch.linspace(1, 999.9, 101)
    wanted = compute_loss_weighting_for_sd3(weighting, t / 1000)
    torch.testing.assert_close(loss_weight(Objective("flow", weighting=weighting), t), wanted)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (-1.0, 1.5)], ids=str)
def test_logit_normal_is_distributed_as_in_diffusers(mean: float, std: float) -> None:
    count = 100_000
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", count, mean, std, generator=torch.Generator().manual_seed(0)
    )
    objective = Objective("flow", timesteps="logit_normal", logit_mean=mean, logit_std=std)
    ours = draw_timesteps(objective, torch.rand(count, generator=torch.Generator().manual_seed(1)))
    at = torch.tensor([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    torch.testing.assert_close(ours.div(1000).quantile(at), theirs.quantile(at), rtol=0, atol=0.01)
    middle = draw_timesteps(objective, torch.tensor([0.5])).item() / 1000
    assert middle == pytest.approx(1 / (1 + math.exp(-mean)), abs=1e-5)


def test_uniform_draws_hit_every_timestep_once() -> None:
    u = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(draw_timesteps(Objective("eps", SCALED), u), torch.arange(1000))
    torch.testing.assert_close(draw_timesteps(Objective("flow"), u), torch.arange(1000) + 0.5)


@pytest.mark.parametrize("std", [1.0, 20.0])
@pytest.mark.parametrize("mean", [-4.0, 0.0, 4.0])
@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_timesteps_stay_in_range(timesteps: str, mean: float, std: float) -> None:
    """1.0 is what a draw of 1 - 1e-9 becomes in float32."""
    u = torch.tensor([0.0, 1e-9, 2**-24, 0.3, 0.7, 1 - 2**-24, 1 - 1e-9])
    assert u[-1] == 1.0
    for alphas in (None, SCALED, SCHEDULERS["ddpm-short"].alphas_cumprod):
        objective = Objective("eps", alphas, timesteps, mean, std)
        t = draw_timesteps(objective, u)
        assert t.is_floating_point() == (alphas is None)
        assert t.min() >= 0
        assert t.max() < objective.num_timesteps
        assert (t.diff() >= 0).all()


def test_an_objective_is_plain_unless_it_is_told() -> None:
    """SD3's logit-normal has mean 0 and deviation 1, and min-SNR a gamma of 5, as in the papers."""
    assert Objective("eps") == Objective(
        "eps",
        alphas_cumprod=None,
        timesteps="uniform",
        logit_mean=0.0,
        logit_std=1.0,
        weighting="none",
        min_snr_gamma=5.0,
        offset_noise=0.0,
    )


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_a_shift_moves_timesteps_towards_the_noise(timesteps: str) -> None:
    """SD3, equation 23, after the draw."""
    u = torch.tensor([0.1, 0.25, 0.5, 0.9])
    plain = draw_timesteps(Objective("flow", timesteps=timesteps), u) / 1000
    moved = draw_timesteps(Objective("flow", timesteps=timesteps, shift=3.0), u) / 1000
    torch.testing.assert_close(moved, 3 * plain / (1 + 2 * plain))
    assert float(draw_timesteps(Objective("flow", shift=3.0), torch.tensor([0.5]))) == 750
