"""The task `denoise`: what noise, timestep and text images and the frames of clips meet, and what
its step tells extra losses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.context import current
from trainer.common.seeds import seed_of
from trainer.data.loader import Batch
from trainer.diffusion.objective import Objective, add_noise, alpha_sigma, loss_weight, target_of
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.training.tasks import denoise as module
from trainer.training.tasks.denoise import Denoise, mean_per_sample


def batch_of(count: int, frames: int, channels: int, **more: Any) -> Batch:
    """Clips, or images, from cached moments; the log-variance is so low that latents are means."""
    moments = torch.randn(count * frames, 2 * channels, 8, 8, generator=torch.manual_seed(0))
    moments[:, channels:] = -20
    words = ["a fox moving left", "a cat", "a tree"][:count]
    own = {"fps": [8.0, 12.0, 24.0][:count]} if frames > 1 else {}
    return Batch(
        step=3,
        positions=list(range(count)),
        captions=words,
        keys=words,
        weights=torch.ones(count),
        moments=moments,
        frames=frames,
        **(own | more),
    )


class Spy:
    """Keeps what the denoiser was asked, and under which context."""

    def __init__(self, backbone: Any) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Any]] = []
        self.outputs: list[Tensor] = []
        self.predict = backbone.predict
        backbone.predict = self

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        self.calls.append((x_t, t, condition.tokens, current()))
        output: Tensor = self.predict(x_t, t, condition)
        self.outputs.append(output)
        return output


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The clean latents that get noise, of each call."""
    seen: list[Tensor] = []

    def noted(objective: Objective, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        seen.append(x0)
        return add_noise(objective, x0, noise, t)

    monkeypatch.setattr(module, "add_noise", noted)
    return seen


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_an_image_meets_the_noise_of_its_seed(offset: float, tiny: Any) -> None:
    """Three draws in one from the seed of (run, purpose, step, position), as ever."""
    objective = Objective(tiny.target, tiny.alphas_cumprod, offset_noise=offset)
    task, spy = Denoise(tiny, objective, seed=5), Spy(tiny)
    batch = batch_of(2, 1, tiny.latent_channels)
    with torch.no_grad():
        state = task.encode(batch)
        losses, t = task.loss(state).losses, state.t
    (x_t, seen, _, ctx), moments = spy.calls[0], batch.moments
    assert torch.equal(seen, t) and ctx.frames == 1 and ctx.fps is None
    assert moments is not None
    for position in range(2):
        generator = torch.Generator().manual_seed(seed_of(5, "train", 3, position))
        draws = torch.randn(3, tiny.latent_channels, 8, 8, generator=generator)
        x0 = tiny.latents(moments[position][None], draws[0][None])
        noise = draws[1] + offset * draws[2, :, :1, :1]
        wanted = add_noise(objective, x0, noise[None], t[position : position + 1])
        assert torch.equal(x_t[position], wanted[0])
        error = (
            spy.outputs[0][position] - target_of(objective, x0, noise[None], t[position, None])[0]
        )
        torch.testing.assert_close(losses[position], error.square().mean())


def test_a_clip_has_one_text_one_timestep_and_noise_of_its_own(tiny: Any) -> None:
    objective = Objective(tiny.target, tiny.alphas_cumprod, weighting="min_snr")
    task, spy = Denoise(tiny, objective, seed=5), Spy(tiny)
    batch = batch_of(3, 4, tiny.latent_channels)
    with torch.no_grad():
        state = task.encode(batch)
        losses, t = task.loss(state).losses, state.t
    x_t, seen, text, ctx = spy.calls[0]
    assert losses.shape == t.shape == (3,)
    assert torch.equal(seen, t.repeat_interleave(4)) and len(set(t.tolist())) == 3
    assert (ctx.frames, ctx.fps.tolist()) == (4, [8.0, 12.0, 24.0])
    assert state.x0.shape == x_t.shape
    for clip in range(3):
        own = text[4 * clip : 4 * clip + 4]
        assert (own == own[:1]).all()
    assert not torch.equal(text[0], text[4])
    alpha, sigma = alpha_sigma(objective, seen, 4)
    noise = (x_t - alpha * state.x0) / sigma
    assert len({round(float(frame.flatten()[0]), 3) for frame in noise}) == 12
    error = (spy.outputs[0] - target_of(objective, state.x0, noise, seen)).square()
    wanted = error.unflatten(0, (3, 4)).mean(dim=(1, 2, 3, 4)) * loss_weight(objective, t)
    torch.testing.assert_close(losses, wanted, rtol=1e-3, atol=1e-4)


def test_the_noise_of_a_clip_does_not_depend_on_its_batch(tiny: Any) -> None:
    objective = Objective(tiny.target, tiny.alphas_cumprod)
    task, spy = Denoise(tiny, objective), Spy(tiny)
    batch = batch_of(2, 3, tiny.latent_channels)
    assert batch.moments is not None
    alone = replace(batch, positions=[1], captions=["a cat"], moments=batch.moments[3:], fps=[12.0])
    with torch.no_grad():
        for each in (batch, alone):
            task.loss(task.encode(each))
    assert torch.equal(spy.calls[0][0][3:], spy.calls[1][0])


def test_a_step_is_one_group_of_rows_with_its_condition(tiny: Any) -> None:
    task, spy = Denoise(tiny, Objective(tiny.target, tiny.alphas_cumprod)), Spy(tiny)
    with torch.no_grad():
        task.loss(task.encode(batch_of(2, 3, tiny.latent_channels)))
    _, _, tokens, ctx = spy.calls[0]
    assert ctx.rows("target/cond") == ctx.rows("cond") == slice(0, 6)
    assert ctx.condition.tokens is tokens


@pytest.mark.parametrize("target", ["eps", "v", "x0", "flow"])
def test_the_step_means_an_x0_with_a_gradient_when_asked(target: str, tiny: Any) -> None:
    """By the path's own equations, x_t = alpha x0 + sigma noise."""
    alphas = None if target == "flow" else tiny.alphas_cumprod
    task = Denoise(tiny, Objective(target, alphas))
    tiny.requires_grad_(True)
    batch = batch_of(2, 2, tiny.latent_channels)
    state = task.encode(batch)
    result = task.loss(state)
    assert result.batch is batch and result.maps is None
    assert "x0_hat" not in vars(result)  # nobody has asked, so nothing was computed
    assert torch.equal(result.t, state.t.repeat_interleave(2))
    t, x_t, output = result.t, result.x_t, result.output
    if target == "flow":
        sigma = (t / 1000)[:, None, None, None]
        wanted = x_t - sigma * output
    else:
        squared = tiny.alphas_cumprod[t][:, None, None, None]
        alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
        wanted = {
            "x0": output,
            "eps": (x_t - sigma * output) / alpha,
            "v": alpha * x_t - sigma * output,
        }[target]
    torch.testing.assert_close(result.x0_hat, wanted, rtol=1e-4, atol=1e-4)
    assert result.x0_hat is result.x0_hat
    result.x0_hat.sum().backward()
    assert tiny.unet.conv_in.weight.grad.abs().sum() > 0


def test_captions_are_dropped_in_training_alone(tiny: Any) -> None:
    task = Denoise(tiny, Objective(tiny.target, tiny.alphas_cumprod), caption_dropout=0.5)
    with torch.no_grad():
        empty = tiny.encode_prompts([""]).tokens
    batch = batch_of(3, 1, tiny.latent_channels)
    dropped: dict[str, int] = {"train": 0, "validate": 0, "prepare": 0}
    for step in range(8):
        for purpose in dropped:
            tokens = task.encode(replace(batch, step=step), purpose).condition.tokens  # type: ignore[arg-type]
            dropped[purpose] += sum(torch.equal(row[None], empty) for row in tokens.detach())
    assert dropped["validate"] == dropped["prepare"] == 0
    assert 6 <= dropped["train"] <= 18  # of 24


def test_a_score_is_the_plain_loss_of_every_sample_at_every_level(
    tiny: Any, clean: list[Tensor]
) -> None:
    task = Denoise(tiny, Objective(tiny.target, tiny.alphas_cumprod), caption_dropout=1.0)
    spy = Spy(tiny)
    batch = batch_of(2, 1, tiny.latent_channels)
    score = task.score(batch, [0.25, 0.75])
    assert score.shape == (2, 2) and not score.requires_grad
    noises = []
    for call, output, found, x0 in zip(spy.calls, spy.outputs, score, clean, strict=True):
        x_t, t, *_ = call
        alpha, sigma = alpha_sigma(task.objective, t, 4)
        noise = (x_t - alpha * x0) / sigma
        error = output - (alpha * noise - sigma * x0)  # v
        torch.testing.assert_close(found, error.square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-4)
        noises.append(noise)
    assert [call[1].tolist() for call in spy.calls] == [[250, 250], [750, 750]]
    torch.testing.assert_close(noises[0], noises[1], rtol=1e-3, atol=1e-4)
    assert torch.equal(task.score(batch, [0.25, 0.75]), score)
    other = task.loss(task.encode(batch)).losses.detach()
    assert not torch.allclose(other, score[0])  # other noise, and no captions


@pytest.mark.parametrize(
    "changes",
    [
        {"weighting": "min_snr", "min_snr_gamma": 1.0},
        {"offset_noise": 0.5},
        {"timesteps": "logit_normal", "logit_mean": 1.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_recipes_are_scored_alike(changes: dict[str, Any], tiny: Any) -> None:
    """What a recipe weighs, draws or adds in training does not change its validation loss."""
    plain = Objective(tiny.target, tiny.alphas_cumprod)
    batch = batch_of(3, 1, tiny.latent_channels)
    wanted = Denoise(tiny, plain).score(batch, [0.1, 0.9])
    trained = Denoise(tiny, replace(plain, **changes))
    assert torch.equal(trained.score(batch, [0.1, 0.9]), wanted)
    losses = [task.loss(task.encode(batch)).losses for task in (trained, Denoise(tiny, plain))]
    assert not torch.allclose(*losses)


@pytest.mark.parametrize("target", ["eps", "x0"])
def test_another_target_is_scored_in_the_backbones_units(
    target: str, tiny: Any, clean: list[Tensor]
) -> None:
    """The tiny backbone was published to predict v. An output that is right but for an error in x0
    has that error's share of v, whatever it was asked for."""
    assert tiny.published_target == ("v", False)
    objective = Objective(target, tiny.alphas_cumprod)
    spy = Spy(tiny)
    score = Denoise(tiny, objective).score(batch_of(2, 1, tiny.latent_channels), [0.5])
    (x_t, t, *_), output, true = spy.calls[0], spy.outputs[0], clean[0]
    alpha, sigma = alpha_sigma(objective, t, 4)
    x0 = output if target == "x0" else (x_t - sigma * output) / alpha
    noise = output if target == "eps" else (x_t - alpha * output) / sigma
    own_noise = (x_t - alpha * true) / sigma
    error = (alpha * noise - sigma * x0) - (alpha * own_noise - sigma * true)
    torch.testing.assert_close(score[0], error.square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-4)


def test_pixels_are_encoded_once_for_all_levels(tiny: Any) -> None:
    calls = []
    moments = tiny.moments
    tiny.moments = lambda pixels, frames=1: calls.append(len(pixels)) or moments(pixels, frames)
    batch = batch_of(2, 1, tiny.latent_channels)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.manual_seed(1)) * 2 - 1
    batch = replace(batch, moments=None, pixels=pixels)
    score = Denoise(tiny, Objective(tiny.target, tiny.alphas_cumprod)).score(batch, [0.2, 0.6])
    assert calls == [2] and score.isfinite().all()
    cached = replace(batch, moments=moments(pixels).half().float(), pixels=None)
    task = Denoise(tiny, Objective(tiny.target, tiny.alphas_cumprod))
    assert torch.equal(task.score(cached, [0.2, 0.6]), score)


def test_it_samples_the_backbone(tiny: Any) -> None:
    task = Denoise(tiny, Objective(tiny.target, tiny.alphas_cumprod))
    settings = Sampling(steps=2, guidance=3.0)
    own = task.sample(["a fox"], [3], settings)
    assert torch.equal(own, sample(tiny, ["a fox"], [3], settings=settings))


def test_extra_inputs_reach_the_network_through_their_encoder(tiny: Any) -> None:
    """One without an encoder stays in the batch, for methods that look there."""
    task, spy = Denoise(tiny, Objective(tiny.target, tiny.alphas_cumprod)), Spy(tiny)
    tiny.encoders["picture"] = lambda backbone, pictures: {"image_tokens": 2 * pictures}
    given = {"picture": torch.randn(2, 5, 7), "depth": torch.randn(2, 1, 8, 8)}
    state = task.encode(batch_of(2, 3, tiny.latent_channels, inputs=given))
    with torch.no_grad():
        task.loss(state)
    wanted = (2 * given["picture"]).repeat_interleave(3, 0)
    assert torch.equal(spy.calls[0][3].condition.image_tokens, wanted)
    assert state.batch.inputs["depth"] is given["depth"]


def test_a_masked_loss_is_the_mean_over_what_counts() -> None:
    """Of each sample, over its channels and the latents whose mask is 1."""
    draw = torch.manual_seed(0)
    error = torch.rand(2, 3, 4, 4, generator=draw)
    masks = torch.zeros(2, 1, 4, 4)
    masks[0, :, :2, 1:], masks[1, :, 3:] = 1, 1
    wanted = torch.stack([error[0, :, :2, 1:].mean(), error[1, :, 3:].mean()])
    torch.testing.assert_close(mean_per_sample(error, masks, 1), wanted)
    torch.testing.assert_close(mean_per_sample(error, None, 1), error.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(mean_per_sample(error, None, 2), error.mean()[None])
