"""Inversion: the sampler paints again what was inverted, picture or clip, on both paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.config.load import methods_of
from trainer.data.kept import KeptSteps
from trainer.diffusion.inversion import below, invert, step_of
from trainer.diffusion.objective import Objective
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods

PROMPT = "a fox on a red background"


@pytest.fixture(params=["unet", "dit"])
def model(
    request: pytest.FixtureRequest, tiny_folder: Path, dit_folder: Path, open_folder: Any
) -> Any:
    """v on a variance-preserving path, and a flow."""
    return open_folder(tiny_folder if request.param == "unet" else dit_folder)


def clean(backbone: Any, rows: int) -> Tensor:
    return torch.randn(
        rows, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(1)
    )


def again(backbone: Any, start: Tensor, steps: int, frames: int = 1) -> Tensor:
    """The latents that sampling from `start` ends at."""
    seen: list[Tensor] = []
    sample(
        backbone,
        [PROMPT],
        [0],
        settings=Sampling(steps=steps, guidance=1.0, frames=frames),
        on_step=lambda _, x: seen.append(x),
        start=start,
    )
    return seen[-1]


def error(backbone: Any, steps: int, iterations: int, frames: int = 1) -> float:
    x = clean(backbone, frames)
    start = invert(backbone, x, [PROMPT], steps=steps, frames=frames, iterations=iterations)
    assert not torch.allclose(start, x, atol=0.1)
    return float((again(backbone, start, steps, frames) - x).abs().max())


def test_the_round_trip_errs_less_with_more_steps(model: Any) -> None:
    few, many = error(model, 5, 1), error(model, 40, 1)
    assert many < 0.3 * few
    assert many < 0.1


def test_the_round_trip_is_exact_when_steps_are_solved(model: Any) -> None:
    assert error(model, 10, 8) < 1e-4


@pytest.mark.parametrize("name", ["tune_a_video", "text2video_zero", "pix2video"])
def test_a_clip_whose_frames_read_each_other_comes_back(name: str, tiny: Any) -> None:
    """Without guidance between frames, which the inverse does not know."""
    if name == "tune_a_video":
        tree: dict[str, Any] = {name: {}}
        apply_methods(tiny, methods_of(tree))
    else:
        tree = {name: {"weight": 0} if name == "pix2video" else {}}
        apply_methods(tiny, methods_of(tree), trains=False)
    assert error(tiny, 10, 8, frames=3) < 1e-4


def test_a_step_is_the_schedulers_own(model: Any) -> None:
    objective = Objective(model.target, model.alphas_cumprod)
    x, output = clean(model, 1), clean(model, 1).flip(-1)
    for step in range(6):
        scheduler = model.scheduler()
        scheduler.set_timesteps(6)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(step)
        t = scheduler.timesteps[step]
        a, b = step_of(objective, t, *below(scheduler, step))
        wanted = scheduler.step(output, t, x).prev_sample
        torch.testing.assert_close(a * x + b * output, wanted, rtol=1e-4, atol=1e-5)


def test_a_step_that_forgets_is_refused(tiny: Any) -> None:
    objective = Objective("x0", tiny.alphas_cumprod)
    with pytest.raises(ValueError, match="the same for every latent, so it has no inverse"):
        step_of(objective, torch.tensor(19), 1.0, 0.0)


def test_refusals(tiny: Any) -> None:
    x = clean(tiny, 3)
    with pytest.raises(ValueError, match="3 latents for 1 prompts and 2 frames"):
        invert(tiny, x, [PROMPT], steps=2, frames=2)
    with pytest.raises(ValueError, match="steps=0"):
        invert(tiny, x, [PROMPT], steps=0, frames=3)
    tiny.scheduler_config["clip_sample"] = True
    with pytest.raises(ValueError, match="its sampler clips the latents"):
        invert(tiny, x, [PROMPT], steps=2, frames=3)


class Interrupted(KeptSteps):
    """Raises instead of storing the third step."""

    def __setitem__(self, step: int, tensor: Tensor) -> None:
        if len(self) == 3:
            raise KeyboardInterrupt
        super().__setitem__(step, tensor)


def test_an_interrupted_inversion_continues_where_it_was(model: Any, tmp_path: Path) -> None:
    x, calls = clean(model, 1), list[int]()
    whole = invert(model, x, [PROMPT], steps=6, iterations=2)
    with pytest.raises(KeyboardInterrupt):
        invert(model, x, [PROMPT], steps=6, iterations=2, known=Interrupted(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"0000{i}.npz" for i in (3, 4, 5)]
    model.denoiser.register_forward_hook(lambda *_: calls.append(1))
    again = invert(model, x, [PROMPT], steps=6, iterations=2, known=KeptSteps(tmp_path))
    assert torch.equal(again, whole)
    assert len(calls) == 2 * 3  # the steps 2, 1 and 0


def test_a_damaged_step_is_found_again(model: Any, tmp_path: Path) -> None:
    x = clean(model, 1)
    whole = invert(model, x, [PROMPT], steps=4, known=KeptSteps(tmp_path))
    data = bytearray((tmp_path / "00000.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "00000.npz").write_bytes(data)
    assert KeptSteps(tmp_path).get(0) is None
    assert torch.equal(invert(model, x, [PROMPT], steps=4, known=KeptSteps(tmp_path)), whole)
