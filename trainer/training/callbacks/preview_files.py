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

from PIL.Image import Image
from torch import Tensor

from trainer.attention.input_channels import inputs_read
from trainer.backbones.backbone import Backbone
from trainer.common.paths import slug
from trainer.data.extra_inputs import READERS
from trainer.data.identity import LETTERS, sha256_of_file
from trainer.diffusion.made_of import last_bits, made_of
from trainer.diffusion.sampling_settings import Sampling
from trainer.media.images import to_pil
from trainer.media.write_video import PLAYED, write_frames
from trainer.runs.adapter import adapter_facts
from trainer.runs.run_folder import kept_adapter, step_name
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
        self.hashes: dict[str, Any] | None = None
        self.last: list[tuple[Path, list[Image], dict[str, Any]]] = []

    def write(
        self, shown: list[Shown], step: int, *, backbone: Backbone, settings: Sampling, last: bool
    ) -> None:
        """Writes what was shown after a step. last: it is the run's, see `name_adapter`. A step
        that is trained again after a resume replaces its files."""
        place = self.folder / step_name(step)
        place.mkdir(parents=True, exist_ok=True)
        if self.hashes is None:
            self.hashes = {} if self.parts is None else {"backbone_parts": dict(self.parts())}
        made = last_bits(backbone, settings) | self.hashes
        if read := [name for name in inputs_read(backbone) if name in READERS]:
            made["read_from_data"] = read
        made |= adapter_after(self.folder.parent, step)
        for number, own in enumerate(shown):
            among = {"batch": own.batch, "row": own.row} if own.batch > 1 else {}
            facts = made_of(backbone, settings, prompt=own.prompt, seed=own.seed, **among, **made)
            images = [to_pil(picture) for picture in own.pictures]
            path = place / f"{number:02d}-{slug(own.prompt)}"
            write_frames(images, path, settings.fps or PLAYED, facts=facts)
            if last:
                self.last.append((path, images, facts))

    def name_adapter(self, path: Path) -> None:
        """Writes the last files again, which then name the run's adapter too: it did not exist
        before, and stays when checkpoints are removed."""
        with suppress(OSError):  # the disk may be full, and the files are there already
            named = adapter_facts(path)
            for place, images, facts in self.last:
                write_frames(images, place, facts.get("fps") or PLAYED, facts=facts | named)
        self.last.clear()


def adapter_after(run: Path, step: int) -> dict[str, Any]:
    """The adapter of a run after a step, as pictures name it; with the hashes of its checkpoint and
    of the adapter kept then, where there are such. Without the second, the first stands for it."""
    own = run.absolute()
    facts: dict[str, Any] = {"adapter": f"{own.parent.name}/{own.name}", "step": step}
    manifest, kept = own / "checkpoints" / step_name(step) / MANIFEST, kept_adapter(own, step)
    if manifest.is_file():
        facts["checkpoint_sha256"] = facts["adapter_sha256"] = sha256_of_file(manifest)[:LETTERS]
    if kept.is_file():
        facts["adapter_sha256"] = sha256_of_file(kept)[:LETTERS]
    return facts
