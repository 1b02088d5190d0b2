"""A mask as weights of latents."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from trainer.data.loss_mask import checked_cells, mask_cells
from trainer.media.images import ImageError


def test_white_weighs_1_grey_its_share_and_each_cell_is_a_mean() -> None:
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, :4] = 255
    pixels[:, 4:8] = 51
    pixels[0, 8:12] = 204  # one row of four
    cells = mask_cells(Image.fromarray(pixels), (16, 8), 4)
    assert cells.shape == (1, 2, 4)
    assert cells[0, :, 0].tolist() == [1.0, 1.0]
    assert cells[0, :, 1].tolist() == pytest.approx([0.2, 0.2])
    assert cells[0, :, 2].tolist() == pytest.approx([0.2, 0.0])
    assert not cells[0, :, 3].any()


def test_a_cut_that_leaves_nothing_is_refused_by_name() -> None:
    edge = np.zeros((8, 32), np.uint8)
    edge[:, :4] = 255
    with pytest.raises(ImageError, match=r"cat\.png: its mask leaves nothing of the centre of 8x8"):
        checked_cells(Image.fromarray(edge), (8, 8), divisor=4, name="cat.png")
