"""Video-P2P's part of `whole.py`: one clip of the world, edited by its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _clips import Source, psnr
from _common import RESULTS, Bars
from _runs import Run, Runs
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.cli.sample_source import INVERTING
from trainer.common.paths import slug
from trainer.data.world.clips import draw_clip
from trainer.data.world.scenes import article
from trainer.data.world.sprites import KNOWN
from trainer.diffusion.edit_source import EditSource
from trainer.diffusion.inversion import invert
from trainer.diffusion.null_text import null_text
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.evaluation.clip_scores import named_right, tracks
from trainer.evaluation.shares import share
from trainer.media.grids import grid

ONE = Run("videop2p", ("recipe=videop2p",), judged=False)
PLAIN = Run("tune_a_video", ("recipe=tune_a_video",), judged=False)
SECOND = 53  # the seed of a clip of two: an alien moves up, an octopus stands still
TWO = Run("videop2p_two", ("recipe=videop2p", f"data.seed={SECOND}"), judged=False)
EDITS, AMONG_TWO = 16, 8


@dataclass(frozen=True, eq=False)
class Edits:
    """Edits of the clip that a run has learned, all from one inversion, which is kept in `folder`
    beside the run."""

    source: Source
    steps: int
    folder: Path

    @property
    def settings(self) -> Sampling:
        look = self.source.model.recipe.evaluate
        return Sampling(self.steps, look.guidance, frames=self.source.frames)

    @cached_property
    def begun(self) -> tuple[Tensor, EditSource]:
        """The noise, and the source with its null-text embeddings."""
        path = self.folder / f"null-text-{self.steps}.safetensors"
        if not path.is_file():
            save_file(self._found(), path)
        found = load_file(path)
        return found["start"], EditSource(
            self.source.caption, inverted=True, uncond=found["uncond"]
        )

    def _found(self) -> dict[str, Tensor]:
        source, model = self.source, self.source.model
        latents, caption = model.latents(source.pictures), source.caption
        trajectory: dict[int, Tensor] = {}
        start = invert(
            model.adapted,
            latents,
            [caption],
            steps=self.steps,
            frames=source.frames,
            iterations=INVERTING,
            known=trajectory,
        )
        uncond = null_text(
            model.adapted, latents, trajectory, prompt=caption, settings=self.settings
        )
        return {"start": start, "uncond": uncond}

    def clips(self, prompts: Sequence[str]) -> Tensor:
        """(n, f, 3, H, W), one after another; those that are kept are not made again."""
        made = []
        for prompt in prompts:
            path = self.folder / f"edit-{self.steps}-{slug(prompt)}.safetensors"
            if not path.is_file():
                save_file({"clip": self._made(prompt)}, path)
            made.append(load_file(path)["clip"])
        return torch.stack(made)

    def _made(self, prompt: str) -> Tensor:
        start, told = self.begun
        return sample(
            self.source.model.adapted,
            [prompt],
            [0],
            settings=self.settings,
            start=start,
            edited=told,
        )

    def swapped(self, word: str, others: Sequence[str]) -> Tensor:
        """With each of some sprites in the place of `word`."""
        caption = self.source.caption
        return self.clips([caption.replace(article(word), article(other)) for other in others])


def others_than(words: Sequence[str], count: int) -> list[str]:
    """Sprites from all over the table."""
    free = [word for word in KNOWN if word not in words]
    return free[:: len(free) // count][:count]


def outside(edits: Tensor, source: Tensor, kept: Tensor) -> float:
    """PSNR in dB where `kept` (f, H, W) is true, of clips (n, f, 3, H, W)."""
    error = (edits - source).square() * kept[:, None]
    mean = float(error.sum() / (3 * len(edits) * kept.sum()))
    return float(10 * torch.tensor(4 / mean).log10())


def masks_of(seed: int, word: str, frames: int) -> Tensor:
    """(f, H, W): where a sprite of the only clip of a seed is."""
    clip = draw_clip(seed, 0, KNOWN, frames=frames)
    return torch.stack(
        [torch.from_numpy(o.mask) for frame in clip.objects for o in frame if o.word == word]
    )


def scores(source: Source, edits: Tensor, word: str, others: Sequence[str]) -> dict[str, Any]:
    """Edits (n, f, 3, H, W) of `word` into others: the share named right in most frames, the
    correlation of the tracks, and what stays where the source's object is not."""
    judge = source.model.judge
    named = named_right(judge, edits, others).float().mean(1)
    own = tracks(judge, source.pictures.expand_as(edits), [word] * len(others))
    like = tracks(judge, edits, others).like(own).tolist()
    seed = source.model.recipe.data.seed  # type: ignore[attr-defined]
    kept = ~masks_of(seed, word, source.frames)
    return {
        "named right": share((named > 0.5).tolist()),
        "frames right": named.tolist(),
        "correlation": median(like),
        "correlations": like,
        "outside the source's object, dB": outside(edits, source.pictures, kept),
    }


def one_object(bars: Bars, runs: Runs, steps: int) -> None:
    """A clip of one object: the clip again, and other objects in its place."""
    source = Source.of(runs, ONE)
    caption = source.caption
    edits = Edits(source, steps, runs.place(ONE))
    near = psnr(source.model.through_vae(source.pictures[None])[0], source.pictures)
    again = edits.clips([caption])[0]
    bars.note("videop2p_vae_db", near)
    bars.at_least("videop2p_reconstruction_db", psnr(again, source.pictures), near - 1)
    others = words_of(bars, source)
    made = edits.swapped(sprite_of(source)[0], others)
    found = scores(source, made, sprite_of(source)[0], others)
    bars.note("videop2p_edits", {"caption": caption, "words": others, **found})
    bars.at_least("videop2p_named_right", found["named right"], 0.6)
    bars.at_least("videop2p_track_correlation", found["correlation"], 0.9)
    rows = [(caption, source.pictures), ("again", again)]
    keep(bars, runs, "one", [*rows, *zip(others, made, strict=True)])


def one_object_beside(bars: Bars, runs: Runs) -> None:
    """The same words by Tune-A-Video, from the inverted noise and by the prompt alone."""
    source = Source.of(runs, PLAIN)
    start, others = source.inverted(source.model.adapted), words_of(bars, source)
    edits = [source.edited(source.model.adapted, start, [other]) for other in others]
    found = scores(source, torch.cat(edits), sprite_of(source)[0], others)
    bars.note("videop2p_beside_tune_a_video", {"words": others, **found})


def words_of(bars: Bars, source: Source) -> list[str]:
    return others_than(sprite_of(source), 2 if bars.quick else EDITS)


def two_objects(bars: Bars, runs: Runs, steps: int) -> None:
    """A clip of two: one is swapped, and the other is to stay."""
    source = Source.of(runs, TWO)
    word, other = sprite_of(source)
    edits = Edits(source, steps, runs.place(TWO))
    words = others_than([word, other], 2 if bars.quick else AMONG_TWO)
    made = edits.swapped(word, words)
    mask = masks_of(SECOND, other, source.frames)
    near = source.model.through_vae(source.pictures[None])
    judge = source.model.judge
    seen = tracks(judge, made, [other] * len(words))
    was = tracks(judge, source.pictures.expand_as(made), [other] * len(words))
    stays = (seen.centers - was.centers).norm(dim=-1).lt(0.1) & (seen.mass >= 1)
    gone = tracks(judge, made, words).mass.gt(tracks(judge, made, [word] * len(words)).mass)
    bars.note(
        "videop2p_one_of_two",
        {
            "caption": source.caption,
            "words": words,
            "the other there in most frames": share((stays.float().mean(1) > 0.5).tolist()),
            "the new one found more than the old one in most frames": share(
                (gone.float().mean(1) > 0.5).tolist()
            ),
            "the other, dB": outside(made, source.pictures, mask),
            "the other through the VAE, dB": outside(near, source.pictures, mask),
        },
    )
    rows = [(source.caption, source.pictures), *zip(words, made, strict=True)]
    keep(bars, runs, "two", rows)


def sprite_of(source: Source) -> list[str]:
    """The sprites that the caption names, in its order."""
    return [word for word in source.caption.replace(",", " ").split() if word in KNOWN]


def keep(bars: Bars, runs: Runs, name: str, rows: list[tuple[str, Tensor]]) -> None:
    """A contact sheet, a row a clip."""
    folder = runs.folder if bars.quick else RESULTS
    sheet: Any = grid(rows, side=96)
    sheet.quantize(256).save(folder / f"whole_videop2p_{name}.png", optimize=True)


def of_clips(bars: Bars, runs: Runs) -> Runs:
    """The same for runs on clips, which have no class images."""
    words = ("run.steps=2", "evaluate.steps=2") if bars.quick else runs.words
    return Runs(runs.folder, words, runs.images, first=None)


def videop2p(bars: Bars, runs: Runs) -> None:
    """Video-P2P on one clip of the world."""
    runs = of_clips(bars, runs)
    runs.make([ONE])
    bars.note_when()
    one_object(bars, runs, runs.recipe(ONE).evaluate.steps)


def videop2p_beside(bars: Bars, runs: Runs) -> None:
    """Tune-A-Video alone on the same clip."""
    runs = of_clips(bars, runs)
    runs.make([PLAIN])
    one_object_beside(bars, runs)


def videop2p_two(bars: Bars, runs: Runs) -> None:
    """Video-P2P on a clip of two objects, of which one is kept."""
    runs = of_clips(bars, runs)
    runs.make([TWO])
    two_objects(bars, runs, runs.recipe(TWO).evaluate.steps)
