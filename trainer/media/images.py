"""Image files from users: the one place where they are opened, checked and turned into tensors.

Everything a user can put into a folder ends here either as an upright 8-bit sRGB image or as an
`ImageError` that names the file and says what to do. What a file is, its content decides and not
its name. torch is imported only by the functions that need it.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 64_000_000
MIN_SIDE = 16
FORMATS = ("JPEG", "PNG", "WEBP")
READABLE_IMAGES = frozenset((".jpg", ".jpeg", ".png", ".webp"))
# Listed so that reading refuses them by name: a photo must not vanish from a folder in silence.
ANIMATED_OR_WEB = (".gif", ".apng", ".heic", ".heif", ".avif", ".jxl", ".svg", ".ico", ".jfif")
EDITED_OR_RAW = (".bmp", ".tif", ".tiff", ".jp2", ".mpo", ".psd", ".dng", ".cr2", ".nef", ".arw")
LISTED_IMAGES = READABLE_IMAGES.union(ANIMATED_OR_WEB, EDITED_OR_RAW)
CONVERT_IMAGE = "convert it to JPEG, PNG or WebP"
EXPORT = "export one frame as JPEG, PNG or WebP"
# (offset, first bytes, what to say): files that are often met in folders of photos.
FOREIGN = (
    (0, b"GIF8", f"a GIF, a format for animations; {EXPORT}"),
    (0, b"BM", f"BMP is not read; {CONVERT_IMAGE}"),
    (0, b"II*\0", f"TIFF and camera raw are not read; {CONVERT_IMAGE}"),
    (0, b"MM\0*", f"TIFF and camera raw are not read; {CONVERT_IMAGE}"),
    (4, b"ftypavi", f"AVIF is not read; {CONVERT_IMAGE}"),
    (4, b"ftyphe", f"HEIC is not read; {CONVERT_IMAGE}"),
    (4, b"ftypmif1", f"HEIC is not read; {CONVERT_IMAGE}"),
    (4, b"ftyp", f"a video; {EXPORT}"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the image; run `git lfs pull`"),
    (0, b"", f"not an image that can be read; {CONVERT_IMAGE}, or remove it from the folder"),
)
# What Pillow's decoders raise on damaged bytes; not MemoryError, which is no verdict on a file.
DAMAGED_IMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error, zlib.error)


class ImageError(ValueError):
    """An image or caption file cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Photo:
    """One photo of a folder: RGB `image`, and the text of its caption file or None without one."""

    path: Path
    image: Image.Image
    caption: str | None


def read_image(
    path: str | Path,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """Read one JPEG, PNG or WebP still as an upright 8-bit RGB image.

    EXIF orientation is applied. Transparency is composited over `background` (RGB 0-255), white
    unless told otherwise. CMYK, palette, grey and 16-bit files become RGB; an embedded RGB or CMYK
    colour profile is converted to sRGB. `max_pixels` bounds width x height and is checked before
    any pixel is decoded; `min_side` bounds width and height from below, in pixels.

    Raises:
        ImageError: missing, empty, truncated or damaged file, other format, animation, too large,
            too small.
    """
    path = Path(path)
    _check_signature(path, _head(path))
    return _decode(path, path, max_pixels, min_side, background)


def decode_image(
    data: bytes,
    name: str,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """Decode the bytes of an image file, as `read_image` does; `name` stands for it in errors."""
    _check_signature(name, data[:32])
    return _decode(io.BytesIO(data), name, max_pixels, min_side, background)


def read_caption(path: str | Path) -> str | None:
    """Read the caption beside an image: `cat.txt` for `cat.jpg`, UTF-8 with or without BOM.

    Returns the text without white space around it (an empty file gives ""), None without a file.

    Raises:
        ImageError: the text is not UTF-8; names the file and the offset of the first wrong byte.
    """
    candidates = [Path(path).with_suffix(suffix) for suffix in (".txt", ".TXT")]
    caption_path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if caption_path is None:
        return None
    return decode_caption(caption_path.read_bytes(), caption_path)


def decode_caption(data: bytes, name: str | Path) -> str:
    """The text of a caption file, see `read_caption`; `name` stands for the file in errors."""
    try:
        # Not "utf-8-sig": it would count the offset of an error from behind the BOM.
        return data.decode("utf-8").removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        where = f"{name}: not UTF-8 at byte {error.start}"
        raise ImageError(f"{where}; save it as UTF-8") from error


def list_images(folder: str | Path) -> list[Path]:
    """List the image files of a folder, not of its subfolders, in natural order (2 before 10).

    Files of image formats that cannot be read (GIF, HEIC, ...) are listed too, so that reading
    refuses them by name. Hidden files, captions and other files are left out.

    Raises:
        ValueError: the folder is missing, is a file, or holds no image.
    """
    folder = Path(folder)
    expected = f"expected a folder with images ({', '.join(sorted(READABLE_IMAGES))})"
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; {expected}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: this is a file; {expected}, give the folder that holds it")
    paths = [path for path in folder.iterdir() if _is_listed(path)]
    if not paths:
        raise ValueError(f"{folder}: no image in this folder; {expected}, subfolders are not read")
    return sorted(paths, key=natural)


def read_folder(
    folder: str | Path,
    on_bad: Literal["raise", "skip"] = "raise",
    size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    background: tuple[int, int, int] = (255, 255, 255),
) -> tuple[list[Photo], list[tuple[Path, str]]]:
    """Read all images of a folder with their captions, in natural order.

    A bad image or caption ends in one error that lists all of them, or with `on_bad="skip"` is
    left out. `size` cuts each image by `resize_cover` while reading, so that a folder of large
    photos fits in memory. The other options are those of `read_image`.

    Returns the photos, and `(path, reason)` for each file skipped.

    Raises:
        ImageError: a bad file with "raise", or nothing but bad files with "skip".
        ValueError: see `list_images`; `on_bad` is neither "raise" nor "skip".
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad={on_bad!r}: choose 'raise' or 'skip'")
    photos: list[Photo] = []
    skipped: list[tuple[Path, str]] = []
    for path in list_images(folder):
        try:
            image = read_image(path, max_pixels, min_side, background)
            caption = read_caption(path)
        except ImageError as error:
            skipped.append((path, str(error)))
            continue
        photos.append(Photo(path, image if size is None else resize_cover(image, size), caption))
    if skipped and (on_bad == "raise" or not photos):
        reasons = "\n".join(reason for _, reason in skipped)
        of = len(photos) + len(skipped)
        raise ImageError(f"{folder}: {len(skipped)} of {of} images cannot be used:\n{reasons}")
    return photos, skipped


def to_tensor(image: Image.Image) -> Tensor:
    """Turn an RGB image into a float32 tensor (3, height, width) in [-1, 1].

    Raises:
        ValueError: the image is not RGB; converting here could clip a 16-bit image in silence.
    """
    import torch

    if image.mode != "RGB":
        raise ValueError(f"to_tensor takes an RGB image, got mode {image.mode}; use read_image")
    pixels = torch.from_numpy(np.array(image))  # h w 3
    return (pixels.permute(2, 0, 1).float() / 127.5 - 1.0).contiguous()


def to_pil(tensor: Tensor) -> Image.Image:
    """Turn a float tensor (3, height, width) in [-1, 1] into an RGB image; inverse of `to_tensor`.

    Values outside are clamped; NaN becomes black.

    Raises:
        ValueError: other shape, or not a floating tensor.
    """
    if tensor.ndim != 3 or tensor.shape[0] != 3 or not tensor.is_floating_point():
        got = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"to_pil takes one float tensor (3, height, width), got {got}")
    pixels = tensor.detach().float().nan_to_num(nan=-1.0).clamp(-1.0, 1.0)
    pixels = ((pixels + 1.0) * 127.5).round().byte().permute(1, 2, 0)  # h w 3
    return Image.fromarray(pixels.cpu().contiguous().numpy())


def resize_cover(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to `size` pixels (Lanczos) and cut out the centre, size x size.

    Only the part that stays is computed: a long thin image, scaled as a whole, would need memory
    without bound.
    """
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


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
    reason = next(say for at, magic, say in FOREIGN if head[at:].startswith(magic))
    raise ImageError(f"{name}: {reason}")


def _decode(
    source: Path | io.BytesIO,
    name: str | Path,
    max_pixels: int,
    min_side: int,
    background: tuple[int, int, int],
) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns above a limit of its own; ours is checked right below and is an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source, formats=FORMATS)
        with image:
            _check_header(name, image, max_pixels, min_side)
            return _to_rgb(ImageOps.exif_transpose(image), background)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        # Raised before the size is ours to read; Pillow's sentence opens with the pixel count.
        raise _too_large(name, int(re.findall(r"\d+", str(error))[0]), max_pixels) from error
    except DAMAGED_IMAGE as error:
        mend = "copy it again from its source or export it anew"
        raise ImageError(f"{name}: truncated or damaged ({error}); {mend}") from error


def _check_header(name: str | Path, image: Image.Image, max_pixels: int, min_side: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(name, width * height, max_pixels)
    if min(width, height) < min_side:
        raise ImageError(
            f"{name}: {width}x{height} pixels, each side must have at least {min_side}; "
            "use a larger version of the image"
        )
    # MPO is a JPEG with a second picture (stereo, gain map), as phones write it: a still.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ImageError(f"{name}: an animated {image.format}; {EXPORT}")


def _too_large(name: str | Path, pixels: int, max_pixels: int) -> ImageError:
    mend = "shrink the image, or raise max_pixels if you trust the file"
    return ImageError(f"{name}: {pixels:,} pixels, the limit is {max_pixels:,}; {mend}")


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    # A grey profile is passed over: it is a tone curve, and close to that of sRGB.
    if profile and image.mode in ("RGB", "RGBA", "CMYK"):
        image = _to_srgb(image, profile)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion clips at 255 and gives white."""
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
        # A profile that is broken or belongs to another mode: show the pixels as viewers do.
        return image
    assert converted is not None
    return converted


def _is_listed(path: Path) -> bool:
    hidden = path.name.startswith(".")
    # Not `is_file`: a broken link named like an image is an image that is missing.
    return not hidden and path.suffix.lower() in LISTED_IMAGES and not path.is_dir()


def natural(path: Path) -> tuple[list[str | int], str]:
    """Sorts names as people count, 2 before 10."""
    parts = re.split(r"([0-9]+)", path.name.casefold())  # every second part is a number
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name
