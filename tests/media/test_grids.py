"""Grids, overlays, and what a preview puts in them."""

from __future__ import annotations

import torch
from PIL import Image

from trainer.media.grids import cell_side, grid, overlay_maps, stacked
from trainer.media.images import to_pil


def test_grid_places_every_picture() -> None:
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(3, 1, 1).expand(3, 8, 8)
    blue = torch.tensor([-1.0, -1.0, 1.0]).reshape(3, 1, 1).expand(3, 8, 8)
    sheet = grid([("one", torch.stack([red, blue])), ("two", torch.stack([blue]))], side=16)
    colours = {pixel for _, pixel in sheet.getcolors(100_000) or []}
    assert (255, 0, 0) in colours
    counts = {pixel: count for count, pixel in sheet.getcolors(100_000) or []}
    assert counts[(255, 0, 0)] == 16 * 16
    assert counts[(0, 0, 255)] == 2 * 16 * 16


def test_pictures_stand_in_the_row_and_column_of_their_place() -> None:
    colours = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    red, green, blue = (torch.tensor(c).reshape(1, 3, 1, 1) / 127.5 - 1 for c in colours)
    rows = [(name, torch.cat(pair).expand(2, 3, 8, 8)) for name, pair in
            (("a", (red, green)), ("b", (blue, red)))]  # fmt: skip
    sheet = grid(rows, side=16)
    left = sheet.width - 2 * 18
    found = [sheet.getpixel((left + 8 + 18 * x, 8 + 18 * y)) for y in (0, 1) for x in (0, 1)]
    assert found == [colours[0], colours[1], colours[2], colours[0]]


def test_pictures_that_are_no_squares_keep_their_shape() -> None:
    """Twice as wide as high: half of the cell, in its middle."""
    wide = torch.tensor([1.0, -1.0, -1.0]).reshape(3, 1, 1).expand(1, 3, 4, 8)
    sheet = grid([("", wide)], side=16)
    left = sheet.width - 18
    rows = [sheet.getpixel((left + 8, y)) == (255, 0, 0) for y in range(16)]
    assert rows == [4 <= y < 12 for y in range(16)]
    assert sum(sheet.getpixel((left + x, 8)) == (255, 0, 0) for x in range(16)) == 16


def test_cells_show_pictures_in_their_own_size_within_limits() -> None:
    sizes = {(32, 32): 96, (160, 120): 160, (120, 160): 160, (1024, 512): 256}
    assert {size: cell_side(torch.zeros(1, 3, *size), 256) for size in sizes} == sizes


def test_stacked_images_follow_each_other_from_the_top() -> None:
    first, second = Image.new("RGB", (4, 3), "red"), Image.new("RGB", (6, 5), "blue")
    sheet = stacked([first, second])
    assert sheet.size == (6, 8)
    at = [sheet.getpixel(place) for place in ((0, 0), (5, 0), (0, 3), (5, 7))]
    assert at == [(255, 0, 0), (255, 255, 255), (0, 0, 255), (0, 0, 255)]


def test_a_map_is_scaled_between_its_least_and_largest_value() -> None:
    maps = torch.tensor([[0.25, 0.75]]).reshape(1, 1, 2)
    heat = overlay_maps(torch.full((1, 3, 4, 8), 0.5), maps)
    torch.testing.assert_close(heat[0, :, 0, 0], torch.full((3,), 0.3))  # 0.6 of the grey
    torch.testing.assert_close(heat[0, :, 0, -1], torch.tensor([1.0, -0.2, -0.9]))


def test_long_titles_wrap_and_do_not_widen_the_grid() -> None:
    picture = torch.zeros(1, 3, 8, 8)
    short = grid([("", picture)], ["fox"], side=64)
    long = grid([("", picture)], ["a fox left of a very red apple on a blue background"], side=64)
    assert long.width == short.width
    assert long.height > short.height


def test_overlay_is_hot_where_the_map_is() -> None:
    maps = torch.zeros(1, 4, 4)
    maps[0, :2] = 1
    heat = overlay_maps(torch.zeros(1, 3, 16, 16), maps)
    assert heat.shape == (1, 3, 16, 16)
    assert heat[0, 0, :4].mean() > 0.9
    assert heat[0, 0, -4:].mean() < 0.1
    assert to_pil(heat[0]).size == (16, 16)


def test_a_flat_map_is_no_error() -> None:
    assert torch.isfinite(overlay_maps(torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 2))).all()
