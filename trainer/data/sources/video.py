"""Data source `video`: clips cut from a video, from a folder of them, or from shards of them.

    cat.mp4  cat.txt  cat.json          a caption beside each; `caption` in the .json
    000012.mp4  000012.txt  000012.json the same as members of tars in webdataset layout

A clip is what is on screen at `frames` moments that lie one step apart, so a variable frame rate
changes nothing: a step is `stride` frames of the video at its average rate, or 1 / `fps` seconds.
Each video gives one clip, from frame `start` or from anywhere.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from trainer.data.held_out import check_split, is_told
from trainer.data.mixed import Mixed, Stills
from trainer.data.source import Dataset, Needs, Source
from trainer.data.source_options import OnBad
from trainer.data.sources.folder import Folder
from trainer.data.takes import Clips, Take, Window
from trainer.data.tars.ledger import load_manifest, tars_of
from trainer.data.tars.manifest import metadata_of
from trainer.data.tars.reader import Tars
from trainer.media.decode import VideoFacts, examine, list_videos
from trainer.media.images import ImageError, read_caption


class Video(Source):
    """One clip of every video."""

    video: Path = Field(
        description="a video, a folder of them, a .tar, or a folder of .tar", examples=["./clips"]
    )
    prompt: str | None = Field(
        None, description="the caption of all videos; null reads the one beside each"
    )
    frames: int = Field(16, gt=0, description="frames of a clip")
    stride: int = Field(
        1,
        gt=0,
        description="frames of the video, at its average rate, from one of the clip to the next",
    )
    fps: float | None = Field(
        None, gt=0, description="frames a second of the clip, in place of stride"
    )
    start: int | Literal["random"] = Field(
        0,
        description="the first frame of the clip, counted from 0, or random for another one at "
        "every use",
    )
    flip: bool = Field(
        False,
        description="mirror clips every second time, except those whose caption names a side; "
        "latents then cannot be cached",
    )
    images: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the batches that are images: single frames, or photos of stills",
    )
    stills: Path | None = Field(
        None, description="a folder of photos for images, captioned as in the source folder"
    )
    validation: int = Field(
        0, ge=0, description="videos to hold out for the validation loss, the last ones"
    )
    on_bad: OnBad = "raise"
    ignore: tuple[str, ...] = Field(
        (), description="extensions of members of .tar files to leave out, as in [cls, npy]"
    )

    @field_validator("prompt")
    @classmethod
    def _is_a_caption(cls, prompt: str | None) -> str | None:
        if prompt is not None and not prompt.strip():
            raise ValueError("write what the video shows, such as 'a man skiing'")
        return prompt

    @field_validator("start")
    @classmethod
    def _is_a_frame(cls, start: int | str) -> int | str:
        if isinstance(start, int) and start < 0:
            raise ValueError("give the number of a frame, the first is 0, or random")
        return start

    @field_validator("ignore")
    @classmethod
    def _without_dots(cls, ignore: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(extension.lower().lstrip(".") for extension in ignore)

    @field_validator("video", "stills")
    @classmethod
    def _at_home(cls, path: Path | None) -> Path | None:
        return path and path.expanduser()

    @model_validator(mode="after")
    def _fits_together(self) -> Video:
        if self.fps is not None and self.stride != 1:
            raise ValueError(f"stride={self.stride} and fps={self.fps:g}: give one of them")
        if self.images and self.frames == 1:
            raise ValueError(f"images={self.images} of clips of one frame; set images=0")
        if self.stills is not None:
            if not self.images:
                raise ValueError("stills are not seen with images=0; give their share of batches")
            Folder(folder=self.stills)
        return self

    @model_validator(mode="after")
    def _every_video_has_a_caption(self) -> Video:
        if _holds_tars(self.video):
            tars_of(self.video)
            return self
        paths = list_videos(self.video)
        check_split(self.validation, len(paths), f"videos in {self.video}")
        for path in paths:
            if self.prompt is None and not is_told(path, _beside):
                raise _no_caption(path)
        return self

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        """Decodes every video once, so that a bad one ends or leaves the run now and not later.

        Raises:
            ImageError: videos or captions that cannot be used, all of them in one message.
            ValueError: what is left after skipping is no more than `validation`; shards that are
                damaged, or hold images.
        """
        takes, bad = self._in_tars(needs) if _holds_tars(self.video) else self._in_files()
        if bad and (self.on_bad == "raise" or not takes):
            more = f"\n... and {len(bad) - 20} more" if len(bad) > 20 else ""
            raise ImageError(
                f"{self.video}: {len(bad)} of {len(bad) + len(takes)} videos cannot be used, "
                "data.on_bad=skip leaves them out:\n" + "\n".join(bad[:20]) + more
            )
        check_split(self.validation, len(takes), f"usable videos in {self.video}")
        cut, side = len(takes) - self.validation, needs.resolution
        window = Window(self.frames, self.stride, self.fps, self.start)
        train: Dataset = Clips(takes[:cut], window, side, self.flip, bad)
        if self.images:
            train = Mixed(train, self._stills(train, needs), self.images)
        if not self.validation:
            return train, None
        held_out = Window(self.frames, self.stride, self.fps, 0) if self.start == "random" else None
        return train, Clips(takes[cut:], held_out or window, side, False, ())

    def _stills(self, clips: Dataset, needs: Needs) -> Dataset:
        if self.stills is None:
            return Stills(clips)
        return Folder(folder=self.stills, on_bad=self.on_bad, flip=self.flip).open(needs)[0]

    def _in_files(self) -> tuple[list[Take], list[str]]:
        takes: list[Take] = []
        bad: list[str] = []
        for path in list_videos(self.video):
            try:
                caption = self.prompt or _beside(path)
                if caption is None:
                    raise _no_caption(path)
                film = self._long_enough(examine(path, path.name), path.name)
                takes.append(Take(path.name, caption, film, path))
            except ImageError as error:
                bad.append(str(error))
        return takes, bad

    def _in_tars(self, needs: Needs) -> tuple[list[Take], list[str]]:
        found = load_manifest(self.video, needs.cache, self.ignore)
        bad = [f"{shard.name}: {reason}" for shard in found for reason in shard.bad]
        rows = [(shard.name, entry) for shard in found for entry in shard.samples]
        folder = self.video if self.video.is_dir() else self.video.parent
        digests = {shard.name: shard.sha256 for shard in found}
        tars = Tars(folder, rows, list(digests.values()), needs.resolution, ())
        takes, rng = [], np.random.default_rng(0)  # a caption in a tar draws nothing
        for i, (name, entry) in enumerate(rows):
            if entry.film is None:
                raise ValueError(
                    f"{self.video}: there are images in it; give data.source=shards "
                    f"data.shards={self.video}"
                )
            try:
                film = self._long_enough(entry.film, f"{name}: {entry.key}")
            except ImageError as error:
                bad.append(str(error))
                continue
            caption = self.prompt or tars.caption(i, rng)
            digest = f"{digests[name]} {entry.key}"
            takes.append(Take(entry.key, caption, film, partial(tars.video, i), digest))
        return takes, bad

    def _long_enough(self, film: VideoFacts, name: str) -> VideoFacts:
        Window(self.frames, self.stride, self.fps, self.start).starts(film, name)
        return film


def _holds_tars(place: Path) -> bool:
    if place.is_dir():
        return any(path.suffix == ".tar" for path in place.iterdir())
    return place.suffix == ".tar"


def _beside(path: Path) -> str | None:
    """The text of .txt, or without one the `caption` of .json; None without both."""
    told, data = read_caption(path), path.with_suffix(".json")
    if told is not None or not data.is_file():
        return told
    found = metadata_of(data.read_bytes(), path.stem).get("caption")
    if not isinstance(found, str):
        raise ImageError(f"{data.name}: no caption in it; write one, or {path.stem}.txt beside it")
    return found.strip()


def _no_caption(path: Path) -> ValueError:
    return ValueError(
        f"no caption for {path}: write it into {path.with_suffix('.txt').name} beside it, or give "
        "data.prompt, the caption of all videos"
    )
