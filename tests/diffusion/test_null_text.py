"""Null-text embeddings: the published algorithm, and that they give a guided source back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.condition import Condition
from trainer.attention.context import StepContext, current, use
from trainer.diffusion.edit_source import EditSource
from trainer.diffusion.inversion import invert
from trainer.diffusion.null_text import enough, learning_rate, null_text
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods
from trainer.methods.map.p2p import P2P

PROMPT, SCALE = "a fox on a red background", 4.0


def clean(frames: int) -> Tensor:
    return torch.randn(frames, 8, 8, 8, generator=torch.Generator().manual_seed(1))


def inverted(backbone: Any, x: Tensor, steps: int) -> dict[int, Tensor]:
    trajectory: dict[int, Tensor] = {}
    invert(backbone, x, [PROMPT], steps=steps, frames=len(x), iterations=6, known=trajectory)
    return trajectory


def how(frames: int, steps: int, **more: Any) -> Sampling:
    return Sampling(steps=steps, guidance=SCALE, frames=frames, **more)


@pytest.mark.parametrize("frames", [1, 2])
def test_it_is_the_published_algorithm(frames: int, tiny: Any) -> None:
    """arXiv 2211.09794, algorithm 1, with Adam (arXiv 1412.6980) and the step of DDIM written
    out: one embedding a step, shared by all frames, from that of the step before."""
    steps, most = 4, 3
    x = clean(frames)
    trajectory = inverted(tiny, x, steps)
    found = null_text(
        tiny, x, trajectory, prompt=PROMPT, settings=how(frames, steps, negative="red"), most=most
    )
    assert found.shape == (steps, 32, 128) and not found.requires_grad
    tiny.requires_grad_(False)
    e = tiny.encode_prompts(["red"]).tokens[0].detach()
    text = tiny.encode_prompts([PROMPT]).tokens.detach().repeat(frames, 1, 1)
    now = trajectory[0]
    for step in range(steps):
        t = 999 - 250 * step
        one, two = (float(tiny.alphas_cumprod[v]) if v >= 0 else 1.0 for v in (t, t - 250))
        wanted = trajectory.get(step + 1, x)

        def output(x_t: Tensor, tokens: Tensor, at: int = t) -> Tensor:
            ctx = StepContext(0, 1, torch.tensor(at), frames=frames)
            with use(ctx):
                return tiny.predict(x_t, torch.full((frames,), at), Condition(tokens))

        def after(e: Tensor, a: float = one, b: float = two) -> Tensor:
            u = output(now, e.expand(frames, -1, -1))  # noqa: B023
            v = u + SCALE * (cond - u)  # noqa: B023
            x0 = a**0.5 * now - (1 - a) ** 0.5 * v  # noqa: B023
            noise = a**0.5 * v + (1 - a) ** 0.5 * now  # noqa: B023
            return b**0.5 * x0 + (1 - b) ** 0.5 * noise

        cond = output(now, text).detach()
        mean, square = torch.zeros_like(e), torch.zeros_like(e)
        i = step * 50 / steps
        for k in range(1, most + 1):
            free = e.clone().requires_grad_()
            loss = (after(free) - wanted).square().mean()
            (slope,) = torch.autograd.grad(loss, free)
            mean = 0.9 * mean + 0.1 * slope
            square = 0.999 * square + 0.001 * slope**2
            size = 1e-2 * (1 - i / 100)
            e = e - size * (mean / (1 - 0.9**k)) / ((square / (1 - 0.999**k)).sqrt() + 1e-8)
            if float(loss.detach()) < 1e-5 + 2e-5 * i:
                break
        torch.testing.assert_close(found[step], e, rtol=1e-3, atol=1e-3)
        e = found[step]
        now = after(e).detach()


def test_the_constants_are_those_of_fifty_steps() -> None:
    assert [learning_rate(i, 50) for i in (0, 10, 49)] == pytest.approx([1e-2, 9e-3, 5.1e-3])
    assert [enough(i, 50) for i in (0, 10, 49)] == pytest.approx([1e-5, 2.1e-4, 9.9e-4])
    assert learning_rate(10, 20) == learning_rate(25, 50) and enough(10, 20) == enough(25, 50)


def test_it_stops_where_a_step_is_right_already(tiny: Any) -> None:
    """After one step of Adam, since the error is that before it."""
    x, calls = clean(1), list[int]()
    trajectory = inverted(tiny, x, 3)
    tiny.denoiser.register_forward_hook(lambda *_: calls.append(1))
    # guided from the source's own text, the guided output is the unguided one
    null_text(tiny, x, trajectory, prompt=PROMPT, settings=how(1, 3, negative=PROMPT))
    assert len(calls) == 3 * (1 + 1 + 1)  # with text, in the one step, and to go on


def test_a_guided_source_comes_back(tiny: Any) -> None:
    frames, steps = 2, 8
    x = clean(frames)
    trajectory = inverted(tiny, x, steps)
    start, settings = trajectory[0], how(frames, steps)
    told = []
    uncond = null_text(
        tiny, x, trajectory, prompt=PROMPT, settings=settings, most=30, advance=told.append
    )
    assert told == [1] * steps
    apply_methods(tiny, {"p2p": P2P(blend=True)}, trains=False)

    def error(uncond: Tensor | None) -> float:
        """Of an edit to the same prompt, which is the source's own rows."""
        seen: list[Tensor] = []
        source = EditSource(PROMPT, inverted=uncond is not None, uncond=uncond)
        sample(
            tiny,
            [PROMPT],
            [0],
            settings=settings,
            start=start,
            edited=source,
            on_step=lambda _, x_t: seen.append(x_t),
        )
        return float((seen[-1] - x).square().mean())

    assert error(uncond) < 0.2 * error(None)


def test_refusals(tiny: Any) -> None:
    x = clean(1)
    with pytest.raises(ValueError, match="null-text embeddings are for guided sampling"):
        null_text(tiny, x, {}, prompt=PROMPT, settings=Sampling(steps=3, guidance=1))
    with pytest.raises(ValueError, match="has no latents before step 0; invert with as many"):
        null_text(tiny, x, {}, prompt=PROMPT, settings=how(1, 3))


def test_further_input_channels_are_read(tiny: Any) -> None:
    """By every call of the network, as while it is sampled."""
    x, seen = clean(2), list[Any]()
    trajectory = inverted(tiny, x, 2)
    values = {"depth": torch.ones(2, 1, 8, 8)}
    tiny.denoiser.register_forward_pre_hook(lambda *_: seen.append(current()))
    null_text(tiny, x, trajectory, prompt=PROMPT, settings=how(2, 2), most=1, channels=values)
    assert len(seen) >= 6
    assert all(torch.equal(ctx.channels["depth"], values["depth"]) for ctx in seen)
