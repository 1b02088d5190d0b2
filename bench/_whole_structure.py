"""What `whole.py` asks of models of clips: which way things go by the caption alone, and how much
of a clip's structure Gen-1 keeps at each level."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from _clips import Model, pixels, shots
from _common import Bars
from _runs import Run, Runs
from torch import Tensor

from trainer.data.depth import as_depth, depth_like
from trainer.data.world.clips import Clip
from trainer.data.world.scenes import article, nearness
from trainer.data.world.sprites import KNOWN
from trainer.evaluation.clip_scores import ClipScores, tracks

GEN1 = Run("gen1", ("recipe=gen1",), judged=False)
MAGICVIDEO = Run("magicvideo", ("recipe=magicvideo",), judged=False)
CAPTIONS, EDITS, QUICK = 32, 8, 4  # clips


def magicvideo(bars: Bars, runs: Runs) -> None:
    """Which way things go in clips of captions that were not trained on."""
    runs.make([MAGICVIDEO])
    by_caption(bars, runs, MAGICVIDEO)


def gen1_direction(bars: Bars, runs: Runs) -> None:
    """Which way things go by the caption where next to nothing is left of the structure."""
    runs.make([GEN1])
    by_caption(bars, runs, GEN1, level=coarsest(runs))


def coarsest(runs: Runs) -> int:
    return int(runs.recipe(GEN1).methods["gen1"].structure)  # type: ignore[attr-defined]


def gen1(bars: Bars, runs: Runs) -> None:
    """At each level, how much the structure of a clip is kept with another object in it."""
    runs.make([GEN1])
    model, most = Model(runs, GEN1), coarsest(runs)
    clips = shots(QUICK if bars.quick else EDITS, model.recipe.data.frames)  # type: ignore[attr-defined]
    kept = {level: structure_kept(model, clips, level) for level in (0, most // 2, most)}
    facts = {"of": len(clips), "steps": model.recipe.run.steps, "minutes": runs.minutes(GEN1)}
    bars.note("gen1_structure_kept", {**facts, **{f"level {n}": own for n, own in kept.items()}})
    for name in ("track", "outline"):
        falls = [a[name] - b[name] for a, b in pairwise(kept.values())]
        if bars.quick:
            bars.note(f"gen1_{name}_falls_with_the_level", min(falls))
        else:
            bars.at_least(f"gen1_{name}_falls_with_the_level", min(falls), 0)


def by_caption(bars: Bars, runs: Runs, run: Run, level: int | None = None) -> None:
    """level: of the structure, for a model that reads it."""
    model = Model(runs, run)
    frames = model.recipe.data.frames  # type: ignore[attr-defined]
    clips = shots(QUICK if bars.quick else CAPTIONS, frames)
    captions = [clip.caption for clip in clips]
    inputs = {} if level is None else structure_of(clips, level)
    painted = model.paint(model.adapted, captions, frames, inputs=inputs)
    scorer = ClipScores(model.judge, captions, pixels(clips))
    found = scorer.scores(painted.unflatten(0, (-1, frames)))
    real = scorer.scores(scorer.real)
    facts = {"steps": model.recipe.run.steps, "minutes": runs.minutes(run), "of": len(captions)}
    bars.note(f"{run.name}_clips", {**facts, "sampled": found, "real": real})
    direction = found["direction right"]
    if bars.quick or direction is None:
        bars.note(f"{run.name}_direction", direction)
    else:
        bars.at_least(f"{run.name}_direction", direction, 0.5)


def structure_of(clips: list[Clip], level: int) -> dict[str, Tensor]:
    """The depth of clips that the world knows, and the level for all of them."""
    near = [np.stack([nearness(shown) for shown in clip.objects]) for clip in clips]
    depth = torch.stack([as_depth(own, own.shape[-1]) for own in near])
    return {"depth": depth, "structure_level": torch.full((len(clips),), level)}


def structure_kept(model: Model, clips: list[Clip], level: int) -> dict[str, float]:
    """Of clips in which another object, by a prompt that says nothing of motion, has the structure
    of a clip: correlation of the two objects' tracks, and overlap of their outlines, both means."""
    frames = len(clips[0].frames)
    words = [clip.plot.tracks[0].word for clip in clips]
    others = [KNOWN[(KNOWN.index(word) + 7) % len(KNOWN)] for word in words]
    prompts = [f"{article(word)} on a white background" for word in others]
    inputs = structure_of(clips, level)
    painted = model.paint(model.adapted, prompts, frames, inputs=inputs)
    own = tracks(model.judge, painted.unflatten(0, (-1, frames)), others)
    source = tracks(model.judge, pixels(clips), words)
    return {
        "track": float(own.like(source).mean()),
        "outline": overlap(depth_like_each(painted, frames), inputs["depth"].flatten(0, 1)),
    }


def depth_like_each(painted: Tensor, frames: int) -> Tensor:
    return torch.cat([depth_like(clip) for clip in painted.split(frames)])


def overlap(one: Tensor, other: Tensor) -> float:
    """Intersection over union of what is near in two stacks of frames (n, 1, H, W), the mean over
    the frames that show something."""
    near, wanted = one > 0, other > 0
    both, either = (near & wanted).sum((1, 2, 3)), (near | wanted).sum((1, 2, 3))
    return float((both / either.clamp(min=1))[wanted.any(3).any(2).any(1)].mean())
