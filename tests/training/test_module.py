"""The module: one lr for all, or one of a method's own; what noise, timestep and text images and
the frames of clips meet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.context import current
from trainer.common.seeds import seed_of
from trainer.config.load import methods_of
from trainer.data.loader import Batch
from trainer.diffusion.objective import Objective, add_noise, alpha_sigma, loss_weight, target_of
from trainer.methods.apply import apply_methods
from trainer.training.module import DiffusionModule
from trainer.training.optim import Optim

METHODS = {"selective": {"sites": "cross"}, "new_token": {"tokens": ["<v1>"], "init": "fox"}}


@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
def test_a_method_may_have_an_lr_of_its_own(own: bool, tiny: Any) -> None:
    plan = apply_methods(tiny, methods_of(METHODS))
    token = plan.edits["new_token"].trains
    lrs = dict.fromkeys(token, 1e-2) if own else {}
    objective = Objective(tiny.target, tiny.alphas_cumprod)
    optim = Optim(1e-4, 10, warmup=3)
    module = DiffusionModule(tiny, objective, optim, plan.names, lrs=lrs)
    found = module.configure_optimizers()
    groups = found["optimizer"].param_groups
    by_id = {id(p): group["lr"] for group in groups for p in group["params"]}
    factor = optim.factor(0)  # the schedule is already at its first step, for every group
    for name, parameter in module.trainable().items():
        wanted = 1e-2 if own and name in token else 1e-4
        assert by_id[id(parameter)] == pytest.approx(wanted * factor)
    assert len(groups) == 1 + own


def batch_of(count: int, frames: int, channels: int, **more: Any) -> Batch:
    """Clips, or images, from cached moments; the log-variance is so low that latents are means."""
    moments = torch.randn(count * frames, 2 * channels, 8, 8, generator=torch.manual_seed(0))
    moments[:, channels:] = -20
    words = ["a fox moving left", "a cat", "a tree"][:count]
    own = {"fps": [8.0, 12.0, 24.0][:count]} if frames > 1 else {}
    return Batch(
        step=3,
        places=list(range(count)),
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

    def __call__(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.calls.append((x_t, t, condition["encoder_hidden_states"], current()))
        output: Tensor = self.predict(x_t, t, condition)
        self.outputs.append(output)
        return output


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_an_image_meets_the_noise_of_its_seed(offset: float, tiny: Any) -> None:
    """Three draws in one from the seed of (run, purpose, step, place), as ever."""
    objective = Objective(tiny.target, tiny.alphas_cumprod, offset_noise=offset)
    module, spy = DiffusionModule(tiny, objective, Optim(1e-4, 1), [], seed=5), Spy(tiny)
    batch = batch_of(2, 1, tiny.latent_channels)
    with torch.no_grad():
        losses, t = module.sample_losses(batch, "train", 0.0)
    (x_t, seen, _, ctx), moments = spy.calls[0], batch.moments
    assert torch.equal(seen, t) and ctx.frames == 1 and ctx.fps is None
    assert moments is not None
    for place in range(2):
        generator = torch.Generator().manual_seed(seed_of(5, "train", 3, place))
        draws = torch.randn(3, tiny.latent_channels, 8, 8, generator=generator)
        x0 = tiny.latents(moments[place][None], draws[0][None])
        noise = draws[1] + offset * draws[2, :, :1, :1]
        wanted = add_noise(objective, x0, noise[None], t[place : place + 1])
        assert torch.equal(x_t[place], wanted[0])
        error = spy.outputs[0][place] - target_of(objective, x0, noise[None], t[place, None])[0]
        torch.testing.assert_close(losses[place], error.square().mean())


def test_a_clip_has_one_text_one_timestep_and_noise_of_its_own(tiny: Any) -> None:
    objective = Objective(tiny.target, tiny.alphas_cumprod, weighting="min_snr")
    module, spy = DiffusionModule(tiny, objective, Optim(1e-4, 1), [], seed=5), Spy(tiny)
    batch = batch_of(3, 4, tiny.latent_channels)
    with torch.no_grad():
        losses, t = module.sample_losses(batch, "train", 0.0)
    x_t, seen, text, ctx = spy.calls[0]
    assert losses.shape == t.shape == (3,)
    assert torch.equal(seen, t.repeat_interleave(4)) and len(set(t.tolist())) == 3
    assert (ctx.frames, ctx.fps.tolist()) == (4, [8.0, 12.0, 24.0])
    assert ctx.source.shape == x_t.shape
    for clip in range(3):
        own = text[4 * clip : 4 * clip + 4]
        assert (own == own[:1]).all()
    assert not torch.equal(text[0], text[4])
    alpha, sigma = alpha_sigma(objective, seen, 4)
    noise = (x_t - alpha * ctx.source) / sigma
    assert len({round(float(frame.flatten()[0]), 3) for frame in noise}) == 12
    error = (spy.outputs[0] - target_of(objective, ctx.source, noise, seen)).square()
    wanted = error.unflatten(0, (3, 4)).mean(dim=(1, 2, 3, 4)) * loss_weight(objective, t)
    torch.testing.assert_close(losses, wanted, rtol=1e-3, atol=1e-4)


def test_the_noise_of_a_clip_does_not_depend_on_its_batch(tiny: Any) -> None:
    objective = Objective(tiny.target, tiny.alphas_cumprod)
    module, spy = DiffusionModule(tiny, objective, Optim(1e-4, 1), []), Spy(tiny)
    batch = batch_of(2, 3, tiny.latent_channels)
    assert batch.moments is not None
    alone = replace(batch, places=[1], captions=["a cat"], moments=batch.moments[3:], fps=[12.0])
    with torch.no_grad():
        module.sample_losses(batch, "train", 0.0)
        module.sample_losses(alone, "train", 0.0)
    assert torch.equal(spy.calls[0][0][3:], spy.calls[1][0])


def test_a_clip_is_validated_at_its_own_level(tiny: Any) -> None:
    objective = Objective(tiny.target, tiny.alphas_cumprod)
    module, spy = DiffusionModule(tiny, objective, Optim(1e-4, 1), []), Spy(tiny)
    with torch.no_grad():
        module.validation_step(batch_of(2, 2, tiny.latent_channels, u=[0.25, 0.75]), 0)
    assert spy.calls[0][1].tolist() == [250, 250, 750, 750]
    assert sorted(module.val_losses) == [250, 750]
