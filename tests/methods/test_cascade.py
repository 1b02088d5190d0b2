"""Cascade: the lower clip and its noise against a plain loop, the level the network is told, and
what a source does in sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from trainer.__main__ import main
from trainer.attention.context import StepContext
from trainer.attention.given_frames import LEVEL, GivenFrames
from trainer.attention.input_channels import ChannelInputs, values_of
from trainer.common.exit_codes import BAD_RECIPE
from trainer.data.world.clips import draw_clip
from trainer.diffusion.given_clip import GivenClip, complete
from trainer.diffusion.sampling_settings import Sampling
from trainer.media.write_video import encode_video
from trainer.methods.apply import apply_methods
from trainer.methods.feature.cascade import Cascade
from trainer.ops.cascade import TOLD, AugmentationLevel, LowerClip, augmented, lowered


def given_of(clips: Tensor, seeds: list[int], **inputs: Tensor) -> ChannelInputs:
    rows = clips.flatten(0, 1)
    shape = (rows.shape[0], rows.shape[1], rows.shape[2], rows.shape[3])
    return ChannelInputs(shape, clips.shape[1], seeds, inputs=inputs, x0=rows)


@pytest.mark.parametrize(("time", "space"), [(3, 1), (1, 2), (2, 2)])
def test_the_channels_are_the_lower_clip_made_larger(time: int, space: int) -> None:
    """Without noise, against a loop over frames and pixels; the frames do not divide."""
    clips = torch.randn(2, 5, 3, 6, 4)
    lower = LowerClip(time, space, most=1.0)
    found = lower.channels(given_of(clips, [1, 2], **{LEVEL: torch.zeros(2)}))
    assert found is not None and found.shape == (10, 4, 6, 4)
    for b in range(2):
        for i in range(5):
            small = clips[b, i - i % time]
            if space == 2:
                cells = [
                    [small[:, y : y + 2, x : x + 2].mean((1, 2)) for x in (0, 2)] for y in (0, 2, 4)
                ]
                small = torch.stack([torch.stack(row, -1) for row in cells], -2)  # 3 3 2
                small = torch.stack([interpolated(channel, 6, 4) for channel in small])
            own = found[5 * b + i]
            torch.testing.assert_close(own[:3], small, rtol=1e-5, atol=1e-6)
            assert torch.equal(own[3], torch.full((6, 4), float(i % time == 0)))


def interpolated(x: Tensor, height: int, width: int) -> Tensor:
    """(h, w) to (height, width), bilinear between the centres of pixels."""
    found = torch.empty(height, width)
    for row in range(height):
        for column in range(width):
            y = min(max((row + 0.5) * x.shape[0] / height - 0.5, 0), x.shape[0] - 1)
            z = min(max((column + 0.5) * x.shape[1] / width - 0.5, 0), x.shape[1] - 1)
            top, left = int(y), int(z)
            bottom, right = min(top + 1, x.shape[0] - 1), min(left + 1, x.shape[1] - 1)
            upper = (1 - z + left) * x[top, left] + (z - left) * x[top, right]
            under = (1 - z + left) * x[bottom, left] + (z - left) * x[bottom, right]
            found[row, column] = (1 - y + top) * upper + (y - top) * under
    return found


def test_noise_keeps_the_variance_and_is_that_of_the_clip() -> None:
    """sqrt(1 - l^2) z + l noise: of unit variance for z of unit variance; at 0.6 the clip counts
    0.8. The frames that repeat one have its noise."""
    one = torch.ones(1, 1, 1, 1, 1)
    assert float(augmented(2 * one, torch.tensor([0.6]), 3 * one)) == pytest.approx(1.6 + 1.8)
    clips = torch.randn(2, 4, 8, 16, 16)
    lower = LowerClip(2, 1, most=1.0)
    level = {LEVEL: torch.tensor([0.6, 0.6])}
    noisy = lower.channels(given_of(clips, [1, 2], **level))
    assert noisy is not None
    noisy = noisy[:, :8].unflatten(0, (2, 4))
    assert torch.equal(noisy[:, 0], noisy[:, 1]) and torch.equal(noisy[:, 2], noisy[:, 3])
    noise = (noisy[:, ::2] - 0.8 * clips[:, ::2]) / 0.6
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    assert float((noise * clips[:, ::2]).mean()) == pytest.approx(0, abs=0.03)
    assert float((noise[0] * noise[1]).mean()) == pytest.approx(0, abs=0.04)
    again = lower.channels(given_of(clips[:1], [1], **{LEVEL: level[LEVEL][:1]}))
    assert again is not None and torch.equal(again[:, :8], noisy[0])


def test_levels_are_uniform_up_to_the_highest() -> None:
    lower = LowerClip(4, 1, most=0.5)
    given = given_of(torch.zeros(600, 2, 1, 1, 1), list(range(600)))
    levels = lower.of_clips(given)
    assert 0 <= levels.min() < 0.01 and 0.49 < levels.max() < 0.5
    assert float(levels.mean()) == pytest.approx(0.25, abs=0.02)
    rows = lower.levels(given)
    assert rows is not None and torch.equal(rows.flatten(), levels.repeat_interleave(2))


def test_pictures_lack_pixels_and_no_frames() -> None:
    picture = given_of(torch.randn(2, 1, 3, 4, 4), [1, 2])
    for time, space, told in ((2, 1, False), (2, 2, False), (1, 2, True)):
        lower = LowerClip(time, space, most=1.0)
        assert (lower.channels(picture) is not None) == told
        assert (lower.levels(picture) is not None) == told
    assert LowerClip(1, 2, 1.0).channels(ChannelInputs((2, 3, 4, 4), 1, [1, 2])) is None


def test_the_level_is_embedded_as_a_timestep_is() -> None:
    block = AugmentationLevel(12)
    x, ctx = torch.randn(2, 12), StepContext(0, 1, torch.zeros(()))
    told = StepContext(
        0, 1, torch.zeros(()), channels={TOLD: torch.tensor([0.25, 0.5])[:, None, None, None]}
    )
    assert torch.equal(block(x, x, ctx), x) and torch.equal(block(x, x, told), x)
    inner, outer = block.embedding.linear_1, block.embedding.linear_2
    torch.nn.init.normal_(outer.weight)
    torch.nn.init.normal_(outer.bias)
    waves = get_timestep_embedding(
        torch.tensor([250.0, 500.0]), 256, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    hidden = waves @ inner.weight.T + inner.bias
    wanted = x + (hidden * hidden.sigmoid()) @ outer.weight.T + outer.bias
    torch.testing.assert_close(block(x, x, told), wanted, rtol=1e-4, atol=1e-5)


def test_both_parts_of_the_network_have_one_level(tiny: Any) -> None:
    apply_methods(tiny, {"cascade": Cascade(time=2, most=0.8)})
    clips = torch.zeros(3, 4, 8, 8, 8)
    values = values_of(tiny, given_of(clips, [5, 6, 7]))
    spread = values["lower"][:, :8].unflatten(0, (3, 4)).std((1, 2, 3, 4))
    told = values[TOLD].flatten()[::4]
    torch.testing.assert_close(spread, told, rtol=0.1, atol=0.01)
    assert len(set(told.tolist())) == 3


def test_a_clip_is_completed_at_the_level_of_sampling(
    tiny: Any, randomise: Callable[..., None]
) -> None:
    randomise(tiny, apply_methods(tiny, {"cascade": Cascade(time=2, level=0.3)}), 0.2)
    assert tiny.given_frames == GivenFrames(between=1, fixed=True, level=0.3)
    given = GivenClip.of(torch.randn(2, 8, 8, 8), tiny.given_frames, 4)
    settings = Sampling(steps=2, guidance=2, frames=4)
    values = given.channels(tiny, [1, 2], replace(settings, size=(32, 32)))
    assert values[TOLD].flatten().tolist() == pytest.approx([0.3] * 8)
    both = complete(tiny, ["a fox", "a cat"], [1, 2], given=given, settings=settings)
    alone = complete(tiny, ["a cat"], [2], given=given, settings=settings)
    torch.testing.assert_close(both[4:], alone, rtol=1e-4, atol=1e-4)
    own = tiny.decode(given.x0[::2])  # it is made again, and not kept
    assert not torch.allclose(both[:4:2], own, atol=1e-2)


def test_fewer_pixels_are_averages() -> None:
    clips = torch.arange(32.0).view(1, 2, 1, 4, 4)
    small = lowered(clips, 1, 2)
    assert small[0, 0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert lowered(clips, 2, 8).shape == (1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "time=1 and space=1 give the clip that is to be made; give time=4"),
        ({"time": 2, "most": 0.2, "level": 0.3}, "level=0.3 is above most=0.2"),
    ],
)
def test_options_that_say_nothing(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Cascade(**options)


def test_sample_raises_frames_and_pixels(
    tiny_folder: Path, save_trained_on: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("av")
    video = tmp_path / "clip.mp4"
    video.write_bytes(encode_video(draw_clip(0, 0, frames=3, motion="moving left").frames, 8))
    path = save_trained_on(tiny_folder, {"cascade": {"time": 2, "space": 2}})
    words = ["sample", "prompt=a fox", "steps=1", "guidance=1", f"adapter={path}"]
    words += [f"source={video}", f"out={tmp_path / 'out'}", "size=64"]
    assert main([*words, "frames=6"]) == 0
    with Image.open(tmp_path / "out" / "a-fox-0.gif") as film:
        assert (film.n_frames, film.size) == (6, (64, 64))
    capsys.readouterr()
    assert main([*words, "frames=6", "between=2"]) == BAD_RECIPE
    said = capsys.readouterr().err
    assert "between=2: this model was trained for 1 new frames after each" in said
    alone = [word for word in words if not word.startswith("source")]
    assert main([*alone, "frames=6"]) == BAD_RECIPE
    assert "makes none by itself; give source=<a video>" in capsys.readouterr().err
    assert main([*words, "frames=8"]) == BAD_RECIPE
    assert "3 frames at 8 a second are too short for 4 frames" in capsys.readouterr().err
