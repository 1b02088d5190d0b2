"""Hooks of the sampler: when each is called, with what, in which order, and where they are kept."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from trainer.attention.context import StepContext
from trainer.attention.hooks import Predict, Prediction, Sampler, SamplingHook
from trainer.config.lineage import backbone_spec
from trainer.config.load import methods_of
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods
from trainer.methods.feature.pix2video import Pix2Video
from trainer.methods.feature.text2video_zero import Text2VideoZero
from trainer.methods.method import Edit, Method
from trainer.runs.adapter import load_adapted, load_base, save_adapter


class Hooked(Method):
    """A method of hooks alone."""

    kind: ClassVar[Literal["attention"]] = "attention"
    hooks: tuple[Any, ...] = ()

    def apply(self, model: Any) -> Edit:
        return Edit(sampling=self.hooks)


def latents(backbone: Any, frames: int = 1) -> list[Tensor]:
    """x_t after each step of one picture, or clip, of a fox."""
    seen: list[Tensor] = []
    settings = Sampling(steps=3, guidance=3.0, frames=frames)
    sample(backbone, ["a fox"], [3], settings=settings, on_step=lambda _, x: seen.append(x))
    return seen


def compare(own: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(own) == len(wanted) == 3
    for one, other in zip(own, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


def test_combine_changes_the_output_of_guidance(tiny: Any) -> None:
    seen: list[tuple[int, list[str]]] = []

    def combine(prediction: Prediction, ctx: StepContext) -> Tensor:
        seen.append((ctx.step, list(prediction.outputs)))
        rest = prediction.outputs["target/cond"] - prediction.outputs["target/uncond"]
        return prediction.output - 2.0 * rest

    apply_methods(tiny, {"hooked": Hooked(hooks=(SamplingHook(combine=combine),))}, trains=False)
    own = latents(tiny)
    assert seen == [(step, ["target/uncond", "target/cond"]) for step in range(3)]
    tiny.sampling_hooks.clear()
    wanted: list[Tensor] = []
    sample(
        tiny,
        ["a fox"],
        [3],
        settings=Sampling(steps=3, guidance=1.0),
        on_step=lambda _, x: wanted.append(x),
    )
    compare(own, wanted)  # a scale of 3 - 2 = 1 is the prompt alone


def test_hooks_act_in_order_before_and_after_the_step(tiny: Any) -> None:
    def add(value: float) -> SamplingHook:
        return SamplingHook(
            before_step=lambda x_t, predict, ctx: x_t + value * (ctx.step + 1),
            after_step=lambda x_t, prediction, ctx: x_t * (1 + value) - value,
        )

    methods = {"one": Hooked(hooks=(add(0.1), add(-0.2))), "two": Hooked(hooks=(add(0.4),))}
    apply_methods(tiny, methods, trains=False)
    assert list(tiny.sampling_hooks) == ["one", "two"]
    own = latents(tiny)

    tiny.sampling_hooks.clear()
    scheduler = tiny.scheduler()
    scheduler.set_timesteps(3)
    x = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    wanted = []
    with torch.no_grad():
        null, text = tiny.encode_prompts([""]), tiny.encode_prompts(["a fox"])
        for step, t in enumerate(scheduler.timesteps):
            x = x + 0.3 * (step + 1)
            uncond, cond = (tiny.predict(x, t[None], condition) for condition in (null, text))
            x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x).prev_sample
            for value in (0.1, -0.2, 0.4):
                x = x * (1 + value) - value
            wanted.append(x)
    compare(own, wanted)


def test_a_hook_takes_the_gradient_of_a_loss_on_x0(tiny: Any) -> None:
    """Through the denoiser, in a sampler that has no gradients of its own."""
    wanted = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    slopes: list[Tensor] = []

    def distance(x0: Tensor) -> Tensor:
        return (x0 - wanted).square().sum()

    def towards(x_t: Tensor, predict: Predict, ctx: StepContext) -> Tensor:
        assert not torch.is_grad_enabled()
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            loss = distance(predict(x).x0)
        (slope,) = torch.autograd.grad(loss, x)
        slopes.append(slope)
        return x_t - 0.05 * slope

    free = latents(tiny)
    apply_methods(
        tiny, {"hooked": Hooked(hooks=(SamplingHook(before_step=towards),))}, trains=False
    )
    drawn = latents(tiny)
    assert not drawn[-1].requires_grad
    assert float(distance(drawn[-1])) < 0.9 * float(distance(free[-1]))
    # a directional derivative by differences, at the first step
    scheduler = tiny.scheduler()
    scheduler.set_timesteps(3)
    t = scheduler.timesteps[:1]
    alpha = tiny.alphas_cumprod[int(t)].sqrt()
    sigma = (1 - tiny.alphas_cumprod[int(t)]).sqrt()
    x = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    null, text = (
        tiny.encode_prompts([prompt]).map(lambda value: value.detach().double())
        for prompt in ("", "a fox")
    )
    tiny.double()

    @torch.no_grad()
    def loss_at(x: Tensor) -> float:
        uncond, cond = tiny.predict(x, t, null), tiny.predict(x, t, text)
        output = uncond + 3.0 * (cond - uncond)
        x0 = alpha * x - sigma * output if tiny.target == "v" else (x - sigma * output) / alpha
        return float((x0 - wanted).square().sum())

    step = 1e-4 * slopes[0].double() / slopes[0].double().norm()
    numeric = (loss_at(x + step) - loss_at(x - step)) / 2e-4
    assert numeric == pytest.approx(float(slopes[0].norm()), rel=1e-3)


def test_x0_is_what_the_guided_output_means_and_costs_nothing_unasked(tiny: Any) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(x_t: Tensor, prediction: Prediction, ctx: StepContext) -> Tensor:
        assert "x0" not in vars(prediction)
        seen.append((prediction.x_t, prediction.output, prediction.x0))
        return x_t

    apply_methods(tiny, {"hooked": Hooked(hooks=(SamplingHook(after_step=note),))}, trains=False)
    latents(tiny)
    scheduler = tiny.scheduler()
    scheduler.set_timesteps(3)
    for t, (x_t, output, x0) in zip(scheduler.timesteps, seen, strict=True):
        wanted = scheduler.step(output, t, x_t).pred_original_sample
        torch.testing.assert_close(x0, wanted, rtol=1e-4, atol=1e-4)


def test_begin_gives_latents_and_the_step_they_stand_at(tiny: Any) -> None:
    calls: list[tuple[int, int, bool]] = []

    def begin(x_t: Tensor, sampler: Sampler) -> tuple[Tensor, int]:
        calls.append((sampler.steps, sampler.frames, sampler.given))
        return sampler(x_t, 0, 2) + 1.0, 2

    free = latents(tiny)
    apply_methods(tiny, {"hooked": Hooked(hooks=(SamplingHook(begin=begin),))}, trains=False)
    shown = latents(tiny)
    assert calls == [(3, 1, False)]
    torch.testing.assert_close(shown[:2], free[:2], rtol=0, atol=0)
    scheduler = tiny.scheduler()
    scheduler.set_timesteps(3)
    with torch.no_grad():
        t, x = scheduler.timesteps[2], free[1] + 1.0
        uncond, cond = (tiny.predict(x, t[None], tiny.encode_prompts([p])) for p in ("", "a fox"))
        wanted = scheduler.step(uncond + 3.0 * (cond - uncond), t, x).prev_sample
    torch.testing.assert_close(shown[2], wanted, rtol=0, atol=2e-4)
    sample(
        tiny,
        ["a fox"] * 2,
        [3, 4],
        settings=Sampling(steps=3, guidance=1.0, frames=2),
        start=torch.zeros(4, 8, 8, 8),
    )
    assert calls[1:] == [(3, 2, True)]


def starting() -> Hooked:
    return Hooked(hooks=(SamplingHook(begin=lambda x_t, sampler: (x_t, 0)),))


@pytest.mark.parametrize("first", ["text2video_zero", "other"])
def test_two_methods_with_a_start_are_refused_by_name(first: str, tiny: Any) -> None:
    methods: dict[str, Method] = {"text2video_zero": Text2VideoZero(), "other": starting()}
    if first == "other":
        methods = dict(reversed(methods.items()))
    one, two = methods
    says = f"methods.{one} and methods.{two} both claim the start of sampling of unet"
    with pytest.raises(ValueError, match=says):
        apply_methods(tiny, methods, trains=False)


def test_a_start_of_an_earlier_run_is_refused_by_name(tiny: Any) -> None:
    apply_methods(tiny, {"other": starting()}, trains=False)
    with pytest.raises(
        ValueError, match=r"methods\.next: the start of sampling of unet belongs to"
    ):
        apply_methods(tiny, {"next": starting()}, trains=False)


def test_a_loaded_adapter_and_a_copy_bring_their_hooks(tmp_path: Path, tiny_folder: Path) -> None:
    backbone = load_base(backbone_spec(str(tiny_folder)), str(tiny_folder))
    tree = {"pix2video": {"share": 0.25}, "lora": {"rank": 1, "sites": "cross"}}
    plan = apply_methods(backbone, methods_of(tree))
    assert [len(edit.sampling) for edit in plan.edits.values()] == [1, 0]
    stored = {name: backbone.get_parameter(name) for name in plan.names}
    header = {"backbone": str(tiny_folder), "methods": tree}
    save_adapter(tmp_path / "a.safetensors", stored, header, backbone.identity())
    loaded, _ = load_adapted(tmp_path / "a.safetensors")
    assert list(loaded.sampling_hooks) == ["pix2video"]
    for model in (loaded, deepcopy(backbone)):
        (hook,) = model.hooks
        assert hook.after_step is not None and hook.after_step.__self__.share == 0.25  # type: ignore[attr-defined]
        torch.testing.assert_close(
            latents(model, frames=2)[-1], latents(backbone, frames=2)[-1], rtol=0, atol=1e-5
        )


def test_a_method_without_hooks_keeps_none(tiny: Any) -> None:
    apply_methods(tiny, methods_of({"lora": {}}))
    assert tiny.hooks == () and tiny.sampling_hooks == {}
    apply_methods(tiny, {"pix2video": Pix2Video()}, trains=False)
    assert len(tiny.hooks) == 1


def test_a_hook_begins_elsewhere(tiny: Any) -> None:
    """It is given the noise and the sampler; what it returns is where sampling goes on from."""
    seen: list[tuple[tuple[int, ...], int]] = []

    def begin(x_t: Tensor, sampler: Sampler) -> tuple[Tensor, int]:
        seen.append((tuple(x_t.shape), sampler.steps))
        return x_t, 2

    apply_methods(tiny, {"hooked": Hooked(hooks=(SamplingHook(begin=begin),))}, trains=False)
    drawn = latents(tiny)
    assert seen == [((1, 8, 8, 8), 3)]
    assert len(drawn) == 1  # of three steps
