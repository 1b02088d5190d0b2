"""Line charts: round ticks, and pixels where the numbers say."""

from __future__ import annotations

import pytest
from PIL import Image

from trainer.media.line_charts import HEIGHT, LINE, MARK, WIDTH, Chart, line_charts, ticks


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (0, 1, [0, 0.5, 1]),
        (0.41, 0.79, [0.4, 0.5, 0.6, 0.7, 0.8]),
        (-0.01, 0.11, [-0.05, 0, 0.05, 0.1, 0.15]),
        (170, 190, [170, 175, 180, 185, 190]),
        (5, 5, [4, 6, 8]),
    ],
)
def test_ticks_are_round_and_reach_around(low: float, high: float, found: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(found)


def places_of(sheet: Image.Image, colour: tuple[int, int, int]) -> list[tuple[int, int]]:
    return [
        (x, y)
        for x in range(sheet.width)
        for y in range(sheet.height)
        if sheet.getpixel((x, y)) == colour
    ]


def test_a_rising_line_rises_and_the_mark_is_at_its_place() -> None:
    chart = Chart("one", "", [0.0, 0.5, 1.0], level=0.0)
    sheet = line_charts([chart], [100, 200, 300], x_label="step", level="base", mark=200)
    assert sheet.size[0] == WIDTH and sheet.size[1] > HEIGHT
    blue, marked = places_of(sheet, LINE), places_of(sheet, MARK)
    first, last = min(blue), max(blue)
    assert first[1] > last[1] + 100  # pixels count from the top
    in_chart = [place for place in marked if place[1] < HEIGHT - 20]
    middle = sum(x for x, _ in in_chart) / len(in_chart)
    assert middle == pytest.approx((first[0] + last[0]) / 2, abs=2)
    assert len(marked) > len(in_chart)  # the legend has one, too


def test_a_gap_is_not_joined_and_three_charts_stand_in_a_row() -> None:
    whole = Chart("one", "", [0.0, 1.0, 0.0, 1.0])
    broken = Chart("two", "", [0.0, None, 0.0, 1.0])
    sheets = [line_charts([each], [1, 2, 3, 4], x_label="step", level="base")
              for each in (whole, broken)]  # fmt: skip
    inked = [sum(blue > red + 60 for red, _, blue in sheet.getdata()) for sheet in sheets]
    assert inked[1] < 0.6 * inked[0]
    many = line_charts([whole] * 4, [1, 2, 3, 4], x_label="step", level="base")
    assert many.size[0] == 3 * WIDTH and many.size[1] > 2 * HEIGHT
    with pytest.raises(ValueError, match="there is nothing to draw"):
        line_charts([], [1], x_label="step", level="base")
