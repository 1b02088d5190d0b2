"""What `sample` is given beside a prompt: a video that is inverted, edited from its own prompt or
completed, or a picture to begin from."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common.atomic import written_atomically
from trainer.common.paths import slug
from trainer.data.identity import LETTERS, sha256_of_file

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.given_frames import GivenFrames
    from trainer.backbones.backbone import Backbone
    from trainer.data.kept import KeptSteps
    from trainer.diffusion.edit_source import EditSource
    from trainer.diffusion.from_image import InitialImage
    from trainer.diffusion.given_clip import GivenClip
    from trainer.diffusion.sampling_settings import Sampling

INVERTING = 3  # calls of the network for each step of an inversion
NULL_TEXT = ".null-text.safetensors"  # how files of embeddings end


@dataclass(frozen=True)
class VideoSource:
    """path: the video; model: what names the model, for the steps that are kept of an inversion;
    edited: what the video shows, where a method edits it from that; null_text: a file of embeddings
    that were optimised for it."""

    path: Path
    model: tuple[Any, ...]
    edited: EditSource | None = None
    null_text: Path | None = None


@dataclass(frozen=True)
class Begun:
    """What sampling begins from: start (frames, c, h, w), the noise that becomes the source clip;
    edited, what the source's own rows are told."""

    start: Tensor
    edited: EditSource | None = None


def square_side(settings: Sampling, key: str) -> int | None:
    """The side of what is sampled, None for the backbone's own. key: of the option whose clip is
    cut to it. Raises ValueError for a size that is no square."""
    size = settings.size
    if size is not None and size[0] != size[1]:
        raise ValueError(f"size={size[1]}x{size[0]}: {key}= is cut to a square; give one side")
    return None if size is None else size[0]


def source_of(
    backbone: Backbone,
    video: VideoSource,
    settings: Sampling,
    *,
    data: Mapping[str, Any],
    channels: Mapping[str, Tensor],
) -> Begun:
    """data: the section of the recipe that trained the model; channels: as of `sample`.

    Raises:
        ValueError: a size that is no square, or embeddings without an edit.
    """
    from trainer.diffusion.edit_source import edit_source
    from trainer.diffusion.source_clip import source_latents

    told = edit_source(backbone, video.edited, settings.steps)
    if told is None and video.null_text is not None:
        raise ValueError("null_text= is for an edit of source=; give source_prompt= too")
    frames, fps = settings.frames, settings.fps
    side = square_side(settings, "source")
    source = source_latents(backbone, video.path, frames=frames, fps=fps, data=data, side=side)
    return _inverted(
        backbone, replace(video, edited=told), source, settings=settings, channels=channels
    )


def _inverted(
    backbone: Backbone,
    video: VideoSource,
    source: Tensor,
    *,
    settings: Sampling,
    channels: Mapping[str, Tensor],
) -> Begun:
    """The inversion of a source clip (frames, c, h, w) by what it shows."""
    from trainer.common.long_work import long_work
    from trainer.data.kept import KeptSteps
    from trainer.diffusion.inversion import invert

    told, steps = video.edited, settings.steps
    kept = KeptSteps(
        _inversion_folder(backbone, video, source, settings=settings, channels=channels)
    )
    with long_work("inversion", steps, len(kept)) as advance:
        kept.stored = advance
        start = invert(
            backbone,
            source,
            ["" if told is None else told.prompt],
            steps=steps,
            frames=settings.frames,
            fps=settings.fps,
            iterations=INVERTING,
            known=kept,
            channels=channels,
        )
    if told is not None:
        told = _with_null_text(
            backbone, video, source, kept=kept, settings=settings, channels=channels
        )
    shutil.rmtree(kept.folder, ignore_errors=True)  # it is for an inversion that is interrupted
    return Begun(start, told)


def _with_null_text(
    backbone: Backbone,
    video: VideoSource,
    source: Tensor,
    *,
    kept: KeptSteps,
    settings: Sampling,
    channels: Mapping[str, Tensor],
) -> EditSource:
    """What is edited with the embeddings of a file, or those found now; without any where the
    method wants none, or the sampling is not guided."""
    from trainer.common.long_work import long_work
    from trainer.diffusion.edit_source import edit_source, source_branch
    from trainer.diffusion.null_text import null_text

    assert video.edited is not None, "embeddings are those of an edit"
    told = replace(video.edited, inverted=True)
    if video.null_text is not None:
        told = replace(told, uncond=read_null_text(video.null_text))
        checked = edit_source(backbone, told, settings.steps)
        assert checked is not None
        return checked
    branch = source_branch(backbone)
    assert branch is not None, "only a method with a source branch is told of a source"
    if not branch[1].null_text or not settings.on(embeds=backbone.embeds_guidance).guided:
        return told
    with long_work("null-text embeddings", settings.steps) as advance:
        found = null_text(
            backbone,
            source,
            kept,
            prompt=told.prompt,
            settings=settings,
            most=branch[1].null_text,
            channels=channels,
            advance=advance,
        )
    return replace(told, uncond=found)


def write_null_text(uncond: Tensor, folder: Path, video: Path) -> Path:
    """Embeddings (steps, n, d) as a file in a folder, named by the video and by what is in it."""
    from safetensors.torch import save

    data = save({"uncond": uncond.cpu().contiguous()})
    digest = hashlib.sha256(data).hexdigest()[:8]
    path = folder / f"{slug(video.stem)}-{digest}{NULL_TEXT}"
    folder.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as part:
        part.write_bytes(data)
    return path


def read_null_text(path: Path) -> Tensor:
    """What `write_null_text` wrote; raises ValueError for another file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path.expanduser())["uncond"]
    except (SafetensorError, OSError, KeyError):
        raise ValueError(
            f"null_text={path} holds no embeddings; give the file that an earlier sample of the "
            "same clip wrote, or leave it out"
        ) from None


def placed_among(
    where: GivenFrames | None, given: Mapping[str, int | None], source: Path | None
) -> GivenFrames | None:
    """Where a model has the frames of a given clip, with what a user gives in the place of its own;
    None for a model that completes no clips. given: `before`, `between` and `after`.

    Raises:
        ValueError: a number that it does not take, or no clip for a model that needs one.
    """
    if where is not None and where.fixed and source is None:
        raise ValueError(
            "this model completes a given clip and makes none by itself; give source=<a video>"
        )
    chosen = {key: value for key, value in given.items() if value is not None}
    if not chosen:
        return where
    key, value = next(iter(chosen.items()))
    if where is None:
        raise ValueError(
            f"{key}={value} is for a model that completes a given clip, which this one does not; "
            "give an adapter of recipe=frame_interpolation, or leave it out"
        )
    if where.fixed:
        raise ValueError(
            f"{key}={value}: this model was trained for {where.between} new frames after each of "
            "the given ones, and for nothing else; leave it out"
        )
    return replace(
        where,
        before=chosen.get("before", where.before),
        between=chosen.get("between", where.between),
        after=chosen.get("after", where.after),
    )


def given_clip(
    backbone: Backbone, path: Path, settings: Sampling, *, where: GivenFrames
) -> GivenClip:
    """The first frames of a video, one after another, in their places among `settings.frames`: as
    many as there are places.

    Raises:
        ImageError: the video cannot be read, or has fewer frames.
        ValueError: a size that is no square, or no place for a frame.
    """
    from trainer.diffusion.given_clip import GivenClip
    from trainer.diffusion.source_clip import source_latents

    frames = len(where.places(settings.frames))
    latents = source_latents(
        backbone, path, frames=frames, fps=None, data={}, side=square_side(settings, "source")
    )
    return GivenClip.of(latents, where, settings.frames)


def _inversion_folder(
    backbone: Backbone,
    video: VideoSource,
    source: Tensor,
    *,
    settings: Sampling,
    channels: Mapping[str, Tensor],
) -> Path:
    """Where the steps of an inversion are kept, by all they depend on."""
    from trainer.backbones.schedulers import sampled_as
    from trainer.common.paths import cache_folder

    digest = hashlib.sha256(source.cpu().numpy().tobytes())
    for name, value in channels.items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    facts = (backbone.fingerprint(), backbone.device.type, str(backbone.computes_in))
    prompt = "" if video.edited is None else video.edited.prompt
    own = (settings.steps, settings.fps, settings.frames, sampled_as(backbone), prompt)
    digest.update(repr((*facts, *own, *video.model)).encode())
    return cache_folder() / "inversion" / digest.hexdigest()[:24]


def file_facts(key: str, path: Path | None) -> dict[str, Any]:
    """The name and the hash of a file that a picture begins from, as facts for its own; raises
    ValueError where there is none."""
    if path is None:
        return {}
    if not path.expanduser().is_file():
        raise ValueError(f"{key}={path}: no such file")
    return {key: path.name, f"{key}_sha256": sha256_of_file(path.expanduser())[:LETTERS]}


def image_of(path: Path, size: tuple[int, int], strength: float) -> InitialImage:
    """A picture to begin from, scaled and cut to a size, height and width in pixels.

    Raises:
        ImageError: it cannot be read.
    """
    from PIL import Image, ImageOps

    from trainer.diffusion.from_image import InitialImage
    from trainer.media.images import read_image, to_tensor

    height, width = size
    picture = read_image(path.expanduser())
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return InitialImage(to_tensor(picture)[None], strength)
