"""Parts of bench/peers.py that compare this project with itself, and with the stock pipeline, in
one process. Each takes turns too; a time is processor time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from _common import Bars, command
from _steps import Step

HERE = Path(__file__).parent
CLASS = ("data.prior_images=4", "data.prior_prompts=[a fox, a cat]", "data.prior_steps=2",
         "data.class_word=null", "run.batch_size=8")  # fmt: skip
LORA = ("recipe=lora", "methods.new_token=null", "data.token=thing", *CLASS)
PROMPT = "a fox on a blue background"


def seconds_of(what: Callable[[], Any]) -> float:
    began = time.process_time()
    what()
    return time.process_time() - began


def taken(programs: Mapping[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    """Processor seconds of each, in turns, after one turn that is not counted."""
    for each in programs.values():
        each()
    rounds = [{name: seconds_of(each) for name, each in programs.items()} for _ in range(pairs)]
    return {name: [own[name] for own in rounds] for name in programs}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {"median": median(ratios), "low": low, "high": high}


def methods(bars: Bars, pairs: int, *, quick: bool) -> None:
    """Steps of one batch of 8, all on the same layers: attention. QLoRA beside a LoRA that is as
    its own and on plain layers, both by AdamW."""
    nf4 = ("recipe=qlora", *CLASS, "optim.name=adamw")
    words = {
        "lora": LORA,
        "dora": (*LORA, "methods.lora=null", "methods.dora={rank: 8, sites: all}"),
        "full": (*LORA, "methods.lora=null", "methods.full={}"),
        "qlora": nf4,
        "qlora_plain": (*nf4, "methods.nf4=null"),
    }
    found = taken({name: Step(own) for name, own in words.items()}, pairs * (1 if quick else 4))
    for name, own in found.items():
        bars.note(f"{name}_step_ms", 1000 * median(own))
    faster = ratio(found["full"], found["lora"])
    over = {"dora": ratio(found["dora"], found["lora"])}
    over["qlora"] = ratio(found["qlora"], found["qlora_plain"])
    bars.note("method_ratios", {"full_over_lora": faster, **over})
    bars.at_least("lora_faster_than_full", faster["median"], 1.45)
    bars.at_most("dora_over_lora", over["dora"]["median"], 1.05)
    bars.at_most("qlora_over_lora", over["qlora"]["median"], 1.0)


def sampling(bars: Bars, pairs: int, *, quick: bool) -> None:
    """The same prompts, noise, steps and guidance; the stock pipeline on a network of its own."""
    from diffusers import UNet2DConditionModel

    from trainer.backbones import load_backbone
    from trainer.config.load import load_recipe
    from trainer.diffusion.sampler import generators_of, noise_of, sample
    from trainer.diffusion.sampling_settings import Sampling

    recipe = load_recipe(LORA)
    model = load_backbone(recipe.backbone, recipe.backbone_name).eval().requires_grad_(False)
    stock = model.pipeline()
    unet = UNet2DConditionModel.from_pretrained(HERE.parent / "data" / "tiny" / "unet").eval()
    stock = type(stock)(**{**stock.components, "unet": unet}, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    settings, pictures = Sampling(5 if quick else 25, 5.0), {}
    for count in (1, 4):
        prompts, seeds = [PROMPT] * count, list(range(count))
        noise = noise_of(model, generators_of(seeds), settings)

        def theirs(prompts: list[str] = prompts, noise: torch.Tensor = noise) -> None:
            made = stock(
                prompts, num_inference_steps=settings.steps, guidance_scale=settings.guidance,
                latents=noise, output_type="pt",
            )  # fmt: skip
            pictures["theirs"] = made.images * 2 - 1

        def ours(prompts: list[str] = prompts, seeds: list[int] = seeds) -> None:
            pictures["ours"] = sample(model, prompts, seeds, settings=settings)

        found = taken({"ours": ours, "theirs": theirs}, pairs)
        faster = ratio(found["theirs"], found["ours"])
        bars.note(f"sampling_{count}", faster)
        bars.at_least(f"sampling_{count}_faster", faster["median"], 1.3)
        apart = float((pictures["ours"] - pictures["theirs"]).abs().max()) * 255 / 2
        bars.at_most(f"sampling_{count}_apart_of_255", apart, 2)


def compiling(bars: Bars, pairs: int, *, quick: bool) -> None:
    """Whole runs, in wall time; each with a cache of its own, also of compiled code."""
    steps, took = (3 if quick else 500), {}
    with tempfile.TemporaryDirectory() as scratch:
        for choice in ("false", "true"):
            folder = Path(scratch) / choice
            folder.mkdir()
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
            words = (*LORA, f"run.steps={steps}", f"run.compile={choice}", "preview.every=0",
                     "run.validate_every=0", "tracker=none")  # fmt: skip
            began = time.monotonic()
            command("fit", *words, folder=folder, cache=folder / "cache", threads=1)
            took[choice] = time.monotonic() - began
    bars.note("compile_seconds", {"steps": steps, "off": took["false"], "on": took["true"]})
    bars.at_least("compile_faster_wall", took["false"] / took["true"], 1.2)


def checkpointing(bars: Bars, pairs: int, *, quick: bool) -> None:
    """A step of LoRA in the denoiser and the text encoder: bytes that tensors take at the most,
    beside weights, and time."""
    base = (*LORA, "methods.lora.text_encoder=[q,k,v,out]")
    policies = {
        "off": (),
        "blocks": ("run.gradient_checkpointing=true",),
        "every_second": ("run.gradient_checkpointing=true", "run.recompute_every=2"),
        "feed_forward": ("run.gradient_checkpointing=feed_forward",),
    }
    steps = {name: _recomputing(Step((*base, *own)), own) for name, own in policies.items()}
    bytes_of = {name: _peak(step) for name, step in steps.items()}
    found = taken(steps, pairs)
    for name in steps:
        time_paid = ratio(found[name], found["off"])
        bars.note(f"checkpointing_{name}", {"bytes": bytes_of[name], "time": time_paid})
        if name == "blocks":
            bars.at_most("checkpointing_memory", bytes_of[name] / bytes_of["off"], 0.6)
            bars.at_most("checkpointing_time", time_paid["median"], 1.3)


def _recomputing(step: Step, words: Sequence[str]) -> Step:
    from trainer.config.load import load_recipe
    from trainer.training.adapt_backbone import recompute_of

    if words:
        how = recompute_of(load_recipe((*LORA, *words)).run)
        step.backbone.enable_gradient_checkpointing(how)
    step.backbone.denoiser.train()
    return step


def _peak(step: Step) -> int:
    """Bytes of tensors that a step makes, at the most."""
    from trainer.training.step_memory import LivingTensors

    step()
    known = [*step.backbone.parameters(), *step.backbone.buffers()]
    with LivingTensors([value.untyped_storage() for value in known]) as living:
        step()
    return int(living.peak)


def loader(bars: Bars, pairs: int, *, quick: bool) -> None:
    """How long a loop with steps of 100 ms waits for its batches, of that time; nothing cached."""
    from trainer.backbones import load_backbone
    from trainer.config.load import load_recipe
    from trainer.data.loader import Planned
    from trainer.data.loader import loader as batches_of
    from trainer.training.build import inputs_of, needs, step_plan

    for workers in (0, 1):
        recipe = load_recipe(LORA)
        model = load_backbone(recipe.backbone, recipe.backbone_name)
        data, _ = recipe.data.open(needs(recipe, model))
        items = Planned(data, step_plan(recipe, data), None, 0, 1, reads=inputs_of(model))
        steps, waited = (10 if quick else 100), 0.0
        batches = iter(batches_of(items, steps, start=0, workers=workers))
        next(batches)
        for _ in range(steps - 1):
            time.sleep(0.1)
            began = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - began
        share = waited / ((steps - 1) * 0.1 + waited)
        bars.at_most(f"data_wait_share_workers_{workers}", share, 0.01)


def start(bars: Bars, pairs: int, *, quick: bool) -> None:
    """Wall seconds of commands, the median; the first step of the default recipe with its class
    images made before."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fit = ("fit", *LORA, "run.steps=1", "preview.every=0", "run.validate_every=0")
        command(*fit, folder=folder, cache=folder / "cache", threads=1)
        lines = {"--help": (0.5, ("--help",)), "check": (1.5, ("check", "recipe=lora")),
                 "first_step": (12.0, fit)}  # fmt: skip
        for name, (bar, words) in lines.items():
            took = []
            for number in range(1 if quick else 5):
                own = [f"run.id=run-{number}"] if name == "first_step" else []
                environment = {**os.environ, "TRAINER_CACHE": str(folder / "cache")}
                line = [sys.executable, "-m", "trainer", *words, *own]
                began = time.monotonic()
                subprocess.run(line, cwd=folder, env=environment, check=True, capture_output=True)
                took.append(time.monotonic() - began)
            bars.at_most(f"start_{name}_seconds", median(took), bar)


def layout(bars: Bars, pairs: int, *, quick: bool) -> None:
    """What channels last are worth here, which `run.channels_last=auto` leaves off on a CPU."""
    plain, last = Step(LORA), Step(LORA)
    last.backbone.denoiser.to(memory_format=torch.channels_last)
    found = taken({"plain": plain, "last": last}, pairs * (1 if quick else 4))
    bars.note("channels_last_faster", ratio(found["plain"], found["last"]))


PARTS: Mapping[str, Callable[..., None]] = {
    "methods": methods, "sampling": sampling, "compile": compiling,
    "checkpointing": checkpointing, "loader": loader, "start": start, "layout": layout,
}  # fmt: skip
