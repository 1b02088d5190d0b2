"""The full pictures and clips of previews, as files of their own beside the grid.

    previews/step-000300/00-a-fox-on-a-beach.png     a picture, or a clip as .mp4 and .gif
    previews/step-000000/                            before the first step

Each says inside what made it, as those of `sample` do: `sample from=` makes it again where the
adapter of that step was kept, as a checkpoint, along the way or as the result of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from trainer.backbones.backbone import Backbone
from trainer.common.paths import slug
from trainer.data.identity import LETTERS, sha256_of_file
from trainer.diffusion.made_of import made_of
from trainer.diffusion.sampling_settings import Sampling
from trainer.media.images import to_pil
from trainer.media.made_by import png_bytes, with_facts
from trainer.media.write_video import PLAYED, write_frames
from trainer.runs.adapter import adapter_facts
from trainer.runs.run_folder import kept_adapter
from trainer.training.checkpoint_files import MANIFEST


@dataclass(frozen=True)
class Shown:
    """One preview of one prompt: pictures (frames, 3, H, W) in [-1, 1], one of a still. batch, row:
    how many were sampled at once, and which of them it was."""

    prompt: str
    seed: int
    pictures: Tensor
    batch: int = 1
    row: int = 0


class PreviewFiles:
    """Writes the previews of a run into `folder`, which is in its run folder. parts: gives the
    hashes of the backbone's parts, which takes a while for a large one."""

    def __init__(self, folder: Path, parts: Callable[[], Mapping[str, str]] | None = None) -> None:
        self.folder, self.parts = folder, parts
        self.known: dict[str, Any] | None = None
        self.last: list[tuple[Path, list[Image], dict[str, Any]]] = []

    def write(
        self, shown: list[Shown], step: int, *, backbone: Backbone, settings: Sampling, last: bool
    ) -> None:
        """Writes what was shown after a step. last: it is the run's, see `name_adapter`. A step
        that is trained again after a resume replaces its files."""
        place = self.folder / step_name(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        place.mkdir(exist_ok=True)
        made = self._known(backbone, settings) | adapter_after(self.folder.parent, step)
        for number, own in enumerate(shown):
            among = {"batch": own.batch, "row": own.row} if own.batch > 1 else {}
            facts = made_of(backbone, settings, prompt=own.prompt, seed=own.seed, **among, **made)
            images = [to_pil(picture) for picture in own.pictures]
            path = place / f"{number:02d}-{slug(own.prompt)}"
            write_images(images, path, settings.fps, facts=facts)
            if last:
                self.last.append((path, images, facts))

    def name_adapter(self, path: Path) -> None:
        """Writes the last files again, which then name the run's adapter too: it did not exist
        before, and stays when checkpoints are removed."""
        with suppress(OSError):  # the disk may be full, and the files are there already
            named = adapter_facts(path)
            for place, images, facts in self.last:
                if checkpoint := facts.get("checkpoint_sha256") or facts.get("adapter_sha256"):
                    facts["checkpoint_sha256"] = checkpoint
                write_images(images, place, facts.get("fps"), facts=facts | named)
        self.last.clear()

    def _known(self, backbone: Backbone, settings: Sampling) -> dict[str, Any]:
        """What all files say, and what the last bits depend on; see `cli/sample_files.py`."""
        if self.known is None:
            self.known = {"torch": torch.__version__, "scheduler": settings.sampler}
            if self.parts is not None:
                self.known["backbone_parts"] = dict(self.parts())
        on_cpu = backbone.device.type == "cpu"
        return self.known | ({"threads": torch.get_num_threads()} if on_cpu else {})


def step_name(step: int) -> str:
    """As folders of checkpoints are called: step-000300."""
    return f"step-{step:06d}"


def adapter_after(run: Path, step: int) -> dict[str, Any]:
    """The adapter of a run after a step, as pictures name it; with the hash of the adapter kept
    then and of its checkpoint, where there are such."""
    own = run.absolute()
    facts: dict[str, Any] = {"adapter": f"{own.parent.name}/{own.name}", "step": step}
    manifest = own / "checkpoints" / step_name(step) / MANIFEST
    kept = kept_adapter(own, step)
    if manifest.is_file():
        facts["adapter_sha256"] = sha256_of_file(manifest)[:LETTERS]
    if kept.is_file():
        facts["checkpoint_sha256"] = facts.get("adapter_sha256")
        facts["adapter_sha256"] = sha256_of_file(kept)[:LETTERS]
    return {key: value for key, value in facts.items() if value is not None}


def write_images(
    images: list[Image], place: Path, fps: float | None, *, facts: Mapping[str, Any]
) -> None:
    """Writes one picture as `<place>.png`, or a clip as `write_frames` does, over what is there."""
    if len(images) > 1:
        write_frames(images, place, fps or PLAYED, facts=facts)
    else:
        place.with_name(f"{place.name}.png").write_bytes(png_bytes(with_facts(images[0], facts)))
