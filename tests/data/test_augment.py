"""Resize augmentation: mask, caption and pixels agree; scales fall as in the official code."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data import augment
from trainer.data.augment import CLOSE_PREFIXES, FAR_PREFIXES, draw_scale, resize_augment
from trainer.data.caption_templates import TEMPLATES, render
from trainer.data.crops import Crop
from trainer.media.images import resize_cover, to_tensor

SIZE, DIVISOR = 64, 4
# No pixel of it is 0, the value of the empty canvas.
WHITE = Image.new("RGB", (50, 40), (255, 255, 255))


def noise_image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def at_scale(monkeypatch: pytest.MonkeyPatch, scale: int) -> None:
    monkeypatch.setattr(augment, "draw_scale", lambda *_: scale)


@pytest.mark.parametrize(("size", "divisor"), [(64, 4), (64, 8), (96, 16), (63, 3)])
def test_mask_covers_only_pixels_of_the_photo(size: int, divisor: int) -> None:
    rng, kinds = random.Random(0), set()
    for _ in range(150):
        pixels, caption, mask, _ = resize_augment(
            WHITE, "cat", size=size, mask_divisor=divisor, rng=rng
        )
        assert pixels.shape == (3, size, size)
        assert mask.shape == (1, size // divisor, size // divisor)
        assert (pixels.dtype, mask.dtype) == (torch.float32, torch.float32)
        real = (pixels[0] == 1.0).float()
        covered = -torch.nn.functional.max_pool2d(-real[None], divisor)  # 1 where all are real
        assert mask.sum() > 0
        assert bool((mask <= covered).all())
        kinds.add(caption)
        if caption.startswith(FAR_PREFIXES):
            # Conservative: the outermost fully covered cells are left out.
            assert 0.0 < mask.sum() < covered.sum()
        else:
            assert bool((mask == 1.0).all())
    assert kinds == {"cat"} | {prefix + "cat" for prefix in FAR_PREFIXES + CLOSE_PREFIXES}


def test_mask_of_the_official_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    at_scale(monkeypatch, 30)
    pixels, _, mask, _ = resize_augment(
        WHITE, "cat", size=SIZE, mask_divisor=DIVISOR, rng=random.Random(3)
    )
    rows = torch.nonzero(pixels[0].amax(1)).flatten()
    columns = torch.nonzero(pixels[0].amax(0)).flatten()
    assert (len(rows), len(columns)) == (30, 30)
    naive = np.zeros((1, SIZE // DIVISOR, SIZE // DIVISOR))
    top, left = int(rows[0]), int(columns[0])
    for y in range(top // 4 + 1, (top + 30) // 4 - 1):
        for x in range(left // 4 + 1, (left + 30) // 4 - 1):
            naive[0, y, x] = 1
    np.testing.assert_array_equal(mask.numpy(), naive)


def test_pasted_and_cropped_pixels_are_those_of_the_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise_image()
    at_scale(monkeypatch, 24)
    pixels, _, _, part = resize_augment(
        image, "cat", size=SIZE, mask_divisor=DIVISOR, rng=random.Random(0)
    )
    assert part == (SIZE, SIZE, 0, 0, SIZE, SIZE)
    patches = pixels.unfold(1, 24, 1).unfold(2, 24, 1)  # 3 y x 24 24
    small = to_tensor(resize_cover(image, 24))[:, None, None]
    assert int((patches == small).all(dim=(0, 3, 4)).sum()) == 1

    at_scale(monkeypatch, 80)
    pixels, _, _, part = resize_augment(
        image, "cat", size=SIZE, mask_divisor=DIVISOR, rng=random.Random(0)
    )
    windows = to_tensor(resize_cover(image, 80)).unfold(1, SIZE, 1).unfold(2, SIZE, 1)
    ((top, left),) = torch.nonzero((windows == pixels[:, None, None]).all(dim=(0, 3, 4))).tolist()
    # 80 by 60 pixels are scaled to 107 by 80, and 13 columns left out on both sides
    assert part == (60, 80, top, 13 + left, SIZE, SIZE)

    at_scale(monkeypatch, 50)
    pixels, caption, _, part = resize_augment(
        image, "a cat", size=SIZE, mask_divisor=DIVISOR, rng=random.Random(0), shape=(160, 120)
    )
    assert torch.equal(pixels, to_tensor(resize_cover(image, SIZE)))
    assert caption == "a cat"
    assert part == (120, 160, 0, 11, SIZE, SIZE)


def test_scale_distribution() -> None:
    rng, size, count = np.random.default_rng(0), 512, 20_000
    scales = np.array([draw_scale(size, 8, rng) for _ in range(count)])
    close, far = scales > size, scales < 0.6 * size
    assert abs(close.mean() - 1 / 3) < 0.015
    assert (scales[close].min(), scales[close].max()) == (614, 715)
    assert (scales[~close].min(), scales[~close].max()) == (170, 512)
    # 170, ..., 307 of 170, ..., 512, with probability 2/3.
    assert abs(far.mean() - 2 / 3 * 138 / 343) < 0.015
    assert abs(scales[~close].mean() - 341) < 4


@pytest.mark.parametrize(
    ("scale", "prefixes"),
    [(38, FAR_PREFIXES), (39, ()), (64, ()), (76, CLOSE_PREFIXES), (88, CLOSE_PREFIXES)],
)
def test_prefix_agrees_with_scale(
    monkeypatch: pytest.MonkeyPatch, scale: int, prefixes: tuple[str, ...]
) -> None:
    at_scale(monkeypatch, scale)
    rng = random.Random(0)
    captions = {
        resize_augment(WHITE, "A photo of a cat", size=SIZE, mask_divisor=4, rng=rng)[1]
        for _ in range(20)
    }
    assert captions == ({p + "photo of a cat" for p in prefixes} or {"A photo of a cat"})


@pytest.mark.parametrize("make", [random.Random, np.random.default_rng])
def test_same_seed_same_result(make: type[random.Random]) -> None:
    def draw(seed: int) -> list[tuple[torch.Tensor, str, torch.Tensor, Crop]]:
        rng = make(seed)
        return [
            resize_augment(noise_image(), "cat", size=SIZE, mask_divisor=4, rng=rng, hflip=True)
            for _ in range(6)
        ]

    for first, second in zip(draw(5), draw(5), strict=True):
        assert torch.equal(first[0], second[0])
        assert first[1] == second[1]
        assert torch.equal(first[2], second[2])
        assert first[3] == second[3]
    others = zip(draw(5), draw(6), strict=True)
    assert not all(torch.equal(first[0], second[0]) for first, second in others)


def test_the_share_of_shrunk_photos_is_that_of_the_official_code() -> None:
    assert augment.SMALL_PROBABILITY == 2 / 3
    rng = np.random.default_rng(3)
    scales = np.array([draw_scale(512, 8, rng) for _ in range(200_000)])
    assert abs((scales <= 512).mean() - 2 / 3) < 0.003  # 0.66, as in diffusers' script, is farther


def test_a_crop_lies_where_the_two_numbers_after_the_scale_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_scale(monkeypatch, 80)
    numbers = iter([0.9, 0.1, 0.0])  # top, left, prefix
    rng = SimpleNamespace(random=lambda: next(numbers))
    found, _, _, _ = resize_augment(noise_image(), "", size=SIZE, mask_divisor=4, rng=rng)
    top, left = int(0.9 * 17), int(0.1 * 17)
    whole = to_tensor(resize_cover(noise_image(), 80))
    assert torch.equal(found, whole[:, top : top + SIZE, left : left + SIZE])


def test_half_of_the_photos_are_mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    at_scale(monkeypatch, SIZE)
    upright, rng = to_tensor(resize_cover(noise_image(), SIZE)), random.Random(0)
    views = [
        resize_augment(noise_image(), "", size=SIZE, mask_divisor=4, rng=rng, hflip=True)[0]
        for _ in range(400)
    ]
    assert abs(sum(torch.equal(view, upright) for view in views) / 400 - 0.5) < 0.08


def test_horizontal_flip_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    at_scale(monkeypatch, SIZE)
    upright, rng = to_tensor(resize_cover(noise_image(), SIZE)), random.Random(0)

    def flipped(hflip: bool) -> list[bool]:
        views = (
            resize_augment(noise_image(), "", size=SIZE, mask_divisor=4, rng=rng, hflip=hflip)[0]
            for _ in range(20)
        )
        return [not torch.equal(view, upright) for view in views]

    assert not any(flipped(False))
    assert 4 <= sum(flipped(True)) <= 16


@pytest.mark.parametrize(("size", "divisor"), [(66, 4), (20, 4), (64, 0)])
def test_sizes_that_do_not_fit_are_refused(size: int, divisor: int) -> None:
    with pytest.raises(ValueError, match=rf"size={size} .*mask_divisor={divisor}; choose"):
        resize_augment(WHITE, "cat", size=size, mask_divisor=divisor, rng=random.Random(0))


def test_templates() -> None:
    assert len(set(TEMPLATES)) == len(TEMPLATES) >= 20
    for template in TEMPLATES:
        assert "<new1> cat" in render(template, " <new1> cat ")
    assert render("a photo of a {}", "{red} cat") == "a photo of a {red} cat"
    for bad in ("a photo", "{} and {}"):
        with pytest.raises(ValueError, match="exactly once"):
            render(bad, "cat")
    with pytest.raises(ValueError, match="blank"):
        render("a {}", "  ")


def test_a_cell_may_be_one_pixel_and_a_size_six_cells() -> None:
    """Latents of pixels have a factor of 1."""
    for size, divisor in ((6, 1), (24, 4)):
        rng = np.random.default_rng(0)
        _, _, mask, _ = resize_augment(WHITE, "cat", size=size, mask_divisor=divisor, rng=rng)
        assert mask.shape == (1, 6, 6)
    for size, divisor in ((5, 1), (20, 4), (25, 4), (8, 0)):
        with pytest.raises(ValueError, match="does not fit mask_divisor"):
            resize_augment(WHITE, "cat", size=size, mask_divisor=divisor, rng=rng)
