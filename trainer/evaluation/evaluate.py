"""Scores of a finished run beside those of its base model.

Pictures: does the model show the concept, does it show it together with other things, and does it
still know the rest? Clips: do they show the object of the caption, and does it move the way the
caption says?
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from rich.console import Console

from trainer.attention.input_channels import inputs_read
from trainer.backbones.backbone import Backbone
from trainer.backbones.device import CPU, Placement, cast_stored
from trainer.backbones.spec import BackboneSpec
from trainer.common.long_work import LongWork, long_work
from trainer.common.score_names import LOSS
from trainer.config.header import file_of, read_header
from trainer.config.load import resolve_recipe
from trainer.config.schema import Recipe
from trainer.data.loader import Fixed
from trainer.data.source import Dataset, shape_of_clips
from trainer.evaluation.clip_scores import ClipScores
from trainer.evaluation.completed_clips import complete_all, likeness
from trainer.evaluation.examiner import Examiner, Scores
from trainer.evaluation.generated import SEED
from trainer.evaluation.open_judges import PictureJudge, open_judges, reader_of
from trainer.evaluation.score_table import (
    Table,
    show_evaluation,
    show_notes,
    with_counts,
    with_drift,
)
from trainer.runs.adapter import load_adapted, load_base
from trainer.runs.run_folder import run_of_adapter, write_text
from trainer.training.build import inputs_of, needs, task_of
from trainer.training.module import QUANTILES


@dataclass(frozen=True)
class Judging:
    """How models are judged. judges: folders, none for the backbone's own; images: pictures, and
    clips, for each kind of prompt; batch: pictures generated at once, at most; placement: where
    models and judges run."""

    judges: tuple[str | Path, ...] = ()
    images: int = 32
    batch: int = 32
    placement: Placement = CPU


def evaluate(run: Path, how: Judging) -> Table:
    """Evaluates a run, prints the table of scores and writes it as `evaluation.json` beside the
    adapter; of an adapter with another name as `<name>_evaluation.json`.

    A run on clips also generates clips, for the captions of held-out ones, or of the training ones
    if none are held out; the scores of those real clips are the column `real`.

    run: a run folder or an adapter file.

    Returns the columns `base`, `adapted` and, for clips, `real`.

    Raises:
        ValueError: there is no adapter, or no judge for this backbone.
    """
    path = file_of(run)
    own = Evaluation(path, how)
    with own.progress(models=2) as work:
        own.report_to(work)
        table = {"base": own.score(own.base), "adapted": own.score(own.adapted(path))}
    table = own.completed(table)
    console = Console()
    show_evaluation(table, f"{run}, {own.described}", console)
    show_notes(own.notes, console)
    write_scores(evaluation_file(path), with_counts(table))
    own.finish()
    return table


def evaluation_file(path: Path) -> Path:
    """Where the scores of an adapter are kept."""
    name = "" if path.stem == "adapter" else f"{path.stem}_"
    return path.with_name(f"{name}evaluation.json")


def write_scores(path: Path, scores: object) -> None:
    """Writes scores as JSON, completely or not at all."""
    write_text(path, json.dumps(scores, indent=1))


class Evaluation:
    """One run's recipe and data, its base and its judges: all that a model's scores depend on.

    path: an adapter; beside: the evaluation of another run on the same backbone, whose base and
    judges are taken. notes: what is not scored, and why.

    Raises:
        ValueError: there is no adapter, or no judge for this backbone.
    """

    def __init__(self, path: Path, how: Judging, beside: Evaluation | None = None) -> None:
        tree, _ = read_header(path)
        folder = run_of_adapter(path)
        self.path, self.how = path, how
        self.recipe = resolve_recipe(tree.get("recipe", folder.parent.name), tree, {})
        spec, name = self.recipe.backbone, self.recipe.backbone_name
        self.base: Backbone = beside.base if beside else _base(spec, name, how.placement)
        self.judges: list[PictureJudge] = (
            beside.judges if beside else open_judges(how.judges, self.base.folder, how.placement)
        )
        self.train, self.held_out = self.recipe.data.open(needs(self.recipe, self.base))
        self.examiner = Examiner(
            self.recipe,
            self.judges,
            self.train,
            num_images=how.images,
            batch_size=how.batch,
            base=self.base,
            resumes=True,
            held_out=self.held_out,
        )
        self.frames, self.fps = shape_of_clips(self.train)
        self.clips = self._clips() if self.frames > 1 else None
        self.notes = list(self.examiner.notes)

    @property
    def described(self) -> str:
        """What the scores depend on, for a title."""
        names = " and ".join(judge.folder.name for judge in self.judges)
        what = "pictures" if self.clips is None else "pictures or clips"
        return f"judged by {names}, {self.how.images} {what} a line, shares with 95 % intervals"

    def progress(self, models: int) -> AbstractContextManager[LongWork]:
        """A display of all pictures that so many models generate."""
        frames = 0 if self.clips is None else len(self.clips.captions) * self.frames
        return long_work("pictures to judge", models * (self.examiner.asked.pictures + frames))

    def report_to(self, work: LongWork) -> None:
        self.examiner.maker.work = work

    def adapted(self, path: Path) -> Backbone:
        return load_adapted(path, placement=self.how.placement)[0]

    def score(self, model: Backbone) -> Scores:
        """Every score of a model, in the order of the table's lines."""
        scores = self.examiner.examine(model)
        if self.clips is not None:
            scores |= self._of_clips(model, self.clips)
        scores[LOSS] = validation_loss(self.recipe, model, self.held_out)
        # of a run that has diverged some are no numbers: they are not known
        known = {name: value for name, value in scores.items() if value is not None}
        return scores | {name: None for name, value in known.items() if not isfinite(value)}

    def _of_clips(self, model: Backbone, clips: ClipScores) -> Scores:
        """Of clips by their captions; of a model that completes given clips, of real ones that it
        completes."""
        maker, where = self.examiner.maker, model.given_frames
        if where is None:
            made = self.examiner.clips(
                model,
                clips.captions,
                frames=self.frames,
                fps=self.fps,
                inputs=clips.inputs(inputs_read(model)),
            )
            return clips.scores(made)
        made = complete_all(
            model,
            clips.real,
            clips.captions[: len(clips.real)],
            settings=maker.settings(self.frames, self.fps),
            seed=SEED,
            advance=maker.work or (lambda count: None),
        )
        return clips.scores(made) | likeness(where, made, clips.real)

    def completed(self, table: Table) -> Table:
        """With what is known when all models are scored: prior drift, and the real clips."""
        table = with_drift(table)
        if self.clips is not None:
            real = self.clips.scores(self.clips.real)
            table["real"] = dict.fromkeys(table["base"]) | real
        return table

    def finish(self) -> None:
        """Removes the pictures, as `PictureMaker.finish`."""
        self.examiner.finish()

    def _clips(self) -> ClipScores:
        reader = reader_of(self.judges)
        if reader is None:
            raise ValueError(
                "judge: clips are compared with their captions, and a DINO reads no texts; name a "
                "CLIP folder, too"
            )
        return ClipScores.of(reader, self.held_out or self.train, self.how.images)


def _base(spec: BackboneSpec, name: str, placement: Placement) -> Backbone:
    """The plain base with its weights as they are stored, by which the class images that a run has
    made with it are found again."""
    return cast_stored(load_base(spec, name, placement, hold=False, read_held=True))


@torch.no_grad()
def validation_loss(recipe: Recipe, model: Backbone, held_out: Dataset | None) -> float | None:
    """The mean loss on held-out samples, with the noise and timesteps that training validates with,
    so that it equals `val/loss` of the run's tracker; None without held-out samples."""
    if held_out is None:
        return None
    task = task_of(recipe, model)
    fixed = Fixed(held_out, batch_size=16, moments=None, reads=inputs_of(model))
    losses = [task.score(fixed[i].to(model.device), QUANTILES) for i in range(len(fixed))]
    return float(torch.cat(losses, dim=1).mean())
