"""Guidance by what is known of a clip: the equation beside a plain loop, forward process of known
frames, the corrector, blocks, and what is refused."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.context import StepContext, use
from trainer.attention.hooks import Predict, SamplingHook
from trainer.attention.rows import Rows
from trainer.config.load import methods_of
from trainer.diffusion.blocks import Blocks
from trainer.diffusion.known_frames import KnownFrames
from trainer.diffusion.objective import Objective, from_x0, to_x0
from trainer.diffusion.reconstruction import Reconstruction
from trainer.diffusion.sampler import generators_of, noise_of, sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods

FRAMES, STEPS, SCALE = 4, 3, 3.0
PROMPT = "a fox"


@pytest.fixture
def clip_model(tiny: Any) -> Any:
    """Layers through time, of random weights, so that frames see each other."""
    apply_methods(tiny, methods_of({"vdm": {"heads": 2}}))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for name, value in tiny.denoiser.named_parameters():
            if "temporal" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return tiny.requires_grad_(False)


def known_frames(at: tuple[int, ...], clips: int = 1) -> KnownFrames:
    shape = (clips, len(at), 8, 8, 8)
    return KnownFrames(torch.randn(shape, generator=torch.Generator().manual_seed(7)), at)


def steps_of(backbone: Any, known: KnownFrames | None, **options: Any) -> list[Tensor]:
    """x_t after each step of a clip."""
    seen: list[Tensor] = []
    settings = Sampling(STEPS, SCALE, frames=FRAMES, **options)
    keep = lambda _, x: seen.append(x)  # noqa: E731
    sample(backbone, [PROMPT], [3], settings=settings, known=known, on_step=keep)
    return seen


def guided(backbone: Any, x: Tensor, ctx: StepContext) -> Tensor:
    """The network's output with guidance by text, in the plainest way."""
    found = []
    for text in ("", PROMPT):
        condition = backbone.encode_prompts([text]).per_frame(FRAMES)
        with use(ctx):
            found.append(backbone.predict(x, ctx.timestep.expand(len(x)), condition))
    return found[0] + SCALE * (found[1] - found[0])


def plainly(
    backbone: Any, known: KnownFrames, weight: float, *, ancestral: bool = False
) -> list[Tensor]:
    """The paper's equations 7 and 8 step by step, on a v-prediction VP model, with DDIM or
    ancestral steps written out."""
    alphas = backbone.alphas_cumprod
    scheduler = backbone.scheduler()
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(3)
    x, latents = torch.randn(FRAMES, 8, 8, 8, generator=generator), known.latents[0]
    at, others, found = list(known.at), [n for n in range(FRAMES) if n not in known.at], []
    nexts = [*map(int, scheduler.timesteps[1:]), -1]
    for t, following in zip(scheduler.timesteps, nexts, strict=True):
        before = following if ancestral else int(t) - 1000 // STEPS
        square, lower = alphas[int(t)], alphas[before] if before >= 0 else torch.ones(())
        alpha, sigma = square.sqrt(), (1 - square).sqrt()
        ctx = StepContext(0, STEPS, t, frames=FRAMES, groups=Rows.of(("target/cond",), FRAMES))
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            clean = alpha * z - sigma * guided(backbone, z, ctx)
            lost = 0.0
            for number, wanted in zip(at, latents, strict=True):
                shown = clean[number]
                if known.shrink > 1:
                    shown = shown.unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2))
                lost = lost + (wanted - shown).pow(2).sum()
            (slope,) = torch.autograd.grad(lost, z)
        clean = clean.detach()
        moved = others if known.shrink == 1 else range(FRAMES)
        for number in moved:
            clean[number] = clean[number] - weight * alpha / 2 * slope[number]
        if known.shrink == 1:
            clean[at] = latents
        noise = (x - alpha * clean) / sigma
        if ancestral:  # the posterior of the forward process, arXiv 2006.11239, equation 7
            ratio = square / lower
            mean = lower.sqrt() * (1 - ratio) / (1 - square) * clean
            mean = mean + ratio.sqrt() * (1 - lower) / (1 - square) * x
            drawn = (
                torch.cat([torch.randn(1, 8, 8, 8, generator=generator) for _ in range(FRAMES)])
                if before >= 0
                else torch.zeros_like(x)
            )
            x = mean + ((1 - lower) / (1 - square) * (1 - ratio)).clamp(min=0).sqrt() * drawn
        else:
            x = lower.sqrt() * clean + (1 - lower).sqrt() * noise
        found.append(x)
    return found


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_equals_the_equation_step_by_step(weight: float, clip_model: Any) -> None:
    known = known_frames((2, 0))
    own = steps_of(clip_model, known, reconstruction=weight)
    wanted = plainly(clip_model, known, weight)
    for one, other in zip(own, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-4)
    torch.testing.assert_close(own[-1][[2, 0]], known.latents[0], rtol=0, atol=1e-5)


def test_a_lower_resolution_guides_all_frames_and_replaces_none(clip_model: Any) -> None:
    whole = known_frames((0, 1, 3)).latents
    known = KnownFrames.shrunk(whole, (0, 1, 3), 2)
    own = steps_of(clip_model, known, reconstruction=0.7)
    wanted = plainly(clip_model, known, 0.7)
    for one, other in zip(own, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-4)
    assert (known.seen_in(own[-1][None]) - known.latents).abs().max() > 1e-3


def test_ancestral_sampling(clip_model: Any) -> None:
    known = known_frames((1,))
    own = steps_of(clip_model, known, reconstruction=0.7, sampler="ddpm")
    wanted = plainly(clip_model, known, 0.7, ancestral=True)
    for one, other in zip(own, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("target", ["eps", "v", "x0", "flow"])
def test_an_output_that_means_x0(target: str) -> None:
    squared = None if target == "flow" else torch.linspace(0.99, 0.01, 10)
    objective, t = Objective(target, squared), torch.tensor([2.0, 7.0])
    x0, x_t = torch.randn(2, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    if target == "flow":
        t = t * 100
    output = from_x0(objective, x0, x_t, t)
    torch.testing.assert_close(to_x0(objective, output, x_t, t), x0)


def test_known_frames_follow_the_forward_process(clip_model: Any) -> None:
    """At every level, ancestral samples of a known frame have mean alpha x0 and deviation sigma."""
    known = known_frames((1, 2))
    seen = steps_of(clip_model, known, reconstruction=0.0, sampler="ddpm")
    scheduler = clip_model.scheduler()
    scheduler.set_timesteps(STEPS)
    for x, t in zip(seen[:-1], scheduler.timesteps[1:], strict=True):
        square = float(clip_model.alphas_cumprod[int(t)])
        rest = (x[[1, 2]] - sqrt(square) * known.latents[0]) / sqrt(1 - square)
        assert abs(float(rest.mean())) < 0.12 and abs(float(rest.std()) - 1) < 0.08


def test_the_corrector_is_a_langevin_step(clip_model: Any) -> None:
    """Beside the same of a hook written out, with the noise that the clip's own generator gives."""
    known = known_frames((0,))
    own = steps_of(clip_model, known, reconstruction=0.0, corrector=2)
    generator = generators_of([3])[0]
    torch.randn(FRAMES, 8, 8, 8, generator=generator)  # what the clip begins from

    def correct(x: Tensor, predict: Predict, ctx: StepContext) -> Tensor:
        square = clip_model.alphas_cumprod[int(ctx.timestep)]
        alpha, sigma = square.sqrt(), (1 - square).sqrt()
        for _ in range(2 if ctx.step else 0):
            noise = (x - alpha * predict(x).x0) / sigma
            drawn = torch.randn(FRAMES, 8, 8, 8, generator=generator)
            x = x - 0.5 * 0.1 * sigma * noise + sqrt(0.1) * sigma * drawn
        return x

    combine = Reconstruction((known,), 0.0).hook
    clip_model.sampling_hooks["plain"] = (SamplingHook(before_step=correct), combine)
    wanted = steps_of(clip_model, None)
    for one, other in zip(own, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)
    assert not torch.allclose(own[1], steps_of_plain(clip_model, known)[1], atol=1e-2)


def steps_of_plain(backbone: Any, known: KnownFrames) -> list[Tensor]:
    backbone.sampling_hooks.clear()
    return steps_of(backbone, known, reconstruction=0.0)


def test_blocks_go_on_from_the_frames_before(clip_model: Any) -> None:
    """The first block is the clip of as many frames; each next one is sampled beside known frames,
    from noise of the same generator."""
    settings = Sampling(STEPS, SCALE, frames=7, blocks=Blocks(4, 2), reconstruction=0.7)
    pictures = sample(clip_model, [PROMPT, "a cat"], [3, 4], settings=settings)
    assert len(pictures) == 14
    alone = Sampling(STEPS, SCALE, frames=4, reconstruction=0.7)
    first = sample(clip_model, [PROMPT, "a cat"], [3, 4], settings=alone)
    clips = pictures.unflatten(0, (2, 7))
    torch.testing.assert_close(clips[:, :4], first.unflatten(0, (2, 4)), rtol=0, atol=1e-5)

    # the blocks by hand, each with what is known of it
    for row, (prompt, seed) in enumerate([(PROMPT, 3), ("a cat", 4)]):
        generators = generators_of([seed])
        latents: list[Tensor] = []
        known: KnownFrames | None = None
        for shared in (0, 2, 3):  # frames 0 to 3, 2 to 5, 3 to 6
            noise = noise_of(clip_model, generators, alone)
            if shared:
                known = KnownFrames(torch.stack(latents[-shared:])[None], tuple(range(shared)))
            seen: list[Tensor] = []
            sample_from(clip_model, noise, known, prompt=prompt, seen=seen)
            latents += list(seen[-1][shared:])
        own = clip_model.decode(torch.stack(latents), 7)
        torch.testing.assert_close(clips[row], own, rtol=0, atol=2e-3)


def sample_from(
    backbone: Any, noise: Tensor, known: KnownFrames | None, *, prompt: str, seen: list[Tensor]
) -> None:
    """A block of 4 frames from this noise."""
    hooks = () if known is None else (Reconstruction((known,), 0.7).hook,)
    backbone.sampling_hooks["by hand"] = hooks
    settings = Sampling(STEPS, SCALE, frames=4)
    keep = lambda _, x: seen.append(x)  # noqa: E731
    sample(backbone, [prompt], [0], settings=settings, start=noise, on_step=keep)
    del backbone.sampling_hooks["by hand"]


def test_what_is_known_of_a_long_clip_is_known_in_its_blocks(clip_model: Any) -> None:
    """Every third frame of nine, in blocks of 5: each is in its place at the end."""
    known = known_frames((0, 3, 6))
    settings = Sampling(STEPS, SCALE, frames=9, blocks=Blocks(5, 1), reconstruction=0.0)
    seen: list[Tensor] = []
    keep = lambda _, x: seen.append(x)  # noqa: E731
    sample(clip_model, [PROMPT], [3], settings=settings, known=known, on_step=keep)
    first, second = seen[STEPS - 1], seen[2 * STEPS - 1]  # frames 0 to 4, and 4 to 8
    torch.testing.assert_close(first[[0, 3]], known.latents[0, :2], rtol=0, atol=1e-5)
    torch.testing.assert_close(second[2], known.latents[0, 2], rtol=0, atol=1e-5)
    torch.testing.assert_close(second[0], first[4], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("methods", "options", "says"),
    [
        ({}, {}, "makes every frame by itself, so that known frames say nothing of the others"),
        (
            {"pix2video": {}},
            {},
            "known= does not go with methods.pix2video, which changes the latents between",
        ),
        (
            {"text2video_zero": {}},
            {"blocks": Blocks(2, 1)},
            "block= does not go with methods.text2video_zero",
        ),
        (
            {},
            {"sampler": "euler"},
            "scheduler=euler does not go with known=; leave it out, or give ddpm",
        ),
        ({}, {"frames": 2}, "frame 2 is known of a clip of 2 frames, counted from 0; give more"),
    ],
)
def test_refused(methods: Any, options: dict[str, Any], says: str, tiny: Any) -> None:
    if methods:
        apply_methods(tiny, methods_of(methods), trains=False)
    settings = Sampling(2, 1.0, **{"frames": FRAMES, **options})
    with pytest.raises(ValueError, match=says):
        sample(tiny, [PROMPT], [0], settings=settings, known=known_frames((2,)))


def test_a_start_of_its_own_is_refused(tiny: Any) -> None:
    settings, start = Sampling(2, 1.0, frames=4, blocks=Blocks(2, 1)), torch.zeros(4, 8, 8, 8)
    with pytest.raises(ValueError, match="begin from noise of their own; leave out start and"):
        sample(tiny, [PROMPT], [0], settings=settings, start=start)


def test_blocks_are_of_clips_that_are_longer() -> None:
    with pytest.raises(ValueError, match="block=8 is for clips of more frames, and frames=8; give"):
        Sampling(frames=8, blocks=Blocks(8, 4))
