"""Every kind of file that a user's folder may hold: what is read, and what refusal says."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from trainer.media import images
from trainer.media.images import ImageError, ImageRules, read_image
from trainer.media.photo_folder import list_images, read_folder
from trainer.media.read_caption import read_caption

RED, GREEN, BLUE, GREY = (220, 20, 30), (20, 200, 40), (30, 40, 210), (128, 128, 128)
Pixel = tuple[int, int, int]


def quadrants(width: int = 48, height: int = 32) -> Image.Image:
    """Red top left, green top right, blue bottom left, grey bottom right."""
    image = Image.new("RGB", (width, height), GREY)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def assert_near(image: Image.Image, at: tuple[int, int], colour: Pixel, within: int = 12) -> None:
    got = image.getpixel(at)
    assert isinstance(got, tuple)
    assert max(abs(a - b) for a, b in zip(got, colour, strict=True)) <= within, (got, colour)


def assert_quadrants(image: Image.Image) -> None:
    assert (image.mode, image.size) == ("RGB", (48, 32))
    for at, colour in (((8, 6), RED), ((40, 6), GREEN), ((8, 26), BLUE), ((40, 26), GREY)):
        assert_near(image, at, colour)


def chunk(name: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def png(width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def refusal(path: Path, max_pixels: int = images.MAX_PIXELS) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path, ImageRules(max_pixels=max_pixels))
    assert str(path) in str(caught.value)
    return str(caught.value)


UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = quadrants()
    if orientation in UNDO:
        stored = stored.transpose(UNDO[orientation])
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    assert_quadrants(read_image(tmp_path / "a.jpg"))


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.JPG", "really_a_png.jpg"])
def test_plain_files_are_read_by_content(tmp_path: Path, name: str) -> None:
    kind = "PNG" if "png" in name else None
    quadrants().save(tmp_path / name, kind, quality=95)
    assert_quadrants(read_image(tmp_path / name))


def test_alpha_is_composited_over_the_background(tmp_path: Path) -> None:
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 8, 16))
    image.paste((0, 0, 0, 128), (8, 0, 16, 8))
    for suffix in ("png", "webp"):
        path = tmp_path / f"a.{suffix}"
        image.save(path, lossless=True)
        white = read_image(path)
        assert white.mode == "RGB"
        assert white.getpixel((2, 12)) == (200, 0, 0)
        assert white.getpixel((12, 12)) == (255, 255, 255)
        assert_near(white, (12, 4), (127, 127, 127), within=1)
        assert read_image(path, ImageRules(background=(9, 8, 7))).getpixel((12, 12)) == (9, 8, 7)


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = quadrants().quantize(4)
    image.save(tmp_path / "plain.png")
    assert_quadrants(read_image(tmp_path / "plain.png"))
    index = image.getpixel((8, 6))
    assert isinstance(index, int)
    image.save(tmp_path / "clear.png", transparency=index)
    read = read_image(tmp_path / "clear.png")
    assert read.getpixel((8, 6)) == (255, 255, 255)
    assert_near(read, (8, 26), BLUE)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    quadrants().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.mode == "CMYK"
    assert_quadrants(read_image(tmp_path / "a.jpg"))


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    read = np.asarray(read_image(tmp_path / "a.png"))
    np.testing.assert_array_equal(read[..., 0], np.arange(256).reshape(16, 16))
    np.testing.assert_array_equal(read[..., 0], read[..., 2])


def test_16_bit_grey_with_a_transparent_value(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + struct.pack(">16H", *([1000] * 8 + [257 * 40] * 8)) for _ in range(16))
    clear = chunk(b"tRNS", struct.pack(">H", 1000))
    (tmp_path / "a.png").write_bytes(png(16, 16, 16, 0, rows, clear))
    read = read_image(tmp_path / "a.png")
    assert (read.getpixel((2, 2)), read.getpixel((12, 2))) == ((255, 255, 255), (40, 40, 40))


def test_colour_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # The first mention of a tag is its entry in the table: red and blue primaries change places.
    swapped = profile.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1)
    swapped = swapped.replace(b"????", b"bXYZ", 1)
    quadrants().save(tmp_path / "a.png", icc_profile=swapped)
    assert_near(read_image(tmp_path / "a.png"), (8, 6), (RED[2], RED[1], RED[0]))
    quadrants().save(tmp_path / "same.png", icc_profile=profile)
    assert_quadrants(read_image(tmp_path / "same.png"))
    quadrants().save(tmp_path / "broken.png", icc_profile=b"no profile at all")
    assert_quadrants(read_image(tmp_path / "broken.png"))


def test_second_picture_in_a_jpeg_is_no_animation(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    second = Image.new("RGB", (48, 32))
    quadrants().save(path, "MPO", save_all=True, append_images=[second], quality=95)
    assert_quadrants(read_image(path))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations_are_refused(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, BLUE)]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    message = refusal(path)
    assert "animat" in message
    assert "export one frame" in message


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refusal(path)
    assert "truncated or damaged" in message
    assert "copy it again" in message


@pytest.mark.parametrize(("width", "height"), [(10000, 8000), (10000, 10000), (30000, 30000)])
@pytest.mark.filterwarnings("error")
def test_decompression_bomb_is_refused(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, 8, 2, b"\0" * 1000))
    message = refusal(path)
    assert f"{width * height:,} pixels" in message
    assert "the limit is 64,000,000" in message
    assert "make the image smaller" in message


def test_sizes_at_the_limits(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    message = refusal(tmp_path / "dot.png")
    assert "1x1" in message
    assert "16" in message
    assert read_image(tmp_path / "dot.png", ImageRules(min_side=1)).size == (1, 1)
    quadrants().save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", ImageRules(max_pixels=48 * 32)).size == (48, 32)
    assert "1,536 pixels" in refusal(tmp_path / "a.png", max_pixels=48 * 32 - 1)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"this is no image, whatever its name says", "not a readable image"),
        (b"", "empty"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "AVIF"),
        (b"\0\0\0\x20ftypisom\0\0\0\0", "export one frame"),
        (b"II*\0\x08\0\0\0", "TIFF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\xff\xd8\xff", "truncated or damaged"),
    ],
)
def test_other_content_named_jpg_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    assert says in refusal(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.jpg")
    assert "not a file" in refusal(tmp_path)


def test_captions(tmp_path: Path) -> None:
    image = tmp_path / "cat.jpg"
    assert read_caption(image) is None
    for data in ("  a café cat\n".encode(), b"\xef\xbb\xbf" + "a café cat".encode()):
        (tmp_path / "cat.txt").write_bytes(data)
        assert read_caption(image) == "a café cat"
    (tmp_path / "cat.txt").write_bytes(b" \n")
    assert read_caption(image) == ""
    (tmp_path / "DOG.TXT").write_text("a dog")
    assert read_caption(tmp_path / "DOG.jpg") == "a dog"


@pytest.mark.parametrize(
    ("data", "offset"),
    [("a café".encode("latin-1"), 5), ("a cat".encode("utf-16"), 0), (b"\xef\xbb\xbfab\xff", 5)],
)
def test_caption_that_is_not_utf8_is_refused(tmp_path: Path, data: bytes, offset: int) -> None:
    (tmp_path / "cat.txt").write_bytes(data)
    with pytest.raises(ImageError, match=rf"cat\.txt.*byte {offset}; save it as UTF-8"):
        read_caption(tmp_path / "cat.jpg")


def test_16_bit_values_are_rounded_to_the_nearest(tmp_path: Path) -> None:
    values = np.full((16, 16), 257 * 100 + 130, np.uint16)  # 100.506 of 255
    Image.fromarray(values).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((3, 3)) == (101, 101, 101)


def test_capital_letters_do_not_change_the_order(tmp_path: Path) -> None:
    for name in ("b.png", "A.png", "C.png"):
        quadrants().save(tmp_path / name)
    assert [path.name for path in list_images(tmp_path)] == ["A.png", "b.png", "C.png"]


def test_list_images_order_and_choice(tmp_path: Path) -> None:
    listed = ["1.png", "2.JPG", "10.webp", "a.gif", "b.HEIC", "img2.jpeg", "img10.jpeg"]
    for name in [*reversed(listed), ".hidden.jpg", "2.txt", "notes.md", "data.json"]:
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert [path.name for path in list_images(tmp_path)] == listed


def test_broken_link_is_listed_and_refused(tmp_path: Path) -> None:
    try:
        os.symlink(tmp_path / "gone.jpg", tmp_path / "link.jpg")
    except OSError:
        pytest.skip("no symbolic links here")
    assert list_images(tmp_path) == [tmp_path / "link.jpg"]
    assert "target" in refusal(tmp_path / "link.jpg")


def test_folders_that_cannot_be_listed(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.touch()
    cases = ((tmp_path / "none", "no such folder"), (file, "is a file"), (tmp_path, "no image"))
    for folder, says in cases:
        with pytest.raises(ValueError, match=f"{folder.name}: .*{says}.*expected a folder"):
            list_images(folder)


def test_read_folder_raise_and_skip(tmp_path: Path) -> None:
    quadrants().save(tmp_path / "2.png")
    quadrants(40, 64).save(tmp_path / "10.jpg")
    (tmp_path / "2.txt").write_text("a flag")
    photos, skipped = read_folder(tmp_path)
    assert [(p.path.name, p.image.size, p.captions) for p in photos] == [
        ("2.png", (48, 32), ("a flag",)),
        ("10.jpg", (40, 64), ()),
    ]
    assert skipped == []
    assert {photo.image.size for photo in read_folder(tmp_path, size=24)[0]} == {(24, 24)}

    (tmp_path / "3.gif").write_bytes(b"GIF89a")
    (tmp_path / "10.txt").write_bytes(b"\xff")
    with pytest.raises(ImageError, match=r"(?s)2 of 3.*3\.gif.*10\.txt"):
        read_folder(tmp_path)
    photos, skipped = read_folder(tmp_path, on_bad="skip")
    assert [photo.path.name for photo in photos] == ["2.png"]
    assert [path.name for path, _ in skipped] == ["3.gif", "10.jpg"]
    assert "export one frame" in skipped[0][1]

    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match=r"(?s)2 of 2.*3\.gif.*10\.txt"):
        read_folder(tmp_path, on_bad="skip")
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        read_folder(tmp_path, on_bad="ignore")  # type: ignore[arg-type]


def test_tensor_round_trip_and_refusals() -> None:
    import torch

    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = images.to_tensor(Image.fromarray(noise))
    assert (tensor.shape, tensor.dtype) == ((3, 5, 7), torch.float32)
    assert -1.0 <= float(tensor.min()) <= float(tensor.max()) <= 1.0
    np.testing.assert_array_equal(np.asarray(images.to_pil(tensor)), noise)
    wild = torch.tensor([-9.0, float("nan"), 9.0]).view(3, 1, 1).bfloat16()
    assert images.to_pil(wild).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(ValueError, match="mode L; use read_image"):
        images.to_tensor(Image.new("L", (4, 4)))
    for bad in (torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="one float tensor"):
            images.to_pil(bad)


def test_resize_cover_cuts_the_centre() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 90, 3), dtype=np.uint8)
    wide, tall = Image.fromarray(noise), Image.fromarray(noise.swapaxes(0, 1).copy())
    scaled = wide.resize((60, 20), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(images.resize_cover(wide, 20), scaled.crop((20, 0, 40, 20)))
    assert images.resize_cover(tall, 20).size == (20, 20)
    assert images.resize_cover(Image.new("RGB", (4_000_000, 1)), 16).size == (16, 16)


def test_importing_the_module_does_not_import_torch() -> None:
    code = (
        "import sys, trainer.media.images, trainer.data.augment; sys.exit('torch' in sys.modules)"
    )
    root = Path(images.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
