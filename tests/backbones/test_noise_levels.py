"""Noise levels that depend on the size of the picture, against the functions of stock pipelines."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from trainer.backbones.noise_levels import NoiseLevels, even_levels, shift_by_tokens, shift_of
from trainer.backbones.schedulers import set_levels, with_solver

DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 0.9, "shift": 3.0}


@pytest.mark.parametrize("tokens", [64, 256, 1000, 4096, 9000])
def test_mu_is_linear_in_the_tokens(tokens: int) -> None:
    config = DYNAMIC | {"base_image_seq_len": 100, "max_image_seq_len": 2000}
    wanted = calculate_shift(tokens, 100, 2000, 0.3, 0.9)
    assert shift_by_tokens(config, tokens) == pytest.approx(wanted, rel=1e-12)
    assert shift_by_tokens(DYNAMIC, tokens) == pytest.approx(
        calculate_shift(tokens, base_shift=0.3, max_shift=0.9), rel=1e-12
    )
    assert shift_by_tokens({"shift": 3.0}, tokens) is None


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.02])
def test_levels_are_those_a_stock_pipeline_sets(kind: str, terminal: float | None) -> None:
    config: dict[str, Any] = DYNAMIC | {"time_shift_type": kind, "shift_terminal": terminal}
    own, stock = (FlowMatchEulerDiscreteScheduler(**config) for _ in range(2))
    set_levels(own, 5, levels=NoiseLevels(0.7, even_levels(5)), device="cpu")
    retrieve_timesteps(stock, 5, "cpu", sigmas=[1, 0.8, 0.6, 0.4, 0.2], mu=0.7)
    torch.testing.assert_close(own.sigmas, stock.sigmas, rtol=0, atol=1e-6)
    if terminal is None:  # the shift in closed form
        s = shift_of(config, 0.7)
        assert s == (0.7 if kind == "linear" else pytest.approx(math.exp(0.7)))
        levels = torch.tensor([1, 0.8, 0.6, 0.4, 0.2])
        torch.testing.assert_close(own.sigmas[:-1], s * levels / (1 + (s - 1) * levels))


def test_a_fixed_shift_stays_the_schedulers_own() -> None:
    own, stock = (FlowMatchEulerDiscreteScheduler(shift=3.0) for _ in range(2))
    set_levels(own, 7, levels=NoiseLevels(), device="cpu")
    stock.set_timesteps(7)
    assert torch.equal(own.sigmas, stock.sigmas)
    assert shift_of(own.config, 0.7) == 3.0


def test_other_solvers_have_the_shift_of_the_size() -> None:
    own = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    found = with_solver(own, "unipc", mu=0.7)
    stock = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True,
        time_shift_type="exponential",
    )  # fmt: skip
    set_levels(found, 6, levels=NoiseLevels(0.7, even_levels(6)), device="cpu")
    stock.set_timesteps(6, mu=0.7)
    torch.testing.assert_close(found.sigmas, stock.sigmas, rtol=0, atol=1e-5)
