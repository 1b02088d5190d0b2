"""Small line charts beside each other in one picture: one for each quantity, over common places on
the horizontal axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 380, 230  # of one chart, in pixels
COLUMNS = 3
FINE = 2  # drawn so many times as large and then made smaller, which smooths the lines
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 40, 44  # from a chart's edges to its axes
INSET = 12  # from the vertical axis to the first place, and from the last to the right edge
LEGEND = 34
TICKS = 5  # on an axis, about
INK, PALE, GRID = (30, 30, 30), (110, 110, 110), (226, 226, 226)
LINE, MARK = (28, 98, 178), (214, 96, 20)
Colour = tuple[int, int, int]
Scale = Callable[[float], float]  # from a value to pixels


@dataclass(frozen=True)
class Chart:
    """One quantity. values: at each place, None where it is unknown; note: behind the title; level:
    a dashed line across; percent: whether the values are shares of 1."""

    title: str
    note: str
    values: Sequence[float | None]
    level: float | None = None
    percent: bool = False


def line_charts(
    charts: Sequence[Chart],
    places: Sequence[int],
    *,
    x_label: str,
    level: str,
    mark: int | None = None,
) -> Image.Image:
    """Charts in rows of three, and what their marks mean below.

    places: on the horizontal axis, called `x_label`, in rising order. level: the name of the dashed
    lines. mark: a place to point out.

    Raises:
        ValueError: there is no chart.
    """
    if not charts:
        raise ValueError("there is nothing to draw: no chart")
    columns = min(COLUMNS, len(charts))
    rows = -(-len(charts) // columns)
    size = (columns * WIDTH, rows * HEIGHT + LEGEND)
    sheet = Image.new("RGB", (size[0] * FINE, size[1] * FINE), "white")
    pen = _Pen(ImageDraw.Draw(sheet))
    for number, chart in enumerate(charts):
        x, y = number % columns * WIDTH, number // columns * HEIGHT
        _draw(pen, chart, places, corner=(x, y), x_label=x_label, mark=mark)
    _legend(pen, rows * HEIGHT, level, mark=None if mark is None else f"{x_label} {mark}")
    return sheet.resize(size, Image.Resampling.LANCZOS)


class _Pen:
    """Draws in pixels of the finished picture."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw = draw

    def line(self, points: Sequence[tuple[float, float]], fill: Colour, width: float = 1) -> None:
        own = [(x * FINE, y * FINE) for x, y in points]
        self.draw.line(own, fill=fill, width=round(width * FINE), joint="curve")

    def dashes(self, start: float, end: float, y: float) -> None:
        """A dashed line from left to right."""
        while start < end:
            self.line([(start, y), (min(start + 6, end), y)], PALE, 1.2)
            start += 10

    def dot(self, x: float, y: float, marked: bool) -> None:
        if marked:
            self._disc((x, y), 6.5, "white", edge=True)
        self._disc((x, y), 3.5, MARK if marked else LINE)

    def _disc(
        self, place: tuple[float, float], radius: float, fill: Colour | str, *, edge: bool = False
    ) -> None:
        (x, y), far = place, radius * FINE
        box = [x * FINE - far, y * FINE - far, x * FINE + far, y * FINE + far]
        self.draw.ellipse(box, fill=fill, outline=MARK if edge else None, width=2 * FINE)

    def text(
        self,
        place: tuple[float, float],
        words: str,
        *,
        anchor: str,
        size: int = 11,
        fill: Colour = INK,
    ) -> float:
        """anchor: as of Pillow. Returns the width of the words."""
        font = ImageFont.load_default(size * FINE)
        x, y = place
        self.draw.text((x * FINE, y * FINE), words, fill=fill, font=font, anchor=anchor)
        return self.draw.textlength(words, font=font) / FINE


def _draw(
    pen: _Pen,
    chart: Chart,
    places: Sequence[int],
    *,
    corner: tuple[int, int],
    x_label: str,
    mark: int | None,
) -> None:
    left, top = corner[0] + LEFT, corner[1] + TOP
    right, bottom = corner[0] + WIDTH - RIGHT, corner[1] + HEIGHT - BOTTOM
    width = pen.text((left, top - 14), chart.title, anchor="ls", size=14)
    pen.text((left + width + 8, top - 14), chart.note, anchor="ls", fill=PALE)
    known = [value for value in (*chart.values, chart.level) if value is not None]
    marks = ticks(min(known), max(known))
    low, high = min(marks[0], *known), max(marks[-1], *known)
    first, last = places[0], places[-1]

    def x_of(place: float) -> float:
        share = (place - first) / (last - first) if last > first else 0.5
        return left + INSET + (right - left - 2 * INSET) * share

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    for value in marks:
        pen.line([(left, y_of(value)), (right, y_of(value))], GRID)
        pen.text((left - 6, y_of(value)), _number(value, marks, chart.percent), anchor="rm")
    for place in places if len(places) <= TICKS + 1 else _spread(places):
        pen.line([(x_of(place), bottom), (x_of(place), bottom + 4)], INK)
        pen.text((x_of(place), bottom + 7), str(place), anchor="ma")
    pen.text(((left + right) / 2, bottom + 24), x_label, anchor="ma")
    pen.line([(left, top), (left, bottom), (right, bottom)], INK)
    if chart.level is not None:
        pen.dashes(left, right, y_of(chart.level))
    _curve(pen, chart, places, x_of=x_of, y_of=y_of, mark=mark)


def _curve(
    pen: _Pen, chart: Chart, places: Sequence[int], *, x_of: Scale, y_of: Scale, mark: int | None
) -> None:
    """The values as dots, those beside each other joined."""
    part: list[tuple[float, float]] = []
    for place, value in zip(places, chart.values, strict=True):
        if value is None:
            part = []
            continue
        part = [*part[-1:], (x_of(place), y_of(value))]
        pen.line(part, LINE, 2)
    for place, value in zip(places, chart.values, strict=True):
        if value is not None:
            pen.dot(x_of(place), y_of(value), place == mark)


def _legend(pen: _Pen, top: int, level: str, *, mark: str | None) -> None:
    y = top + LEGEND / 2 - 4
    pen.dashes(LEFT, LEFT + 30, y)
    width = pen.text((LEFT + 38, y), level, anchor="lm")
    if mark is not None:
        x = LEFT + 38 + width + 30
        pen.dot(x, y, True)
        pen.text((x + 14, y), f"to keep: {mark}", anchor="lm")


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers, 1, 2 or 5 times a power of ten apart, from below `low` to above
    `high`; around a single value where both are equal."""
    span = high - low or abs(high) or 1.0
    rough = span / (TICKS - 1)
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = floor(low / step + 1e-9)
    last = max(first + 2, ceil(high / step - 1e-9))
    return [number * step for number in range(first, last + 1)]


def _number(value: float, marks: Sequence[float], percent: bool) -> str:
    """With as many digits as tell the ticks apart."""
    step, sign = marks[1] - marks[0], ""
    if percent:
        value, step, sign = 100 * value, 100 * step, " %"
    digits = max(0, -floor(log10(step) + 1e-9))
    text = f"{value:.{digits}f}"
    return f"{text.removeprefix('-') if float(text) == 0 else text}{sign}"


def _spread(places: Sequence[int]) -> list[int]:
    """The first, the last, and a few between."""
    last = len(places) - 1
    return [places[round(number * last / (TICKS - 1))] for number in range(TICKS)]
