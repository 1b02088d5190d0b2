"""Opens users' video files, checks them and turns them into frames.

A file's format is known by its first bytes, not by its name, and only the demuxer for that format
reads it: otherwise a playlist with the name of an .mp4 could make FFmpeg fetch what it lists. Every
frame becomes an upright 8-bit RGB image of square pixels; if it cannot, an `ImageError` names the
file and says what to do. PyAV is imported only when a file is opened.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from trainer.common.left_by_systems import left_by_system
from trainer.media.images import MAX_PIXELS, MIN_SIDE, ImageError
from trainer.media.photo_listing import natural_order

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    Opened = tuple[InputContainer, VideoStream]

READABLE_VIDEOS = frozenset((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"))
# These are listed too, so that reading reports an error: a video must not go unnoticed.
LISTED_VIDEOS = READABLE_VIDEOS.union(
    (".wmv", ".flv", ".mpg", ".mpeg", ".ts", ".mts", ".3gp", ".ogv")
)
CONVERT_VIDEO = "convert it to MP4, or remove it"
COPY = "copy it again from its source, or remove it"
# (offset, bytes there, demuxer)
SIGNATURES = (
    *((4, kind, "mov") for kind in (b"ftyp", b"moov", b"mdat", b"wide", b"free")),
    (0, b"\x1aE\xdf\xa3", "matroska"),
    (8, b"AVI ", "avi"),
    (0, b"GIF8", "gif"),
)
GIF_END = b";"
HDR = (16, 18)  # transfer functions PQ and HLG, ITU-T H.273 table 3
SLACK = 0.1  # frames of tolerance: containers round times, Matroska to a millisecond


class VideoFacts(NamedTuple):
    """Facts of one video: width and height of its upright frames in square pixels, number of
    frames, times of the first and the last frame in seconds, average frames a second."""

    width: int
    height: int
    frames: int
    first: float
    last: float
    rate: float


def list_videos(place: str | Path, others: Sequence[Path] = ()) -> list[Path]:
    """The video files of a folder, not of its subfolders, in natural order, with `others`; or the
    given file.

    Raises:
        ValueError: the file or folder is missing, or the folder has no video.
    """
    place = Path(place)
    expected = f"expected a video ({', '.join(sorted(READABLE_VIDEOS))}), or a folder of them"
    if not place.exists():
        raise ValueError(f"{place}: no such file or folder; {expected}")
    if not place.is_dir():
        return [place]
    found = [path for path in place.iterdir() if path.suffix.lower() in LISTED_VIDEOS]
    found = [path for path in found if not (left_by_system(path.name) or path.is_dir())]
    found += others
    if not found:
        raise ValueError(f"{place}: no video in this folder; {expected}, subfolders are not read")
    return sorted(found, key=natural_order)


def examine(source: Path | bytes, name: str | Path) -> VideoFacts:
    """Decodes every frame of a video, so that any damage is found now.

    Args:
        source: the file, or its bytes.
        name: its name in errors.

    Raises:
        ImageError: the file is missing, truncated or damaged, has no video or another format; the
            frames are too large or too small, have a high dynamic range, or have no times.
        ModuleNotFoundError: PyAV is not installed.
    """
    with _opened(source, name) as (container, stream):
        frames, size = 0, (0, 0)
        first = last = 0.0
        for frame in _decoded(container, stream, name):
            if not frames:
                size, first = _upright(frame, stream).size, frame.time
            _check_frame(frame, name)
            frames, last = frames + 1, max(last, frame.time)
        if not frames:
            raise ImageError(f"{name}: no frame could be decoded; {COPY}")
        rate = (frames - 1) / (last - first) if last > first else float(stream.average_rate or 1)
        _check_end(container, stream, name=name, end=last + 1 / rate)
        return VideoFacts(*size, frames=frames, first=first, last=last, rate=rate)


def read_clip(
    source: Path | bytes, name: str | Path, *, video: VideoFacts, times: Sequence[float]
) -> list[Image.Image]:
    """The frames that a player shows at `times`, in seconds after the first frame, ascending.

    Raises:
        ImageError: as `examine`, for the part that is read.
    """
    slack = SLACK / video.rate
    wanted = [video.first + time + slack for time in times]
    with _opened(source, name) as (container, stream):
        if times[0] > 0 and stream.time_base:  # go to the last key frame before it
            container.seek(int(wanted[0] / stream.time_base), stream=stream)
        images: list[Image.Image] = []
        shown: VideoFrame | None = None
        for frame in _decoded(container, stream, name):
            if shown is None and frame.time > wanted[0]:
                raise ImageError(f"{name}: no frame found at {times[0]:.2f} s; {CONVERT_VIDEO}")
            while shown is not None and frame.time > wanted[len(images)]:
                images.append(_checked(shown, stream, name))
                if len(images) == len(wanted):
                    return images
            shown = frame
        if shown is None:
            raise ImageError(f"{name}: ends before {times[0]:g} s; {COPY}")
        last = _checked(shown, stream, name)
        return images + [last] * (len(wanted) - len(images))


def frames_of_video(path: Path, most: int | None = None) -> list[Image.Image]:
    """The frames of a video from its first on, at most so many; raises as `examine`."""
    with _opened(path, path) as (container, stream):
        decoded = islice(_decoded(container, stream, path), most)
        return [_checked(frame, stream, path) for frame in decoded]


def comment_in(path: Path) -> str:
    """The comment in a video's file, empty without one; raises as `examine`."""
    with _opened(path, path) as (container, _):
        return str(container.metadata.get("comment", ""))


@contextmanager
def _opened(source: Path | bytes, name: str | Path) -> Iterator[Opened]:
    try:
        import av
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"{name}: reading videos needs {missing.name}: pip install 'attention-trainer[video]'"
        ) from missing
    demuxer, size = _demuxer(source, name)
    if demuxer == "gif" and _is_cut_gif(source):
        raise ImageError(f"{name}: truncated; {COPY}")
    try:
        # absolute, because FFmpeg takes a name such as "concat:x" for one of its protocols
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source.absolute())
        container = av.open(file, "r", format=demuxer)
    except (av.FFmpegError, ValueError) as error:
        raise ImageError(f"{name}: truncated or damaged ({_reason(error)}); {COPY}") from error
    with container:
        # the cover picture of a song is a separate stream
        streams = [
            stream
            for stream in container.streams.video
            if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        if not streams:
            raise ImageError(f"{name}: the file has no video; {CONVERT_VIDEO}")
        _check_header(streams[0], name, size)
        yield container, streams[0]


def _demuxer(source: Path | bytes, name: str | Path) -> tuple[str, int]:
    """The demuxer for a file's content, and the size of the file in bytes."""
    if isinstance(source, bytes):
        head, size = source[:64], len(source)
    else:
        if not source.is_file():
            raise ImageError(f"{name}: no such file; check the name and, if a link, its target")
        with source.open("rb") as file:
            head, size = file.read(64), source.stat().st_size
    if not head:
        raise ImageError(f"{name}: the file is empty; {COPY}")
    if head.startswith(b"version https://git-lfs"):
        raise ImageError(f"{name}: a Git LFS pointer, not the video; run `git lfs pull`")
    for offset, magic, demuxer in SIGNATURES:
        if head[offset:].startswith(magic):
            return demuxer, size
    raise ImageError(f"{name}: not a readable video; {CONVERT_VIDEO}")


def _is_cut_gif(source: Path | bytes) -> bool:
    """Whether a GIF lacks its end mark; FFmpeg reads one that was cut without a word."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    return not data.rstrip(b"\0").endswith(GIF_END)


def _check_header(stream: VideoStream, name: str | Path, size: int) -> None:
    pixels = stream.width * stream.height
    if pixels > MAX_PIXELS:
        raise ImageError(f"{name}: {pixels:,} pixels a frame, the limit is {MAX_PIXELS:,}")
    if min(stream.width, stream.height) < MIN_SIDE:
        raise ImageError(
            f"{name}: {stream.width}x{stream.height} pixels, each side must have at least "
            f"{MIN_SIDE}; use a larger version of the video"
        )
    # MP4 and AVI list the position of every frame, also of those that were cut off
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if end > size:
        raise ImageError(f"{name}: truncated, {size:,} bytes of at least {end:,}; {COPY}")


def _check_end(
    container: InputContainer, stream: VideoStream, *, name: str | Path, end: float
) -> None:
    """Raises ImageError if the video ends before the duration in its header. Matroska, which has no
    list of frames, has the duration of each track, or of all."""
    length = 0.0
    if "DURATION" in stream.metadata:
        hours, minutes, seconds = map(float, stream.metadata["DURATION"].split(":"))
        length = 3600 * hours + 60 * minutes + seconds
    elif container.format.name != "gif" and container.duration and len(container.streams) == 1:
        length = container.duration / 1e6
    if end < length - max(0.5, 0.05 * length):  # a last frame may be shown long
        raise ImageError(f"{name}: truncated, {end:.2f} of {length:.2f} seconds; {COPY}")


def _decoded(
    container: InputContainer, stream: VideoStream, name: str | Path
) -> Iterator[VideoFrame]:
    import av

    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ImageError(f"{name}: truncated or damaged; {COPY}")
            for frame in packet.decode():
                if frame.time is None:
                    raise ImageError(f"{name}: frames without times; {CONVERT_VIDEO}")
                yield frame
    except av.FFmpegError as error:
        raise ImageError(f"{name}: truncated or damaged ({_reason(error)}); {COPY}") from error


def _check_frame(frame: VideoFrame, name: str | Path) -> None:
    if frame.is_corrupt:
        raise ImageError(f"{name}: damaged at {frame.time:.2f} s; {COPY}")
    if frame.color_trc in HDR:
        raise ImageError(f"{name}: high dynamic range (PQ or HLG); convert it to SDR, or remove it")


def _checked(frame: VideoFrame, stream: VideoStream, name: str | Path) -> Image.Image:
    _check_frame(frame, name)
    return _upright(frame, stream)


def _upright(frame: VideoFrame, stream: VideoStream) -> Image.Image:
    """The frame as 8-bit RGB in square pixels, on white where it is transparent, rotated as a
    player shows it."""
    if any(component.is_alpha for component in frame.format.components):
        image = Image.fromarray(frame.to_ndarray(format="rgba"))
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    else:
        image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    aspect = stream.sample_aspect_ratio
    if aspect and aspect != 1:
        size = (max(1, round(image.width * aspect)), image.height)
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _reason(error: Exception) -> str:
    return str(error).partition("] ")[2].partition(":")[0] or str(error)
