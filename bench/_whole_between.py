"""Frames between those of a given clip, for `whole.py`: interpolation, and temporal
super-resolution, against blending the two neighbours; and Imagen Video's base model.

The first two are asked for clips of the world that no training drew. Given frames are read by the
VAE, which bounds how near a frame can come; the neighbours are blended as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from _clips import Model, pixels, shots
from _common import Bars, shares_of
from _runs import Run, Runs

from trainer.attention.given_frames import GivenFrames
from trainer.diffusion.sampling_settings import Sampling
from trainer.evaluation.completed_clips import (
    BLENDED,
    MADE,
    complete_all,
    likeness,
    mean_psnr,
    new_frames,
)

FRAMES, CLIPS, BETTER = 16, 8, 2.0  # dB
INTERPOLATION = Run("frame_interpolation", ("recipe=frame_interpolation",), judged=False)
BASE = Run("imagen_video", ("recipe=imagen_video",))
TEMPORAL = Run("imagen_video_tsr", ("recipe=imagen_video_tsr",), judged=False)


def figures(model: Model, where: GivenFrames, count: int) -> dict[str, Any]:
    """In dB, the mean over clips: new frames as the model makes them, as their neighbours blended,
    and as the VAE gives the true ones."""
    drawn = shots(count, FRAMES)
    clips, captions = pixels(drawn), [clip.caption for clip in drawn]
    settings = Sampling(model.recipe.evaluate.steps, guidance=1.0, frames=FRAMES)
    model.adapted.given_frames = where
    made = complete_all(model.adapted, clips, captions, settings=settings)
    chosen = new_frames(where, FRAMES)
    vae = mean_psnr(model.through_vae(clips[:, chosen]), clips[:, chosen])
    given = list(where.places(FRAMES))
    return likeness(where, made, clips) | {"through the VAE": vae, "given": given, "clips": count}


def measured(bars: Bars, runs: Runs, run: Run, name: str) -> tuple[Model, GivenFrames, int]:
    """Trains, and takes the figures of the frames that are given where the model wants them."""
    runs.make([run])
    model, count = Model(runs, run), 2 if bars.quick else CLIPS
    where = model.adapted.given_frames
    assert where is not None, "its method says how a clip is given"
    found = figures(model, where, count)
    bars.note(name, found)
    gained = found[MADE] - found[BLENDED]
    if bars.quick:  # has learned nothing
        bars.note(f"{name}_over_blending_db", gained)
    else:
        bars.at_least(f"{name}_over_blending_db", gained, BETTER)
    return model, where, count


def interpolation(bars: Bars, runs: Runs) -> None:
    """Four frames made to 16, four new ones between two; and the 12 that follow four, beside the
    last one held."""
    model, where, count = measured(bars, runs, INTERPOLATION, "interpolation")
    ahead = replace(where, between=0, after=FRAMES - 4)
    bars.note("extrapolation", figures(model, ahead, max(1, count // 4)))


def temporal_sr(bars: Bars, runs: Runs) -> None:
    """Every fourth frame of 16 given."""
    measured(bars, runs, TEMPORAL, "temporal_sr")


def imagen_video(bars: Bars, runs: Runs) -> None:
    """How often the base model of the cascade moves the object as its caption says."""
    runs.make([BASE])
    scores = shares_of(runs.read(BASE, "evaluation.json"), "adapted")
    bars.note("imagen_video", scores)
    right = scores["direction right"]
    if bars.quick:
        bars.note("imagen_video_direction", right)
    else:
        bars.at_least("imagen_video_direction", right, 0.5)
