"""A denoiser that has the frames of a clip as an axis of its own, under samplers and losses that
have a row for every frame. diffusers' U-Net of text to video."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext, use
from trainer.attention.insert import insert
from trainer.attention.op import Traits
from trainer.attention.rows import Rows
from trainer.backbones.backbone import Backbone
from trainer.backbones.families import find_family
from trainer.backbones.family import Parts
from trainer.backbones.layout import clips_to_rows, rows_to_clips
from trainer.diffusion.predict import predict_groups
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.ops.temporal.frame_keys import FrameKeys

PROMPTS = ["a fox on a red background", "an apple"]


@pytest.fixture
def video(tiny: Any) -> Any:
    """The tiny parts around a tiny U-Net of video."""
    from diffusers import UNet3DConditionModel

    torch.manual_seed(0)
    unet: Any = UNet3DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=128,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    for parameter in unet.parameters():  # what looks through time starts as nothing
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    family = find_family("sd")
    parts = Parts(
        folder=Path(),
        denoiser=unet,
        text_encoders=tiny.text_encoders,
        tokenizers=tiny.tokenizers,
        vae=tiny.vae,
        scheduler=tiny.scheduler(),
    )
    declared = replace(family, traits=replace(family.traits, layout="tokens"))
    return Backbone(name="video", family="video", declared=declared, parts=parts).eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def test_rows_and_clips_are_one_another_undone() -> None:
    rows = noise(6, 2, 3, 4)
    clips = rows_to_clips(rows, 3)
    assert clips.shape == (2, 2, 3, 3, 4)
    assert torch.equal(clips[1, :, 2], rows[5])
    assert torch.equal(clips_to_rows(clips), rows)
    with pytest.raises(ValueError, match="clips of 4 frames, and a batch of 6 rows does not"):
        rows_to_clips(rows, 4)


@torch.no_grad()
def test_rows_reach_the_denoiser_as_clips(video: Any) -> None:
    x_t, t = noise(6, 8, 8, 8), torch.tensor([3, 900])
    text = video.encode_prompts(PROMPTS)
    clips = torch.stack([x_t[:3].transpose(0, 1), x_t[3:].transpose(0, 1)])
    wanted = video.denoiser(clips, t, text.tokens).sample
    with use(StepContext(0, 1, t, frames=3)):
        found = video.predict(x_t, t.repeat_interleave(3), text.per_frame(3))
    for clip, rows in zip(wanted, found.split(3), strict=True):
        torch.testing.assert_close(rows, clip.transpose(0, 1))
    alone = video.predict(x_t[:1], t[:1], video.encode_prompts(PROMPTS[:1]))  # an image
    one = video.denoiser(x_t[:1, :, None], t[:1], video.encode_prompts(PROMPTS[:1]).tokens).sample
    torch.testing.assert_close(alone, one[:, :, 0])


@torch.no_grad()
def test_ops_see_clips_for_rows(video: Any) -> None:
    class Muted:
        name = "muted"
        traits = Traits()

        def output(self, o: Tensor, call: SiteCall) -> Tensor:
            seen.append(call.ctx.groups.slices)
            texts.append(call.ctx.condition.tokens)  # type: ignore[union-attr, arg-type]
            return o

    seen: list[dict[str, slice]] = []
    texts: list[Tensor] = []
    video.host.install(Muted(), [site for site in video.sites if site.kind == "cross"])
    names = ("target/uncond", "target/cond")
    condition = video.encode_prompts(["", "", *PROMPTS]).per_frame(3)
    ctx = StepContext(0, 1, torch.tensor(7), frames=3, groups=Rows.of(names, 6))
    found = predict_groups(video, {"target": noise(6, 8, 8, 8)}, condition=condition, ctx=ctx)
    assert {name: len(rows) for name, rows in found.items()} == dict.fromkeys(names, 6)
    assert seen[0] == {"target/uncond": slice(0, 2), "target/cond": slice(2, 4)}
    assert torch.equal(texts[0], video.encode_prompts(["", "", *PROMPTS]).tokens)


def test_a_clip_is_sampled_as_by_a_loop_over_clips(video: Any) -> None:
    own = sample(video, PROMPTS[:1], [5], settings=Sampling(steps=3, guidance=1.0, frames=2))
    x_t = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(5))
    x_t = x_t.transpose(0, 1)[None]  # 1 c f h w
    scheduler, text = video.scheduler(), video.encode_prompts(PROMPTS[:1])
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = video.denoiser(x_t, t, text.tokens).sample
            x_t = scheduler.step(output, t, x_t).prev_sample
        wanted = video.decode(x_t[0].transpose(0, 1))
    torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-4)


def test_what_makes_clips_of_images_is_refused(video: Any) -> None:
    with pytest.raises(ValueError, match=r"methods\.mine needs every frame .* as a row of the bat"):
        video.host.install(FrameKeys(("first",), "mine"), video.sites[:1])
    with pytest.raises(ValueError, match="has frames as tokens, so it is a model of clips"):
        insert(video, [], "mine", True)


def test_a_frame_depends_on_its_own_clip_alone(video: Any) -> None:
    x_t = noise(4, 8, 8, 8).requires_grad_()
    text = video.encode_prompts(PROMPTS).per_frame(2)
    with use(StepContext(0, 1, torch.tensor(9), frames=2)):
        video.predict(x_t, torch.tensor(9).expand(4), text)[1].square().sum().backward()
    assert x_t.grad is not None
    moved = x_t.grad.abs().amax((1, 2, 3)) > 0
    assert moved.tolist() == [True, True, False, False]  # both frames of its clip, no other's
