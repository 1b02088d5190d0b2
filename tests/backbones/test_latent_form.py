"""How latents come from a VAE: channel statistics, folding, clips."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.backbones.clip_frames import ClipFrames
from trainer.backbones.latent_form import LatentForm
from trainer.backbones.vae import (
    decode_latents,
    decoded,
    encoded,
    folded_moments,
    scale_latents,
    unscale_latents,
)

MEAN, STD = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([2.0, 0.5, 4.0, 1.0])


class Doubling:
    """A VAE without a loss: a latent is its pixel, twice as large."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def encode(self, pixels: Tensor) -> Any:
        self.shapes.append(tuple(pixels.shape))
        parameters = torch.cat([2 * pixels, pixels - 9], dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=parameters))

    def decode(self, z: Tensor) -> Any:
        self.shapes.append(tuple(z.shape))
        return SimpleNamespace(sample=z / 2)


class Halving(Doubling):
    """The same of clips, of which it keeps the first frame and every second one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"block_out_channels": [3]}

    def encode(self, pixels: Tensor) -> Any:
        return super().encode(pixels[:, :, ::2])

    def decode(self, z: Tensor) -> Any:
        return super().decode(z.repeat_interleave(2, dim=2)[:, :, 1:])


def test_latents_of_a_vae_that_knows_time_are_folded_too() -> None:
    """Frame by frame as those of pictures, and back."""
    vae: Any = Halving()
    one = LatentForm(fold=2, statistics=lambda _: (torch.zeros(12), torch.ones(12)), clips=True)
    form = replace(one, frames=lambda _: ClipFrames(2))
    pixels = torch.arange(6 * 3 * 4 * 6.0).reshape(6, 3, 4, 6)[[0, 1, 1, 3, 4, 4]]
    moments = encoded(vae, pixels, form, frames=3)
    assert moments.shape == (4, 24, 2, 3)
    assert torch.equal(moments, folded_moments(vae, pixels[[0, 2, 3, 5]], one))
    assert torch.equal(decoded(vae, moments[:, :12], form, frames=2), pixels)


def test_each_channel_is_normed_by_its_own_statistics() -> None:
    form = LatentForm(statistics=lambda _: (MEAN, STD))
    z = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    x = scale_latents(None, z, form)
    torch.testing.assert_close(x[:, 1], (z[:, 1] + 2.0) / 0.5)
    torch.testing.assert_close(x[:, 2], (z[:, 2] - 0.5) / 4.0)
    torch.testing.assert_close(unscale_latents(None, x, form), z)


@pytest.mark.parametrize("clips", [False, True])
def test_latents_are_folded_channel_by_channel(clips: bool) -> None:
    """As FLUX.2 folds them: channel, row, column; and a VAE of clips gets one frame."""
    vae: Any = Doubling()
    form = LatentForm(fold=2, statistics=lambda _: (torch.zeros(12), torch.ones(12)), clips=clips)
    pixels = torch.arange(3 * 4 * 6.0).reshape(1, 3, 4, 6)
    moments = folded_moments(vae, pixels, form)
    assert moments.shape == (1, 24, 2, 3)
    mean, log_variance = moments.chunk(2, dim=1)
    for channel, row, column in [(0, 0, 0), (1, 0, 1), (2, 1, 0), (2, 1, 1)]:
        own = 4 * channel + 2 * row + column
        assert torch.equal(mean[:, own], 2 * pixels[:, channel, row::2, column::2])
        assert torch.equal(log_variance[:, own], pixels[:, channel, row::2, column::2] - 9)
    assert torch.equal(decode_latents(vae, mean, form), pixels)
    assert {len(shape) for shape in vae.shapes} == {5 if clips else 4}


def test_pixels_of_a_latent_count_the_fold() -> None:
    config = {"block_out_channels": [8, 8, 8, 8]}
    assert LatentForm().pixels(config) == 8
    assert LatentForm(fold=2).pixels(config) == 16
    assert LatentForm(halvings=lambda found: found["halved"]).pixels({"halved": 2}) == 4
    assert LatentForm().pixels({}) is None
