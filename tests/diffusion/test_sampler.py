"""Sampling: the stock pipeline's pictures, seeds independent of their batch, roles of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.call import SiteCall
from trainer.attention.condition import Condition
from trainer.attention.context import StepContext
from trainer.attention.op import Traits
from trainer.attention.sites import select
from trainer.config.load import methods_of
from trainer.diffusion.sampler import sample, sample_many
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods

PROMPTS = ["a fox on a red background", "an apple left of a cat", "a tree"]
SEEDS = [3, 4, 5]


class Watch:
    """An op that keeps what it is told of each call, and shows whose rows the text is of."""

    name = "watch"
    traits = Traits()

    def __init__(self) -> None:
        self.seen: list[StepContext] = []
        self.texts: list[Tensor] = []

    def context(self, k_ctx: Tensor, v_ctx: Tensor, call: SiteCall) -> tuple[Tensor, Tensor]:
        self.seen.append(call.ctx)
        self.texts.append(k_ctx)
        return k_ctx, v_ctx


def stock(backbone: Any, seeds: list[int], **options: Any) -> Tensor:
    pipeline = backbone.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    result = pipeline(generator=generators, output_type="pt", **options)
    images: Tensor = result.images
    return images


@pytest.mark.parametrize(
    ("guidance", "negative", "size"),
    [
        pytest.param(5.0, "", None, id="guided"),
        pytest.param(3.0, "a red apple", None, id="negative"),
        pytest.param(1.0, "", None, id="unguided"),
        pytest.param(5.0, "", (24, 40), id="oblong"),
    ],
)
def test_equals_the_stock_pipeline(
    guidance: float, negative: str, size: tuple[int, int] | None, tiny: Any
) -> None:
    height, width = size or (32, 32)
    own = (
        sample(
            tiny,
            PROMPTS,
            SEEDS,
            settings=Sampling(steps=4, guidance=guidance, negative=negative, size=size),
        )
        / 2
        + 0.5
    )
    wanted = stock(
        tiny,
        SEEDS,
        prompt=PROMPTS,
        negative_prompt=[negative] * 3,
        num_inference_steps=4,
        guidance_scale=guidance,
        height=height,
        width=width,
    )
    assert own.shape == (3, 3, height, width)
    assert float(wanted.std()) > 0.02
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["tiny", "dit"])
@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("frames", [1, 2], ids=["pictures", "clips"])
@torch.no_grad()
def test_equals_a_loop_written_out(
    family: str, guidance: float, frames: int, request: pytest.FixtureRequest
) -> None:
    """To the last bit: the unconditional rows first, one call of the network for both."""
    backbone = request.getfixturevalue(family)
    negative = "a red apple" if guidance > 1 else ""
    own = sample(
        backbone,
        PROMPTS[:2],
        SEEDS[:2],
        settings=Sampling(steps=3, guidance=guidance, negative=negative, frames=frames),
    )
    scheduler = backbone.scheduler()
    scheduler.set_timesteps(3)
    x = torch.cat(
        [torch.randn(frames, 8, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (3, 4)]
    )
    texts = [negative, negative, *PROMPTS[:2]] if guidance > 1 else PROMPTS[:2]
    text = backbone.encode_prompts(texts).map(lambda value: value.repeat_interleave(frames, 0))
    for t in scheduler.timesteps:
        if guidance > 1:
            output = backbone.predict(torch.cat([x, x]), t.expand(4 * frames), text)
            output = output[: 2 * frames] + guidance * (output[2 * frames :] - output[: 2 * frames])
        else:
            output = backbone.predict(x, t.expand(2 * frames), text)
        x = scheduler.step(output, t, x).prev_sample
    parts = [x] if frames == 1 else x.split(frames)
    assert torch.equal(own, torch.cat([backbone.decode(part) for part in parts]))


@torch.no_grad()
def test_a_scheduler_of_scaled_noise_is_asked_for_its_scales(tiny: Any) -> None:
    """Euler's begins far above unit noise and scales the denoiser's input in every step."""
    from diffusers import EulerDiscreteScheduler

    tiny.scheduler_class = EulerDiscreteScheduler
    seen: list[Tensor] = []
    settings = Sampling(steps=4, guidance=4.0)
    sample(tiny, PROMPTS[:1], [3], settings=settings, on_step=lambda _, x: seen.append(x))
    scheduler = tiny.scheduler()
    scheduler.set_timesteps(4)
    assert scheduler.init_noise_sigma > 2
    x = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    x = x * scheduler.init_noise_sigma
    null, text = tiny.encode_prompts([""]), tiny.encode_prompts(PROMPTS[:1])
    for t, own in zip(scheduler.timesteps, seen, strict=True):
        scaled = scheduler.scale_model_input(x, t)
        uncond, cond = (tiny.predict(scaled, t[None], condition) for condition in (null, text))
        x = scheduler.step(uncond + 4.0 * (cond - uncond), t, x).prev_sample
        torch.testing.assert_close(own, x, rtol=1e-4, atol=1e-2)


def test_ops_are_told_of_the_channels_of_their_rows(tiny: Any) -> None:
    """Of each clip as many frames, the first ones, as the sampler is at work on."""
    watch = Watch()
    tiny.host.install(watch, select(tiny.sites, "cross")[:1])
    apply_methods(tiny, methods_of({"text2video_zero": {"alone": 0.4, "until": 0.4}}), trains=False)
    source = torch.randn(6, 8, 8, 8, generator=torch.Generator().manual_seed(5))
    settings = Sampling(steps=3, guidance=3.0, frames=3)
    sample(tiny, PROMPTS[:2], SEEDS[:2], settings=settings, channels={"clip": source})
    first, *_, last = watch.seen
    assert (first.frames, last.frames) == (1, 3)
    assert torch.equal(first.channels["clip"], torch.cat([source[::3]] * 2))
    assert torch.equal(last.channels["clip"], torch.cat([source] * 2))


def test_guidance_and_negative_prompt_matter(tiny: Any) -> None:
    pictures = [
        sample(
            tiny, PROMPTS[:1], [3], settings=Sampling(steps=3, guidance=guidance, negative=negative)
        )
        for guidance, negative in ((1.0, ""), (5.0, ""), (5.0, "a red apple"))
    ]
    assert not torch.allclose(pictures[0], pictures[1], atol=1e-3)
    assert not torch.allclose(pictures[1], pictures[2], atol=1e-3)


def test_a_picture_does_not_depend_on_its_batch(tiny: Any) -> None:
    together = sample(tiny, PROMPTS, SEEDS, settings=Sampling(steps=3))
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = sample(tiny, [prompt], [seed], settings=Sampling(steps=3))
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-4)
    assert not torch.allclose(
        sample(tiny, PROMPTS[:1], [9], settings=Sampling(steps=3)), together[:1], atol=1e-2
    )


def test_the_global_generator_is_neither_read_nor_moved(tiny: Any) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample(tiny, PROMPTS[:1], [3], settings=Sampling(steps=2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(sample(tiny, PROMPTS[:1], [3], settings=Sampling(steps=2)), first)


def test_many_are_the_batches_in_order(tiny: Any) -> None:
    many = sample_many(tiny, PROMPTS, SEEDS, settings=Sampling(steps=2), batch_size=2)
    assert torch.equal(many[:2], sample(tiny, PROMPTS[:2], SEEDS[:2], settings=Sampling(steps=2)))
    assert torch.equal(many[2:], sample(tiny, PROMPTS[2:], SEEDS[2:], settings=Sampling(steps=2)))


@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["unguided", "guided"])
def test_ops_are_told_step_and_roles(guidance: float, tiny: Any) -> None:
    watch = Watch()
    tiny.host.install(watch, select(tiny.sites, "cross")[:1])
    sample(tiny, PROMPTS, SEEDS, settings=Sampling(steps=3, guidance=guidance))
    scheduler = tiny.scheduler()
    scheduler.set_timesteps(3)
    assert [ctx.step for ctx in watch.seen] == [0, 1, 2]
    assert [int(ctx.timestep) for ctx in watch.seen] == scheduler.timesteps.tolist()
    assert {ctx.num_steps for ctx in watch.seen} == {3}
    with torch.no_grad():
        cond = tiny.encode_prompts(PROMPTS).tokens
        uncond = tiny.encode_prompts([""] * 3).tokens
    ctx, text = watch.seen[-1], watch.texts[-1]
    torch.testing.assert_close(text[ctx.rows("target/cond")], cond)
    if guidance > 1:
        torch.testing.assert_close(text[ctx.rows("target/uncond")], uncond)
        assert len(text) == 6
    else:
        assert len(text) == 3
        with pytest.raises(ValueError, match="no batch rows have the role 'uncond'"):
            ctx.rows("uncond")


def test_every_step_is_shown(tiny: Any) -> None:
    shown: list[tuple[int, Tensor]] = []
    picture = sample(
        tiny,
        PROMPTS[:1],
        [3],
        settings=Sampling(steps=3),
        on_step=lambda step, x_t: shown.append((step, x_t.clone())),
    )
    assert [step for step, _ in shown] == [0, 1, 2]
    assert torch.equal(tiny.decode(shown[-1][1]), picture)


@pytest.mark.parametrize("size", [(30, 32), (32, 30)], ids=["height", "width"])
def test_a_size_between_latents_is_refused(size: tuple[int, int], tiny: Any) -> None:
    with pytest.raises(ValueError, match=f"size {size[0]}x{size[1]} must be a multiple of 4"):
        sample(tiny, PROMPTS[:1], [3], settings=Sampling(steps=1, size=size))


@pytest.mark.parametrize("size", [(0, 32), (32, -4)], ids=["zero", "negative"])
def test_a_size_of_nothing_is_refused(size: tuple[int, int], tiny: Any) -> None:
    with pytest.raises(ValueError, match="must be a multiple of 4"):
        sample(tiny, PROMPTS[:1], [3], settings=Sampling(steps=1, size=size))


def test_one_seed_to_each_prompt(tiny: Any) -> None:
    with pytest.raises(ValueError, match="3 prompts and 2 seeds"):
        sample(tiny, PROMPTS, SEEDS[:2], settings=Sampling(steps=1))


def test_a_clip_of_frames_that_do_not_mix_is_that_many_pictures(tiny: Any) -> None:
    """A model of images paints the frames one by one, from the noise of the clip's seed."""
    clips = sample(tiny, PROMPTS[:2], SEEDS[:2], settings=Sampling(steps=2, frames=3))
    assert clips.shape == (6, 3, 32, 32)
    alone = sample(tiny, PROMPTS[1:2], SEEDS[1:2], settings=Sampling(steps=2, frames=3))
    torch.testing.assert_close(clips[3:], alone, rtol=0, atol=1e-4)
    apart = (clips[0] - clips[1]).abs().max()
    assert apart > 0.05
    noise = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(SEEDS[0]))
    shown: list[Tensor] = []
    sample(
        tiny,
        PROMPTS[:1],
        SEEDS[:1],
        settings=Sampling(steps=1, frames=3),
        on_step=lambda _, x: shown.append(x),
    )
    scheduler = tiny.scheduler()
    scheduler.set_timesteps(1)
    (t,) = scheduler.timesteps
    with torch.no_grad():
        text = tiny.encode_prompts(["", PROMPTS[0]])
        null, own = (
            tiny.predict(noise, t.expand(3), Condition(text.tokens[i : i + 1].expand(3, -1, -1)))
            for i in range(2)
        )
    wanted = scheduler.step(null + 5 * (own - null), t, noise).prev_sample
    torch.testing.assert_close(shown[0], wanted, rtol=1e-4, atol=1e-4)


def test_many_clips_are_the_batches_in_order(tiny: Any) -> None:
    many = sample_many(tiny, PROMPTS, SEEDS, settings=Sampling(steps=1, frames=2), batch_size=2)
    assert many.shape == (6, 3, 32, 32)
    assert torch.equal(
        many[4:], sample(tiny, PROMPTS[2:], SEEDS[2:], settings=Sampling(steps=1, frames=2))
    )


def test_ops_are_told_of_frames_their_rate_and_all_their_rows(tiny: Any) -> None:
    watch = Watch()
    tiny.host.install(watch, select(tiny.sites, "cross")[:1])
    sample(tiny, PROMPTS[:2], SEEDS[:2], settings=Sampling(steps=1, frames=3, fps=12))
    (ctx,), (text,) = watch.seen, watch.texts
    assert (ctx.frames, len(text)) == (3, 12)
    assert ctx.fps is not None and ctx.fps.tolist() == [12.0] * 4
    assert ctx.rows("uncond") == slice(0, 6) and ctx.rows("cond") == slice(6, 12)
    with torch.no_grad():
        cond = tiny.encode_prompts(PROMPTS[:2]).tokens
    torch.testing.assert_close(text[ctx.rows("cond")], cond.repeat_interleave(3, 0))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"frames": 0}, "frames=0: give 1 for pictures, or more for clips"),
        ({"temporal_guidance": 2.0}, "temporal_guidance=2 is for clips that are guided"),
        ({"temporal_guidance": 2.0, "frames": 2, "guidance": 1.0}, "and a guidance above 1"),
    ],
)
def test_what_is_no_clip_is_refused(options: dict[str, Any], says: str, tiny: Any) -> None:
    with pytest.raises(ValueError, match=says):
        sample(tiny, PROMPTS[:1], [3], settings=Sampling(steps=1, **options))


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp"])
def test_other_solvers_are_those_of_the_stock_pipeline(name: str, tiny: Any) -> None:
    """`data.prior_sampler`: the same noise and the same number of calls as in diffusers."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

    kinds = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}
    kinds["dpmpp"] = DPMSolverMultistepScheduler
    settings = Sampling(steps=4, guidance=3.0, sampler=name)
    own = sample(tiny, ["a fox"], [5], settings=settings)
    pipeline = tiny.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = kinds[name].from_config(pipeline.scheduler.config)
    start = torch.randn((1, 8, 8, 8), generator=torch.Generator().manual_seed(5))
    stock = pipeline(
        "a fox", num_inference_steps=4, guidance_scale=3.0, latents=start, output_type="pt",
        negative_prompt="", height=32, width=32,
    ).images  # fmt: skip
    torch.testing.assert_close(own, stock * 2 - 1, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_flow_has_no_ddim_and_takes_sides_of_whole_tokens(dit: Any) -> None:
    with pytest.raises(ValueError, match="sampler=ddim is for backbones on a VP path"):
        sample(dit, ["a fox"], [0], settings=Sampling(steps=1, sampler="ddim"))
    with pytest.raises(ValueError, match="size 36x36 must be a multiple of 8"):
        sample(dit, ["a fox"], [0], settings=Sampling(steps=1, size=(36, 36)))
    one, other = (
        sample(dit, ["a fox"], [0], settings=Sampling(steps=2, sampler=name, size=(40, 40)))
        for name in ("euler", "dpmpp")
    )
    assert one.shape == (1, 3, 40, 40) and not torch.equal(one, other)
