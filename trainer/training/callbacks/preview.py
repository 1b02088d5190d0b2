"""Previews: pictures or clips of fixed prompts and seeds, before training and during it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning
import torch
from PIL import Image
from torch import Tensor

from trainer.attention.input_channels import inputs_read
from trainer.backbones.backbone import Backbone
from trainer.backbones.device import pictures_at_once
from trainer.diffusion.given_clip import GivenClip, complete
from trainer.diffusion.guidance import COND
from trainer.diffusion.made_of import made_of
from trainer.diffusion.sampler import sample_many
from trainer.diffusion.sampling_settings import Sampling
from trainer.media.grids import cell_side, grid, overlay_maps, stacked
from trainer.media.made_by import png_bytes, with_facts
from trainer.media.write_video import PLAYED, write_frames
from trainer.ops.attention_maps import MapStore
from trainer.runs.run_folder import step_name
from trainer.training.callbacks.average import Average, averaged
from trainer.training.callbacks.hang import HangGuard
from trainer.training.callbacks.preview_files import PreviewFiles, Shown
from trainer.training.callbacks.side_work import SideWork
from trainer.training.console import problem_of
from trainer.training.distributed import value_of_first
from trainer.training.module import DiffusionModule
from trainer.training.prompt_word_maps import WordPlaces, map_sites, word_places, write_word_maps
from trainer.training.trackers.make_trackers import log_clip, log_pictures

GRID = "grid.png"
CELL = 256  # pixels of a picture's longer side in the grid, at most


class Preview(lightning.Callback):
    """Writes `previews/grid.png`, with a row for each preview, and each picture in its full size as
    a file of its own, see `preview_files.py`; logs each preview with every tracker. A resumed run
    keeps the rows it had.

    every: steps between two previews; maps: a token whose attention maps are shown, too; clips:
    (frames, 3, H, W) for each prompt, which a model that completes given clips is given; average:
    has the weights that are used; side: is told of a preview that failed, after which there are no
    more; parts: as of `PreviewFiles`; inputs: gives the inputs of these names, each (prompts, ...),
    for methods that read some. If `settings` has more than one frame, a preview has clips:
    `previews/step-000300.png` with a row for each prompt and a column for each frame, and
    `step-000300.gif` and `.mp4`, which show all clips side by side.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        *,
        every: int,
        seed: int,
        settings: Sampling,
        maps: str | None = None,
        clips: Sequence[Tensor] = (),
        average: Average | None = None,
        hang: HangGuard | None = None,
        side: SideWork | None = None,
        parts: Callable[[], Mapping[str, str]] | None = None,
        inputs: Callable[[Sequence[str]], dict[str, Tensor]] = lambda names: {},
    ) -> None:
        self.folder, self.prompts, self.every = folder, list(prompts), every
        self.maps, self.average, self.hang, self.side = maps, average, hang, side
        self.clips = list(clips)
        self.files, self.failed = PreviewFiles(folder, parts), False
        self.settings, self.inputs = settings, inputs
        self.frames, self.fps = settings.frames, settings.fps
        self.seeds = [seed + i for i in range(len(self.prompts))]
        self.rows: list[tuple[str, Tensor]] = []
        self.earlier: list[Image.Image] = []  # the sheet from before the run was resumed
        self.last = -1
        self.places: WordPlaces | None = None  # of the words whose maps were made last

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if trainer.global_step == 0:
            self._preview(trainer, pl_module, "base")
            return
        step = self.last = trainer.global_step
        if trainer.is_global_zero:
            with suppress(OSError), Image.open(self.folder / GRID) as sheet:
                self.earlier = [sheet.copy()]
        # a signal may have ended the run before the preview of its last step
        due = step % self.every == 0 and step < trainer.max_steps
        if due and not value_of_first((self.folder / step_name(step)).is_dir()):
            self._preview(trainer, pl_module, f"step {step}")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        step = trainer.global_step
        if step != self.last and step % self.every == 0 and step < trainer.max_steps:
            self._preview(trainer, pl_module, f"step {step}")

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if self.last != trainer.global_step:
            self._preview(trainer, pl_module, f"step {trainer.global_step}")

    def _preview(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, label: str
    ) -> None:
        """A preview, unless one has failed: then there are no more, see `SideWork`."""
        self.last = trainer.global_step
        if self.failed:
            return
        problem = None
        # the other ranks wait inside, too
        with self.hang.inside("preview") if self.hang else nullcontext():
            sharded = isinstance(pl_module, DiffusionModule) and pl_module.shard is not None
            if trainer.is_global_zero or sharded:  # of a sharded model each rank has a part
                try:
                    self._show(trainer, pl_module, label)
                except Exception as error:
                    if self.side is None:
                        raise
                    problem = problem_of(error)
            problem = value_of_first(problem)
        if problem is not None and self.side is not None:
            self.failed = True
            self.side.left_out(trainer, pl_module, what="preview", problem=problem)

    def _show(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, label: str
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        with averaged(self.average, pl_module):
            pictures, maps = self._sample(pl_module.backbone)
            if not trainer.is_global_zero:
                return
            self._write(pl_module.backbone, pictures, trainer=trainer)
            self._write_maps(pictures, maps, step=trainer.global_step)
        rows = [(label, pictures)]
        if maps is not None and label != "base":
            rows.append((f"{self.maps}", overlay_maps(pictures, maps[:, 0])))
        if self.frames > 1:
            self._show_clips(trainer, rows, self._facts(pl_module.backbone, trainer.global_step))
            return
        self.rows += rows
        own = grid(self.rows, self.prompts, cell_side(pictures, CELL))
        sheet = stacked([*self.earlier, own])
        facts = self._facts(pl_module.backbone, trainer.global_step)
        (self.folder / GRID).write_bytes(png_bytes(with_facts(sheet, facts)))
        log_pictures(trainer, "preview", pictures, prompts=self.prompts)

    def _write(self, backbone: Backbone, pictures: Tensor, *, trainer: lightning.Trainer) -> None:
        """Every picture or clip as a file of its own."""
        at_once, count = self._at_once(backbone), len(self.prompts)
        shown = [
            Shown(
                self.prompts[i],
                self.seeds[i],
                clip,
                batch=min(at_once, count - i // at_once * at_once),
                row=i % at_once,
            )
            for i, clip in enumerate(pictures.split(self.frames))
        ]
        step = trainer.global_step
        last = step == trainer.max_steps
        self.files.write(shown, step, backbone=backbone, settings=self.settings, last=last)

    def _write_maps(self, pictures: Tensor, maps: Tensor | None, *, step: int) -> None:
        """What each word of each prompt is attended to, of stills."""
        if maps is not None and self.places is not None and self.frames == 1:
            folder, words = self.folder / step_name(step), self.places.words
            write_word_maps(folder, self.prompts, words, pictures=pictures, maps=maps[:, 1:])

    def _facts(self, backbone: Backbone, step: int) -> dict[str, Any]:
        """What the sheet at a step was made of; a row for each earlier one is above it."""
        run = self.folder.parent
        return made_of(
            backbone,
            self.settings,
            prompt=" | ".join(self.prompts),
            seed=self.seeds[0],
            seeds=self.seeds,
            rows=[label for label, _ in self.rows],
            recipe=run.parent.name,
            run=run.name,
            step=step,
        )

    def _show_clips(
        self, trainer: lightning.Trainer, rows: list[tuple[str, Tensor]], facts: dict[str, Any]
    ) -> None:
        path = self.folder / step_name(trainer.global_step)
        side = cell_side(rows[0][1], CELL)
        own = [(name, pictures.split(self.frames)) for name, pictures in rows]
        sheet = [
            (prompt if i == 0 else name, clips[number])
            for number, prompt in enumerate(self.prompts)
            for i, (name, clips) in enumerate(own)
        ]
        whole = with_facts(grid(sheet, side=side), facts)
        path.with_name(f"{path.name}.png").write_bytes(png_bytes(whole))
        images = [
            grid([(name, own[i :: self.frames]) for name, own in rows], self.prompts, side)
            for i in range(self.frames)
        ]
        files = write_frames(images, path, self.fps or PLAYED, facts=facts)
        log_clip(trainer, "preview", files)

    def _sample(self, backbone: Backbone) -> tuple[Tensor, Tensor | None]:
        """Pictures of all prompts (n, 3, H, W), and attention maps (n, 1 + words, h, w), of `maps`
        first and then of the words of the prompts, or None. Clips are sampled one by one, because a
        clip is a batch of frames."""
        mapped, stills = self.maps if map_sites(backbone) else None, self.frames == 1
        self.places = word_places(backbone, self.prompts, mapped, own=stills) if mapped else None
        at_once, inputs = self._at_once(backbone), self.inputs(inputs_read(backbone))
        parts = [
            self._sample_part(backbone, slice(i, i + at_once), where=self.places, inputs=inputs)
            for i in range(0, len(self.prompts), at_once)
        ]
        maps = [maps for _, maps in parts if maps is not None]
        return torch.cat([pictures for pictures, _ in parts]), torch.cat(maps) if maps else None

    def _at_once(self, backbone: Backbone) -> int:
        """The prompts of one batch; of clips one."""
        if self.frames > 1:
            return 1
        height, width = self.settings.size or (backbone.resolution, backbone.resolution)
        return pictures_at_once(len(self.prompts), height * width)

    def _sample_part(
        self,
        backbone: Backbone,
        at: slice,
        *,
        where: WordPlaces | None,
        inputs: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """As `_sample`, for some prompts. where: the words of all prompts; the map of one that a
        prompt does not have is 0. inputs: of all prompts."""

        def pictures_of() -> Tensor:
            if self.clips and backbone.given_frames is not None:
                return self._completed(backbone, at)
            return sample_many(
                backbone,
                self.prompts[at],
                self.seeds[at],
                settings=self.settings,
                batch_size=len(self.prompts),
                inputs={name: value[at] for name, value in inputs.items()},
            )

        if where is None:
            return pictures_of(), None
        rows = [each for each in where.places[at] for _ in range(self.frames)]
        store = MapStore(rows, group=COND)
        backbone.host.install(store, map_sites(backbone))
        try:
            pictures = pictures_of()
        finally:
            backbone.host.remove(store)
        maps = store.average(
            (pictures.shape[-2] // backbone.divisor, pictures.shape[-1] // backbone.divisor)
        )
        has = torch.tensor(where.known[at], dtype=torch.float32).repeat_interleave(self.frames, 0)
        return pictures, maps * has[:, :, None, None]

    def _completed(self, backbone: Backbone, at: slice) -> Tensor:
        """One clip of a model that completes given ones."""
        where = backbone.given_frames
        assert where is not None and at.stop == at.start + 1, "clips are sampled one by one"
        given = GivenClip.of_pictures(backbone, self.clips[at.start], where)
        prompts, seeds = self.prompts[at], self.seeds[at]
        return complete(backbone, prompts, seeds, given=given, settings=self.settings).cpu()
