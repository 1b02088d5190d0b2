"""Data source `video`: clips cut from a video, from a folder of videos, or from tars of videos.

    cat.mp4  cat.txt  cat.json          in a folder; the caption is in the .txt, or is the value
                                        of `caption` in the .json
    000012.mp4  000012.txt  000012.json in tars in webdataset layout, the same

    cat/0001.png  cat/0002.png  cat.txt frames, with `frame_rate`

A clip has the frames that a player shows at `frames` moments. The time between two of them is
`stride` frames of the video at its average rate, or 1 / `fps` seconds, so a variable frame rate is
no problem. Each video gives one clip; it begins at frame `start`, or at a random frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from trainer.data.mixed import Mixed, Stills
from trainer.data.source import Caption, Dataset, Needs, Source
from trainer.data.source_checks import bytes_of, check_split, has_caption
from trainer.data.source_options import OnBad
from trainer.data.sources.folder import Folder
from trainer.data.tars.count import count_samples
from trainer.data.tars.reader import Tars
from trainer.data.tars.shard_checksums import holds_tars, load_manifest, tars_of
from trainer.data.video_captions import caption_beside, no_caption
from trainer.data.video_clips import CaptionedVideo, VideoClips, Window
from trainer.media.frame_folders import examine_frames, frames_in, list_frame_folders
from trainer.media.images import ImageError
from trainer.media.read_video import VideoFacts, examine, list_videos


class Video(Source):
    """One clip of every video."""

    video: Path = Field(
        description="a video or GIF, a folder of them, a folder of frames or of such folders, a "
        ".tar, a pattern of them as in shard-{000..010}.tar, or a folder of .tar",
        examples=["./clips"],
    )
    frame_rate: float | None = Field(
        None,
        gt=0,
        description="frames a second of folders of frames, cat/0001.png and so on, each a clip; "
        "null does not read them",
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
            raise ValueError(
                "the prompt is blank; write what the video shows, as in 'a man skiing'"
            )
        return prompt

    @field_validator("start")
    @classmethod
    def _is_a_frame(cls, start: int | str) -> int | str:
        if isinstance(start, int) and start < 0:
            raise ValueError("give the number of a frame, counted from 0, or the word random")
        return start

    @field_validator("ignore")
    @classmethod
    def _without_dots(cls, ignore: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(extension.lower().lstrip(".") for extension in ignore)

    @field_validator("video", "stills")
    @classmethod
    def _expand_home(cls, path: Path | None) -> Path | None:
        return path and path.expanduser()

    @model_validator(mode="after")
    def _fits_together(self) -> Video:
        if self.fps is not None and self.stride != 1:
            raise ValueError(f"stride={self.stride} and fps={self.fps:g}: give only one of them")
        if self.images and self.frames == 1:
            raise ValueError(f"images={self.images} of clips of one frame; set images=0")
        if self.stills is not None:
            if not self.images:
                raise ValueError(
                    "images=0 never uses stills; set images to their share of the batches"
                )
            Folder(folder=self.stills)
        return self

    @model_validator(mode="after")
    def _every_video_has_a_caption(self) -> Video:
        if holds_tars(self.video):
            tars_of(self.video)
            return self
        paths = self._paths()
        check_split(self.validation, len(paths), f"videos in {self.video}")
        for path in paths:
            if self.prompt is None and not has_caption(path, caption_beside):
                raise no_caption(path)
        return self

    def idle(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.frames == 1:
            why = "data.frames=1 takes single frames; it is for clips"
            found |= dict.fromkeys(("stride", "fps"), why)
        if not holds_tars(self.video):
            found["ignore"] = "it is for .tar files"
        if not list_frame_folders(self.video):
            found["frame_rate"] = f"{self.video} has no folder of frames; videos say their own"
        return found

    @cached_property
    def count(self) -> int:
        """How many videos there are."""
        in_tars = holds_tars(self.video)
        return count_samples(self.video, self.ignore) if in_tars else len(self._paths())

    def stored(self) -> int:
        paths = tars_of(self.video) if holds_tars(self.video) else self._paths()
        own = [file for path in paths for file in (frames_in(path) if path.is_dir() else [path])]
        stills = 0 if self.stills is None else Folder(folder=self.stills).stored()
        return bytes_of(own) + stills

    def epoch(self) -> float:
        """A clip of every video once, beside the share of images."""
        return max(0, self.count - self.validation) / (1 - self.images)

    def captions(self) -> Iterator[Caption]:
        if self.prompt is not None:
            yield "data.prompt", self.prompt, None
        elif not holds_tars(self.video):
            for path in self._paths():
                with suppress(ImageError):  # `open` reports or skips it
                    if (text := caption_beside(path)) is not None:
                        yield f"the caption of {path}", text, None
        if self.stills is not None:
            yield from Folder(folder=self.stills).captions()

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        """Decodes every video once, so that a bad one is found before training starts.

        Raises:
            ImageError: videos or captions that cannot be used, all of them in one message.
            ValueError: no more than `validation` videos are usable; tars are damaged, or contain
                images.
        """
        videos, bad = self._in_tars(needs) if holds_tars(self.video) else self._in_files()
        if bad and (self.on_bad == "raise" or not videos):
            more = f"\n... and {len(bad) - 20} more" if len(bad) > 20 else ""
            raise ImageError(
                f"{self.video}: {len(bad)} of {len(bad) + len(videos)} videos cannot be used, "
                "data.on_bad=skip leaves them out:\n" + "\n".join(bad[:20]) + more
            )
        check_split(self.validation, len(videos), f"usable videos in {self.video}")
        cut = len(videos) - self.validation
        window, side = self._window(self.start), needs.resolution
        train: Dataset = VideoClips(videos[:cut], window, side=side, flip=self.flip, skipped=bad)
        if self.images:
            train = Mixed(train, self._stills(train, needs), self.images)
        if not self.validation:
            return train, None
        if self.start == "random":
            window = self._window(0)  # the validation loss needs the same clip every time
        return train, VideoClips(videos[cut:], window, side=side, flip=False)

    def _window(self, start: int | Literal["random"]) -> Window:
        return Window(frames=self.frames, stride=self.stride, fps=self.fps, start=start)

    def _stills(self, clips: Dataset, needs: Needs) -> Dataset:
        if self.stills is None:
            return Stills(clips)
        return Folder(folder=self.stills, on_bad=self.on_bad, flip=self.flip).open(needs)[0]

    def _in_files(self) -> tuple[list[CaptionedVideo], list[str]]:
        """The usable videos of a folder, and what is wrong with the others."""
        videos: list[CaptionedVideo] = []
        bad: list[str] = []
        for path in self._paths():
            try:
                caption = self.prompt or caption_beside(path)
                if caption is None:
                    raise no_caption(path)
                facts = self._long_enough(self._examine(path), path.name)
                videos.append(CaptionedVideo(path.name, caption, facts=facts, source=path))
            except ImageError as error:
                bad.append(str(error))
        return videos, bad

    def _paths(self) -> list[Path]:
        """The videos of a folder and, where their rate is given, its folders of frames."""
        folders = list_frame_folders(self.video)
        if self.frame_rate is not None and folders == [self.video]:
            return folders
        try:
            return list_videos(self.video, folders if self.frame_rate is not None else ())
        except ValueError as error:
            if not folders:
                raise
            raise ValueError(
                f"{error}; data.frame_rate=24 reads folders of frames, here {folders[0]}, with so "
                "many frames a second"
            ) from None

    def _examine(self, path: Path) -> VideoFacts:
        if not path.is_dir():
            return examine(path, path.name)
        assert self.frame_rate is not None, "only then folders are listed"
        return examine_frames(path, path.name, self.frame_rate)

    def found(self) -> list[str]:
        if holds_tars(self.video):
            return []
        paths = self._paths()
        folders = sum(path.is_dir() for path in paths)
        beside = 0 if self.prompt else sum(has_caption(path, caption_beside) for path in paths)
        captions = f"{beside} beside them" if beside else "one for all, data.prompt"
        said = [
            f"{self.video}: {len(paths) - folders} videos, {folders} folders of frames; captions: "
            f"{captions}"
        ]
        if self.frame_rate is None and (left := list_frame_folders(self.video)):
            said.append(
                f"{self.video}: folders of frames that are not read: {len(left)}, as "
                f"{left[0].name}; data.frame_rate=24 reads them as clips of so many frames a second"
            )
        return said

    def _in_tars(self, needs: Needs) -> tuple[list[CaptionedVideo], list[str]]:
        """The usable videos of tars, and what is wrong with the others."""
        found = load_manifest(self.video, needs.cache, self.ignore, keep=needs.keeps)
        bad = [f"{shard.name}: {reason}" for shard in found for reason in shard.bad]
        rows = [(shard.name, entry) for shard in found for entry in shard.samples]
        folder = self.video if self.video.is_dir() else self.video.parent
        digests = {shard.name: shard.sha256 for shard in found}
        tars = Tars(folder, rows, digests=digests, side=needs.resolution, divisor=needs.divisor)
        videos, rng = [], np.random.default_rng(0)  # captions in tars use no random numbers
        for i, (name, entry) in enumerate(rows):
            if entry.video is None:
                raise ValueError(
                    f"{self.video} contains images; read them by data.source=shards "
                    f"data.shards={self.video}"
                )
            try:
                facts = self._long_enough(entry.video, f"{name}: {entry.key}")
            except ImageError as error:
                bad.append(str(error))
                continue
            videos.append(
                CaptionedVideo(
                    entry.key,
                    self.prompt or tars.caption(i, rng),
                    facts=facts,
                    source=partial(tars.video, i),
                    digest=f"{digests[name]} {entry.key}",
                )
            )
        return videos, bad

    def _long_enough(self, facts: VideoFacts, name: str) -> VideoFacts:
        """`facts`; raises ImageError if the video is too short for a clip."""
        self._window(self.start).starts(facts, name)
        return facts
