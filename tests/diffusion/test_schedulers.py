"""Every solver of `scheduler=`: as diffusers' own pipeline with its class, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from trainer.attention.hooks import SamplingHook
from trainer.backbones import solvers
from trainer.backbones.schedulers import with_solver
from trainer.backbones.solvers import SOLVERS, UNFIT, solver_names
from trainer.diffusion.sampler import generators_of, sample
from trainer.diffusion.sampler_loop import Denoising
from trainer.diffusion.sampling_settings import Sampling

PROMPTS, SEEDS = ["a fox on a red background", "an apple left of a cat", "a tree"], [3, 4, 5]
VP, FLOW = solver_names(flow=False), solver_names(flow=True)
STEPS = 6
CLOSE = 2 / 255
# what each name means, in diffusers' own words: written out here, not read from the table
VP_CLASSES = {
    "ddim": "DDIM", "ddpm": "DDPM", "pndm": "PNDM", "lms": "LMSDiscrete", "euler": "EulerDiscrete",
    "euler_a": "EulerAncestralDiscrete", "heun": "HeunDiscrete", "dpm2": "KDPM2Discrete",
    "dpm2_a": "KDPM2AncestralDiscrete", "dpmpp": "DPMSolverMultistep",
    "dpmpp_2m": "DPMSolverMultistep", "dpmpp_2m_sde": "DPMSolverMultistep",
    "dpmpp_2s": "DPMSolverSinglestep", "deis": "DEISMultistep", "unipc": "UniPCMultistep",
    "sa_solver": "SASolver", "dpmpp_sde": "DPMSolverSDE",
}  # fmt: skip
FLOW_CLASSES = {
    "euler": "FlowMatchEulerDiscrete", "heun": "FlowMatchHeunDiscrete",
    "dpmpp": "DPMSolverMultistep", "dpmpp_2m": "DPMSolverMultistep",
    "dpmpp_2m_sde": "DPMSolverMultistep", "dpmpp_2s": "DPMSolverSinglestep",
    "deis": "DEISMultistep", "unipc": "UniPCMultistep", "sa_solver": "SASolver",
}  # fmt: skip


def in_order(kind: Any) -> Any:
    """The class, which takes its steps in their order, as in the image-to-image pipelines: some of
    these schedules have one timestep twice, which the text-to-image pipeline stumbles over."""

    class InOrder(kind):  # type: ignore[misc]
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            if hasattr(self, "set_begin_index"):
                self.set_begin_index(0)

    InOrder.__name__ = kind.__name__
    return InOrder


def of_vp(name: str, config: Any, seeds: Sequence[int] = SEEDS) -> Any:
    plain = name.removesuffix("_karras")
    options: dict[str, Any] = {"use_karras_sigmas": True} if name != plain else {}
    if plain == "dpmpp_2m_sde":
        options["algorithm_type"] = "sde-dpmsolver++"
    if plain == "dpmpp_sde":
        options["noise_sampler_seed"] = seeds
    if plain == "pndm":
        options["skip_prk_steps"] = True
    kind = getattr(diffusers, f"{VP_CLASSES[plain]}Scheduler")
    return in_order(kind).from_config(config, **options)


@pytest.fixture
def mild(tiny: Any) -> Any:
    """The tiny backbone with the noise levels of Stable Diffusion: those of its own begin at 20291
    times the data, which ancestral solvers do not survive in float32."""
    tiny.scheduler_config |= {"beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
    tiny.alphas_cumprod = tiny.scheduler().alphas_cumprod.clone()
    return tiny


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", VP)
def test_equals_the_stock_pipeline(name: str, mild: Any) -> None:
    """The pictures of the tiny folder, guided, each seed's noise its own in every step."""
    how = Sampling(steps=STEPS, guidance=4, sampler=name)
    own = sample(mild, PROMPTS, SEEDS, settings=how) / 2 + 0.5
    pipeline = mild.pipeline()
    pipeline.scheduler = of_vp(name, pipeline.scheduler.config)
    wanted = from_stock(pipeline, SEEDS)
    assert float(wanted.std()) > 0.02
    assert float((own - wanted).abs().max()) <= CLOSE


def from_stock(pipeline: Any, seeds: list[int], **more: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    images: Tensor = pipeline(
        prompt=PROMPTS,
        negative_prompt=[""] * len(PROMPTS),
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
        **more,
    ).images
    return images


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m_karras", "heun", "unipc", "ddim", "lms"])
def test_equals_the_stock_pipeline_at_the_noise_levels_of_the_tiny_folder(
    name: str, tiny: Any
) -> None:
    how = Sampling(steps=STEPS, guidance=4, sampler=name)
    own = sample(tiny, PROMPTS, SEEDS, settings=how) / 2 + 0.5
    pipeline = tiny.pipeline()
    pipeline.scheduler = of_vp(name, pipeline.scheduler.config)
    assert float((own - from_stock(pipeline, SEEDS)).abs().max()) <= CLOSE


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", FLOW)
@torch.no_grad()
def test_a_flow_equals_a_loop_over_diffusers_class(name: str, dit: Any) -> None:
    """diffusers has no pipeline of the tiny transformer's parts that calls every one of these, so
    the loop is written out: unconditional rows first, guidance, one step."""
    how = Sampling(steps=STEPS, guidance=4, sampler=name)
    own = sample(dit, PROMPTS, SEEDS, settings=how)
    kind = in_order(getattr(diffusers, f"{FLOW_CLASSES[name]}Scheduler"))
    if name in ("euler", "heun"):
        scheduler = kind(num_train_timesteps=1000, shift=2.0)
    else:
        flow = {"use_flow_sigmas": True, "flow_shift": 2.0, "prediction_type": "flow_prediction"}
        sde = {"algorithm_type": "sde-dpmsolver++"} if name.endswith("sde") else {}
        scheduler = kind(num_train_timesteps=1000, **flow, **sde)
    scheduler.set_timesteps(STEPS)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    x = torch.cat([torch.randn(1, 8, 8, 8, generator=own) for own in generators])
    text = dit.encode_prompts([""] * 3 + PROMPTS)
    for t in scheduler.timesteps:
        uncond, cond = dit.predict(torch.cat([x, x]), t.expand(6), text).chunk(2)
        output = uncond + 4 * (cond - uncond)
        drawn = {"generator": generators} if "sde" in name or name == "sa_solver" else {}
        x = scheduler.step(output, t, x, **drawn).prev_sample
    assert float((own - dit.decode(x)).abs().max()) / 2 <= CLOSE


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [name for name in FLOW if name not in ("euler", "heun")])
def test_a_flow_equals_the_stock_pipeline(name: str, dit: Any) -> None:
    """PixArt's, which calls every solver but the two that are for flows alone."""
    how = Sampling(steps=STEPS, guidance=4, sampler=name)
    own = sample(dit, PROMPTS, SEEDS, settings=how) / 2 + 0.5
    pipeline = dit.pipeline()
    sde = {"algorithm_type": "sde-dpmsolver++"} if name.endswith("sde") else {}
    kind = in_order(getattr(diffusers, f"{FLOW_CLASSES[name]}Scheduler"))
    pipeline.scheduler = kind(
        use_flow_sigmas=True, flow_shift=2.0, prediction_type="flow_prediction", **sde
    )
    options = {"use_resolution_binning": False, "clean_caption": False, "height": 32, "width": 32}
    wanted = from_stock(pipeline, SEEDS, max_sequence_length=dit.text_length, **options)
    assert float((own - wanted).abs().max()) <= CLOSE


def test_solvers_differ_and_come_to_one_picture_with_many_steps(mild: Any) -> None:
    """Those without noise solve one equation."""
    exact = sample(mild, PROMPTS[:1], [3], settings=Sampling(80, 3, sampler="ddim"))
    for name in ("euler", "heun", "dpmpp_2m", "unipc", "dpm2", "deis"):
        few, many = (
            sample(mild, PROMPTS[:1], [3], settings=Sampling(steps, 3, sampler=name))
            for steps in (3, 24)
        )
        assert float((few - exact).abs().mean()) > 1.2 * float((many - exact).abs().mean())


@pytest.mark.parametrize(
    "name", ["euler_a", "ddpm", "dpmpp_2m_sde", "dpmpp_sde", "sa_solver", "heun"]
)
def test_a_seed_is_the_same_in_any_batch(name: str, mild: Any) -> None:
    how = Sampling(steps=STEPS, guidance=3, sampler=name)
    together = sample(mild, PROMPTS, SEEDS, settings=how)
    for number, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = sample(mild, [prompt], [seed], settings=how)
        torch.testing.assert_close(together[number : number + 1], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("frames", "name"), [(1, "euler_a"), (2, "euler_a"), (2, "dpmpp_sde")])
def test_a_clip_with_a_solver_that_draws(frames: int, name: str, mild: Any) -> None:
    how = Sampling(steps=3, guidance=1, sampler=name, frames=frames)
    both = sample(mild, PROMPTS[:2], SEEDS[:2], settings=how)
    alone = sample(mild, PROMPTS[1:2], SEEDS[1:2], settings=how)
    torch.testing.assert_close(both[frames:], alone, rtol=0, atol=1e-4)


def test_frames_of_a_clip_follow_paths_of_their_own(mild: Any) -> None:
    """The first that of its seed, as a picture."""
    how = Sampling(steps=3, guidance=1, sampler="dpmpp_sde", frames=3)
    text = mild.encode_prompts(PROMPTS[:2])
    made = Denoising(mild, text, clips=2, settings=how, generators=generators_of([3, 4]))
    seeds = made.scheduler(0, torch.device("cpu")).noise_sampler_seed
    assert len(set(seeds)) == 6 and (seeds[0], seeds[3]) == (3, 4)


def test_a_package_that_is_not_here_is_named(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"scheduler=dpmpp_sde needs torchsde: pip install 'atten"):
        with_solver(tiny.scheduler(), "dpmpp_sde", key="scheduler")
    with_solver(tiny.scheduler(), "dpmpp_2m_sde", key="scheduler")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dim", "scheduler=dim: no such solver; did you mean ddim?"),
        ("lcm", "scheduler=lcm is for networks distilled to a few steps"),
        ("ipndm", "scheduler=ipndm has a noise path of its own"),
    ],
)
def test_what_is_no_solver_here(name: str, says: str, tiny: Any) -> None:
    with pytest.raises(ValueError, match=says):
        with_solver(tiny.scheduler(), name, key="scheduler")


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in FLOW])
def test_a_flow_refuses_what_is_not_for_it(name: str, dit: Any) -> None:
    with pytest.raises(ValueError, match=f"scheduler={name} is for backbones on a VP path"):
        with_solver(dit.scheduler(), name, key="scheduler")


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", VP)
def test_a_network_that_predicts_x0(name: str, mild: Any) -> None:
    """Used where diffusers' class knows that target, refused where it raises or ignores it."""
    mild.scheduler_config["prediction_type"], mild.target = "sample", "x0"
    how = Sampling(steps=3, guidance=1, sampler=name)
    if "x0" in SOLVERS[name].targets:
        pipeline = mild.pipeline()
        pipeline.scheduler = of_vp(name, pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        wanted = pipeline(
            prompt=PROMPTS[:1], num_inference_steps=3, guidance_scale=1.0, output_type="pt",
            generator=torch.Generator().manual_seed(SEEDS[0]),
        ).images  # fmt: skip
        own = sample(mild, PROMPTS[:1], SEEDS[:1], settings=how) / 2 + 0.5
        assert float((own - wanted).abs().max()) <= CLOSE
        return
    with pytest.raises(ValueError, match="predict eps or v, and this one predicts x0"):
        sample(mild, PROMPTS[:1], SEEDS[:1], settings=how)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", VP)
def test_noise_levels_that_a_class_does_not_know(name: str, tiny: Any) -> None:
    """rescale_betas_zero_snr: those that would silently leave it out are refused."""
    tiny.scheduler_config["rescale_betas_zero_snr"] = True
    own = tiny.scheduler()
    try:
        made = with_solver(own, name, key="scheduler")
    except ValueError as error:
        assert "rescale_betas_zero_snr" in str(error) and f"scheduler={name}" in str(error)
        kind = getattr(diffusers, str(SOLVERS[name].vp))
        stock_like = kind.from_config(own.config)
        assert not torch.allclose(stock_like.alphas_cumprod[-2:], own.alphas_cumprod[-2:], rtol=0.1)
    else:
        close = torch.allclose(made.alphas_cumprod[:-1], own.alphas_cumprod[:-1], rtol=1e-3)
        assert close


def test_a_method_between_the_steps_refuses_another_solver(tiny: Any) -> None:
    hook = SamplingHook(after_step=lambda x_t, prediction, ctx: x_t)
    tiny.sampling_hooks["some_method"] = (hook,)
    wanted = sample(tiny, PROMPTS[:1], [3], settings=Sampling(2, 3))
    same = sample(tiny, PROMPTS[:1], [3], settings=Sampling(2, 3, sampler="ddim"))
    assert torch.equal(wanted, same)
    for name in ("euler", "unipc", "heun"):
        with pytest.raises(ValueError, match=f"scheduler={name} does not go with methods.some_me"):
            sample(tiny, PROMPTS[:1], [3], settings=Sampling(2, 3, sampler=name))


def test_values_that_are_not_finite_are_refused(tiny: Any) -> None:
    """DPM2 a in 4 steps from 20291: the square root of a rounding error below 0."""
    with pytest.raises(ValueError, match="scheduler=dpm2_a came to values that are not finite in"):
        sample(tiny, ["a fox"], [3], settings=Sampling(4, 3, sampler="dpm2_a"))


def test_every_name_is_documented() -> None:
    page = Path(__file__).parents[2].joinpath("docs/sampling.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in SOLVERS)
    assert not set(SOLVERS) & set(UNFIT)


def test_ddpm_is_ancestral_sampling(mild: Any) -> None:
    """x_{t-1} from the posterior q(x_{t-1} | x_t, x0) of arXiv 2006.11239, equations 6 and 7, with
    the variance beta~_t; no noise in the last step. Fewer steps are those of its longer jumps."""
    made = with_solver(mild.scheduler(), "ddpm")
    made.set_timesteps(STEPS)
    assert made.config.prediction_type == "v_prediction"
    levels = made.alphas_cumprod.double()
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, other = (torch.Generator().manual_seed(7) for _ in range(2))
    earlier = [*made.timesteps.tolist()[1:], -1]
    for t, before in zip(made.timesteps.tolist(), earlier, strict=True):
        v = torch.sin(x + t)  # any function of both stands for a network
        abar, abar_before = levels[t], levels[before] if before >= 0 else torch.tensor(1.0)
        x0 = abar.sqrt() * x - (1 - abar).sqrt() * v
        beta = 1 - abar / abar_before
        mean = abar_before.sqrt() * beta / (1 - abar) * x0
        mean = mean + (1 - beta).sqrt() * (1 - abar_before) / (1 - abar) * x
        found = made.step(v, t, x, generator=one).prev_sample
        if before >= 0:
            noise = torch.randn(x.shape, generator=other, dtype=x.dtype)
            mean = mean + ((1 - abar_before) / (1 - abar) * beta).sqrt() * noise
        torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-5)
        x = mean
