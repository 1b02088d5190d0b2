"""AnimateDiff's domain adapter (arXiv 2307.04725, section 4.1): how much of the clips' watermark
samples show with the adapter, and with it left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from _clips import Model, pixels, shots
from _common import Bars
from _runs import Run, Runs
from torch import Tensor

from trainer.data.world.clips import Clip
from trainer.data.world.watermark import mark_in, marked
from trainer.evaluation.clip_scores import ClipScores
from trainer.runs.adapter import load_adapted

CLIPS, FRAMES = 8, 8  # each direction twice
LOOK = Run("domain_adapter", ("recipe=domain_adapter",), judged=False)
# motion modules that know clean clips go on from there on clips with the watermark
MOVING = (
    "recipe=animatediff", "data.defect=watermark", "data.count=240", "run.batch_size=4",
    "methods.animatediff.weights=tiny_motion", "run.steps=60", "optim.warmup=0", "optim.lr=5e-4",
    "optim.ema=null",
)  # fmt: skip
WITHOUT = Run("without_domain_adapter", MOVING, judged=False)


def over(runs: Runs) -> Run:
    """Motion modules over the domain adapter."""
    begin = f"run.start_from={runs.place(LOOK) / 'adapter.safetensors'}"
    adapter = ("methods.domain_adapter.sites=self", "optim.lrs.domain_adapter=0")
    return Run("over_domain_adapter", (*MOVING, *adapter, begin), judged=False)


def shown(clips: Tensor) -> float:
    """The mean share of the watermark in clips (..., 3, H, W) in [-1, 1]."""
    frames = (clips.clamp(-1, 1) / 2 + 0.5).movedim(-3, -1)
    return float(mark_in(frames.cpu().numpy()).mean())


def domain(bars: Bars, runs: Runs) -> None:
    """Beside what clips show with the adapter and without it: real clips of both kinds, these
    through the VAE."""
    run = over(runs)
    for each in (LOOK, run):
        runs.make([each])
    model, clips = Model(runs, run), chosen(bars)
    clean = pixels(clips)
    spoiled = pixels([replace(clip, frames=marked(clip.frames)) for clip in clips])
    found: dict[str, dict[str, Any]] = {
        "real": {"watermark": shown(spoiled), "through_vae": shown(model.through_vae(spoiled))},
        "real_without_watermark": {"watermark": shown(clean)},
        "with_adapter": scored(model, model.adapted, clips),
    }
    off, _ = load_adapted(runs.place(run) / "adapter.safetensors", scale={"domain_adapter": 0.0})
    found["adapter_left_out"] = scored(model, off, clips)
    bars.note("domain", {"clips": len(clips), **found})
    bars.note("domain_minutes", {each.name: runs.minutes(each) for each in (LOOK, run)})
    left = abs(found["adapter_left_out"]["watermark"]) / found["with_adapter"]["watermark"]
    if bars.quick:
        bars.note("domain_watermark_off_over_on", left)
    else:
        bars.at_most("domain_watermark_off_over_on", left, 0.3)


def domain_control(bars: Bars, runs: Runs) -> None:
    """Motion modules that trained as long on the same clips without an adapter: how much of the
    watermark they learn themselves."""
    runs.make([WITHOUT])
    model = Model(runs, WITHOUT)
    bars.note("domain_modules_without_adapter", scored(model, model.adapted, chosen(bars)))


def chosen(bars: Bars) -> list[Clip]:
    return shots(4 if bars.quick else CLIPS, FRAMES)


def scored(model: Model, network: Any, clips: Sequence[Clip]) -> dict[str, Any]:
    """The watermark in a network's clips for the captions of these, and the scores of clips."""
    captions = [clip.caption for clip in clips]
    painted = model.paint(network, captions, FRAMES).unflatten(0, (-1, FRAMES))
    scores = ClipScores(model.judge, captions, pixels(clips)).scores(painted)
    return {"watermark": shown(painted), **scores}
