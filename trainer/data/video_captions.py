"""The captions of video files and of folders of frames."""

from __future__ import annotations

from pathlib import Path

from trainer.data.tars.manifest import metadata_of
from trainer.media.images import ImageError
from trainer.media.read_caption import read_caption


def caption_beside(path: Path) -> str | None:
    """The caption in the .txt beside a video, else in the .json; None without either file."""
    caption, data = read_caption(path), path.with_suffix(".json")
    if caption is not None or not data.is_file():
        return caption
    found = metadata_of(data.read_bytes(), path.stem).get("caption")
    if not isinstance(found, str):
        raise ImageError(f"{data.name} has no caption; add one, or write {path.stem}.txt beside it")
    return found.strip()


def no_caption(path: Path) -> ValueError:
    """The refusal of a video without one."""
    return ValueError(
        f"no caption for {path}: write it into {path.name if path.is_dir() else path.stem}.txt "
        "beside it, or set "
        "data.prompt, one caption for all videos"
    )
