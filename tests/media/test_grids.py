"""Grids, overlays, and what a preview puts in them."""

from __future__ import annotations

import torch

from trainer.media.grids import grid, overlay_maps
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
