"""Opens users' image files, checks them and turns them into tensors.

Every file becomes either an upright 8-bit sRGB image or an `ImageError` that names the file and
says what to do. A JPEG, PNG or WebP is known by its content, not by its name; other formats are
those of `other_formats.py`. torch is imported only by the functions that need it.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from trainer.media.other_formats import other_format

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 64_000_000
MIN_SIDE = 16
TURNED = (5, 6, 7, 8)  # EXIF orientations rotated by 90 degrees
FORMATS = ("JPEG", "PNG", "WEBP")
CONVERT_IMAGE = "convert it to JPEG, PNG or WebP"
COPY_IMAGE = "copy it again from its source or export it anew"
EXPORT = "export one frame as JPEG, PNG or WebP"
RAW = "camera raw is not read, and a TIFF by the name .tif; rename it, or convert it to JPEG or PNG"
HEIC = f"a HEIC, which is read by the name .heic; rename it, or {CONVERT_IMAGE}"
# (offset, bytes there, message) of other files that are common in folders of photos
FOREIGN = (
    (0, b"GIF8", f"a GIF, a format for animations; {EXPORT}"),
    (0, b"BM", f"a BMP, which is read by the name .bmp; rename it, or {CONVERT_IMAGE}"),
    (0, b"II*\0", RAW),
    (0, b"MM\0*", RAW),
    (4, b"ftypavi", f"AVIF is not read; {CONVERT_IMAGE}"),
    (4, b"ftyphe", HEIC),
    (4, b"ftypmif1", HEIC),
    (4, b"ftyp", f"a video; {EXPORT}"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the image; run `git lfs pull`"),
    (0, b"", f"not a readable image; {CONVERT_IMAGE}, or remove it from the folder"),
)
# what Pillow's decoders raise on damaged bytes; MemoryError says nothing about the file
DAMAGED_IMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error, zlib.error)


class ImageError(ValueError):
    """An image or caption file cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class ImageRules:
    """max_pixels: the largest width x height, checked before any pixel is decoded; min_side: the
    least width and height in pixels; background: RGB 0-255, shown through transparent pixels."""

    max_pixels: int = MAX_PIXELS
    min_side: int = MIN_SIDE
    background: tuple[int, int, int] = (255, 255, 255)


RULES = ImageRules()


def read_image(path: str | Path, rules: ImageRules = RULES) -> Image.Image:
    """Reads one still image as an upright 8-bit RGB image: a JPEG, PNG or WebP, or a BMP, TIFF or
    HEIC of such a name.

    EXIF orientation is applied. CMYK, palette, grey and 16-bit files become RGB; an embedded RGB
    or CMYK colour profile is converted to sRGB.

    Raises:
        ImageError: missing, empty, truncated or damaged file, other format, animation, too large,
            too small.
        ModuleNotFoundError: a HEIC, and pillow-heif is not installed.
    """
    path = Path(path)
    return _decode(path, name=path, rules=rules, formats=formats_of(path))


def formats_of(path: Path) -> tuple[str, ...]:
    """The formats that a file may have, as Pillow calls them, by its name and its first bytes;
    raises as `read_image` for another one."""
    head = _head(path)
    if (other := other_format(path, head)) is not None:
        return (other,)
    _check_signature(path, head)
    return FORMATS


def decode_image(data: bytes, name: str, rules: ImageRules = RULES) -> Image.Image:
    """Decodes the bytes of a JPEG, PNG or WebP, as `read_image`; `name` is its name in errors."""
    _check_signature(name, data[:32])
    return _decode(io.BytesIO(data), name=name, rules=rules, formats=FORMATS)


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of a photo after EXIF rotation, read from its header."""
    with Image.open(path, formats=formats_of(path)) as image:
        width, height = image.size
        # Pillow turns a TIFF itself
        turned = image.format != "TIFF" and image.getexif().get(0x0112) in TURNED
    return (height, width) if turned else (width, height)


def to_tensor(image: Image.Image) -> Tensor:
    """Turns an RGB image into a float32 tensor (3, height, width) in [-1, 1].

    Raises:
        ValueError: the image is not RGB; a conversion here could silently clip a 16-bit image.
    """
    return in_range(to_bytes(image))


def to_bytes(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, height, width), a fourth of the bytes, its channels adjacent as in
    the image. It is for reading alone: no copy is made. Raises as `to_tensor`."""
    import torch

    if image.mode != "RGB":
        raise ValueError(f"to_tensor takes an RGB image, got mode {image.mode}; use read_image")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(image)).permute(2, 0, 1)  # of h w 3


def in_range(pixels: Tensor) -> Tensor:
    """uint8 (..., 3, height, width) as float32 in [-1, 1]."""
    return (pixels.float() / 127.5 - 1.0).contiguous()


def to_pil(tensor: Tensor) -> Image.Image:
    """Turns a float tensor (3, height, width) in [-1, 1] into an RGB image; inverse of `to_tensor`.

    Values outside [-1, 1] are clamped; NaN becomes black.

    Raises:
        ValueError: other shape, or not a floating tensor.
    """
    if tensor.ndim != 3 or tensor.shape[0] != 3 or not tensor.is_floating_point():
        got = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"to_pil takes one float tensor (3, height, width), got {got}")
    pixels = tensor.detach().float().nan_to_num(nan=-1.0).clamp(-1.0, 1.0)
    pixels = ((pixels + 1.0) * 127.5).round().byte().permute(1, 2, 0)  # h w 3
    return Image.fromarray(pixels.cpu().contiguous().numpy())


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scales the picture until it covers `size`, width and height (Lanczos), and cuts out the
    centre. Only the part that is kept is computed, so a very long image needs no more memory."""
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def resize_cover(image: Image.Image, size: int) -> Image.Image:
    """`cover` of a square with sides of `size` pixels."""
    return cover(image, (size, size))


def _head(path: Path) -> bytes:
    if not path.exists():
        raise ImageError(f"{path}: no such file; check the name and, if it is a link, its target")
    if not path.is_file():
        raise ImageError(f"{path}: this is not a file; give the path of one image")
    try:
        with path.open("rb") as file:
            return file.read(32)
    except OSError as error:
        raise ImageError(f"{path}: cannot be opened ({error}); check its permissions") from error


def _check_signature(name: str | Path, head: bytes) -> None:
    if not head:
        raise ImageError(f"{name}: the file is empty; copy it again from its source")
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG")) or head[8:12] == b"WEBP":
        return
    reason = next(text for at, magic, text in FOREIGN if head[at:].startswith(magic))
    raise ImageError(f"{name}: {reason}")


def _decode(
    source: Path | io.BytesIO, *, name: str | Path, rules: ImageRules, formats: tuple[str, ...]
) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns above its own limit; the check below raises an error above ours
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source, formats=formats)
        with image:
            _check_header(name, image, rules)
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image, rules.background)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        if formats == FORMATS:
            raise ImageError(f"{name}: truncated or damaged ({error}); {COPY_IMAGE}") from error
        raise ImageError(
            f"{name}: damaged, or a kind of {formats[0]} that is not read; {CONVERT_IMAGE}"
        ) from error
    except Image.DecompressionBombError as error:
        # raised before the size can be read; the first number in Pillow's message is the pixels
        pixels = int(re.findall(r"\d+", str(error))[0])
        raise _too_large(name, pixels, rules.max_pixels) from error
    except DAMAGED_IMAGE as error:
        raise ImageError(f"{name}: truncated or damaged ({error}); {COPY_IMAGE}") from error


def _check_header(name: str | Path, image: Image.Image, rules: ImageRules) -> None:
    width, height = image.size
    if width * height > rules.max_pixels:
        raise _too_large(name, width * height, rules.max_pixels)
    if min(width, height) < rules.min_side:
        raise ImageError(
            f"{name}: {width}x{height} pixels, each side must have at least {rules.min_side}; "
            "use a larger version of the image"
        )
    if image.mode == "F":
        raise ImageError(f"{name}: numbers with a fraction, not 8 or 16 bits; {CONVERT_IMAGE}")
    # MPO is a JPEG with a second picture (stereo, gain map), as phones write it: no animation
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ImageError(f"{name}: an animated {image.format}; {EXPORT}")


def _too_large(name: str | Path, pixels: int, max_pixels: int) -> ImageError:
    return ImageError(
        f"{name}: {pixels:,} pixels, the limit is {max_pixels:,}; make the image smaller"
    )


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    # a grey profile is ignored: it is a tone curve, and close to that of sRGB
    if profile and image.mode in ("RGB", "RGBA", "CMYK"):
        image = _to_srgb(image, profile)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits; Pillow's own conversion clips at 255, which gives white."""
    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode=mode)
    except (ImageCms.PyCMSError, OSError):
        # the profile is broken or belongs to another mode: viewers ignore it, too
        return image
    assert converted is not None
    return converted
