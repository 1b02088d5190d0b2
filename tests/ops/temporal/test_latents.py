"""Motion of latents: translations, noise put back, the pull to the frame before, each against a
formula of another kind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.attention.context import StepContext
from trainer.attention.hooks import Prediction
from trainer.ops.temporal.latents import (
    GlobalMotion,
    LatentGuidance,
    noised_again,
    step_at,
    translated,
)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, -3), (-1, 6), (9, 0), (-4, -13)])
def test_a_translation_is_a_sampled_grid(down: int, right: int) -> None:
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    rows = (2 * (torch.arange(4) + down) + 1) / 4 - 1
    columns = (2 * (torch.arange(6) + right) + 1) / 6 - 1
    grid = torch.stack(
        [columns.expand(4, 6), rows[:, None].expand(4, 6)], -1
    )  # x before y, from -1 to 1 between the edges
    wanted = F.grid_sample(
        x, grid.expand(2, -1, -1, -1), "nearest", "reflection", align_corners=False
    )
    assert torch.equal(translated(x, down, right), wanted)


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_noise_put_back_makes_the_level(path: str) -> None:
    """Of x0 and noise that are known, both parts are as at the noisier level."""
    levels = {
        "vp": ((0.8, 0.6), (0.28, 0.96)),
        "flow": ((0.75, 0.25), (0.1, 0.9)),
    }[path]
    now, then = levels
    x0, noise, fresh = torch.eye(3, dtype=torch.float64)
    x = noised_again(now[0] * x0 + now[1] * noise, fresh, now, then)
    assert float(x[0]) == pytest.approx(then[0])
    assert float(x[1:].square().sum().sqrt()) == pytest.approx(then[1])
    assert torch.equal(noised_again(x, fresh, then, then), x)


class Halving:
    """A sampler of clips of three frames, whose steps halve the latents."""

    steps, frames, given = 10, 3, False

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []

    def __call__(self, x_t: Tensor, first: int, last: int) -> Tensor:
        self.calls.append((len(x_t), first, last))
        return x_t * 0.5 ** (last - first)

    def level(self, step: int) -> tuple[float, float]:
        sigma = 1 - step / self.steps
        return (1 - sigma**2) ** 0.5, sigma


def test_the_first_frame_begins_alone_and_the_others_are_it_moved() -> None:
    noise = torch.randn(6, 2, 4, 8, generator=torch.Generator().manual_seed(0))  # two clips
    sampler = Halving()
    x, step = GlobalMotion(1 / 8, -1 / 4, 0.2, 0.5).begin(noise, sampler)
    assert step == 2
    assert sampler.calls == [(2, 0, 2), (2, 2, 5)]
    for clip in range(2):
        first = noise[3 * clip]
        assert torch.equal(x[3 * clip], first / 4)
        for k in (1, 2):
            moved = translated(first / 32, -k, k)
            own = noise[3 * clip + k]
            wanted = noised_again(moved, own, sampler.level(5), sampler.level(2))
            torch.testing.assert_close(x[3 * clip + k], wanted)


def test_pictures_and_given_latents_begin_where_they_are() -> None:
    noise = torch.randn(6, 2, 4, 8)
    for name, value in (("frames", 1), ("given", True)):
        sampler = Halving()
        setattr(sampler, name, value)
        x, step = GlobalMotion(1 / 8, -1 / 4, 0.2, 0.5).begin(noise, sampler)
        assert step == 0 and torch.equal(x, noise) and not sampler.calls


@pytest.mark.parametrize(
    ("steps", "share", "wanted"),
    [(50, 0.04, 2), (50, 0.1, 5), (12, 0.04, 1), (12, 0.0, 0), (10, 0.99, 9), (1, 0.1, 0)],
)
def test_a_share_of_few_steps(steps: int, share: float, wanted: int) -> None:
    assert step_at(steps, share) == wanted


def at(step: int, frames: int) -> StepContext:
    return StepContext(step, 10, torch.tensor(0), frames)


def means(x0: Tensor) -> Prediction:
    """One whose x0 is this."""
    same = lambda output, x_t: output  # noqa: E731
    return Prediction(
        x0, {}, x0, same, revert=same, find_level=lambda: (torch.ones(1), torch.zeros(1))
    )


def test_guidance_is_the_gradient_of_a_distance() -> None:
    x_t, x0 = (torch.randn(6, 2, 3, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    own = LatentGuidance(10.0, 0.5).after_step(x_t, means(x0), at(1, 3))
    for i in range(6):
        if i % 3 == 0:
            assert torch.equal(own[i], x_t[i])
            continue
        leaf = x0[i].clone().requires_grad_()
        F.mse_loss(leaf, x0[i - 1]).backward()
        assert leaf.grad is not None
        torch.testing.assert_close(own[i], x_t[i] - 10 * leaf.grad)


def test_guidance_ends_after_its_share_and_passes_pictures_by() -> None:
    x = torch.randn(2, 1, 2, 2)
    guide = LatentGuidance(10.0, 0.5)
    assert not torch.equal(guide.after_step(x, means(x), at(4, 2)), x)
    assert torch.equal(guide.after_step(x, means(x), at(5, 2)), x)
    assert torch.equal(guide.after_step(x, means(x), at(4, 1)), x)
