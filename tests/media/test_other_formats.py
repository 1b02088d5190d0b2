"""BMP, TIFF and HEIC are read by their own names, and no other file starts their decoders."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.media.images import ImageError, decode_image, read_image, upright_size
from trainer.media.photo_folder import list_images

NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
TURNED = 0x0112  # the EXIF entry of a camera's orientation


def saved(path: Path, picture: Any = NOISE, **options: Any) -> Path:
    Image.fromarray(picture).save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.bmp", "a.tif", "a.TIFF"])
def test_pixels_come_back(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / name)
    np.testing.assert_array_equal(np.asarray(read_image(path)), NOISE)
    assert upright_size(path) == (40, 24)
    assert list_images(tmp_path) == [path]


def test_kinds_of_tiff(tmp_path: Path) -> None:
    deep = saved(tmp_path / "deep.tif", np.full((16, 16), 257 * 100, np.uint16))
    assert read_image(deep).getpixel((3, 3)) == (100, 100, 100)
    clear = Image.new("RGBA", (20, 20), (9, 9, 9, 0))
    clear.save(tmp_path / "clear.tif")
    assert read_image(tmp_path / "clear.tif").getpixel((3, 3)) == (255, 255, 255)
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert read_image(tmp_path / "cmyk.tif").getpixel((3, 3)) == (255, 0, 0)
    exif = Image.Exif()
    exif[TURNED] = 6
    turned = saved(tmp_path / "turned.tif", exif=exif, compression="tiff_lzw")
    assert read_image(turned).size == upright_size(turned) == (24, 40)


@pytest.mark.parametrize("name", ["a.bmp", "a.tif"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=rf"{name}: (truncated or )?damaged"):
        read_image(path)


def test_kinds_that_are_not_read_are_named(tmp_path: Path) -> None:
    pages = [Image.fromarray(NOISE)] * 2
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    saved(tmp_path / "float.tif", np.zeros((20, 20), np.float32))
    (tmp_path / "large.bmp").write_bytes(bmp_header(30_000, 30_000))
    for name, says in (
        ("pages.tif", "export one frame"),
        ("float.tif", "numbers with a fraction"),
        ("large.bmp", "900,000,000 pixels, the limit is 64,000,000"),
    ):
        with pytest.raises(ImageError, match=says):
            read_image(tmp_path / name)


def bmp_header(width: int, height: int) -> bytes:
    sizes = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    head = b"BM" + (54 + width * height * 3).to_bytes(4, "little") + bytes(4)
    return (
        head
        + (54).to_bytes(4, "little")
        + (40).to_bytes(4, "little")
        + sizes
        + (b"\1\0\x18\0" + bytes(24))
    )


@pytest.mark.parametrize(("kind", "says"), [("BMP", r"\.bmp; rename"), ("TIFF", r"\.tif; rename")])
def test_by_another_name_no_decoder_is_started(
    tmp_path: Path, kind: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.jpg", kind)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("a decoder was started"))
    with pytest.raises(ImageError, match=says):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match=says):  # a member of a tar, whatever it is called
        decode_image((tmp_path / "a.jpg").read_bytes(), "a.bmp")


def test_a_png_called_bmp_is_a_png(tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.bmp", "PNG")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.bmp")), NOISE)


def test_heic_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"a\.heic: .*install 'attention-trainer\[heic\]'"
    ):
        read_image(path)


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is None, reason="the extra heic")
def test_heic_is_read_upright(tmp_path: Path) -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()
    block = np.zeros((64, 96, 3), np.uint8)
    block[:, :48] = (200, 30, 30)
    exif = Image.Exif()
    exif[TURNED] = 6
    path = saved(tmp_path / "a.HEIC", block, format="HEIF", quality=95, exif=exif.tobytes())
    found = read_image(path)
    assert found.size == upright_size(path) == (64, 96)
    top, bottom = np.asarray(found, int)[:48], np.asarray(found, int)[48:]
    assert abs(top[8:40, 8:-8] - (200, 30, 30)).max() < 12 and bottom[8:-8].max() < 12
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"a\.HEIC: (truncated or )?damaged"):
        read_image(path)
