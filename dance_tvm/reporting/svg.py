"""Plots as SVG without a script: places are shares of the width, so text stays as large as the page's on any screen,
and colours are the page's own classes ``s0`` to ``s7``, which its light, dark and printed themes define."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

COLOURS = 8
_MARK = 7  # pixels across


@dataclass(frozen=True)
class Axis:
    """A scale from ``low`` to ``high``."""

    title: str
    low: float
    high: float

    def share(self, value: float) -> float:
        """Percent of the way from low to high."""
        return round(100 * (value - self.low) / ((self.high - self.low) or 1.0), 2)

    def above(self, value: float) -> float:
        """Percent of the way from high to low, as SVG counts from above."""
        return round(100 - self.share(value), 2)

    def ticks(self, most: int = 5) -> list[float]:
        """At most this many round values within the scale."""
        step = _round_step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        return [step * index for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def from_zero(title: str, values: Sequence[float]) -> Axis:
    """A scale from 0 to a little more than the greatest value."""
    return Axis(title, 0.0, 1.05 * max(values, default=1.0) or 1.0)


@dataclass(frozen=True)
class Point:
    """A place in a plot; ``high`` is the end of a whisker, ``low`` where it begins if not at the point."""

    x: float
    y: float
    tip: str = ""
    high: float | None = None
    low: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one colour, as marks of their own, as stairs, or as a dotted line."""

    name: str
    colour: int
    points: list[Point]
    kind: Literal["marks", "stairs", "dotted"] = "marks"


@dataclass(frozen=True)
class Bar:
    """One bar of a row, from 0 to ``value``; ``box`` is a spread drawn over it as (low, high)."""

    value: float
    colour: int
    text: str
    tip: str = ""
    box: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """A labelled row of bars; with ``place`` the label is a link to that row of the page."""

    label: str
    bars: list[Bar] = field(default_factory=list)
    place: str = ""


def plot(x: Axis, y: Axis, series: Sequence[Series], about: str) -> str:
    """A plot of two scales with its legend."""
    grid = [
        f'<line class="grid" x1="0" x2="100%" y1="{y.above(tick)}%" y2="{y.above(tick)}%"/>'
        f'<text x="0" y="{y.above(tick)}%" dx="-8" dy="4" text-anchor="end">{_short(tick)}</text>'
        for tick in y.ticks()
    ]
    grid += [
        f'<line class="grid" x1="{x.share(tick)}%" x2="{x.share(tick)}%" y1="0" y2="100%"/>'
        f'<text x="{x.share(tick)}%" y="100%" dy="18" text-anchor="middle">{_short(tick)}</text>'
        for tick in x.ticks()
    ]
    marks = [_drawn(each, x, y) for each in series]
    return (
        f'{_legend([(each.name, each.colour) for each in series])}<p class="axis">{escape(y.title)}</p>'
        f'<div class="plot"><svg role="img" aria-label="{escape(about)}">{"".join(grid + marks)}</svg></div>'
        f'<p class="axis below">{escape(x.title)}</p>'
    )


def rows(scale: Axis, shown: Sequence[Row], legend: Sequence[tuple[str, int]], about: str) -> str:
    """Rows of bars over one scale, labels beside them on a wide page and above them on a narrow one."""
    drawn = "".join(
        f'<div class="row"><span>{_label(row)}</span><svg style="height:{20 * len(row.bars)}px" role="img" '
        f'aria-label="{escape(row.label)}: {escape(", ".join(bar.text for bar in row.bars))}">'
        f"{''.join(_bar(bar, index, scale) for index, bar in enumerate(row.bars))}</svg></div>"
        for row in shown
    )
    return (
        f'{_legend(legend)}<div class="rows" role="group" aria-label="{escape(about)}">{drawn}</div>'
        f'<p class="axis below">{escape(scale.title)}</p>'
    )


def _label(row: Row) -> str:
    text = escape(row.label)
    return f'<a href="#{escape(row.place)}">{text}</a>' if row.place else text


def _bar(bar: Bar, index: int, scale: Axis) -> str:
    top, width = 20 * index + 3, max(0.0, scale.share(bar.value))
    end = max(width, scale.share(bar.box[1])) if bar.box else width
    parts = [
        f'<rect class="s{bar.colour}" y="{top}" width="{width}%" height="14"><title>{escape(bar.tip)}</title></rect>'
    ]
    if bar.box:
        low, high = scale.share(bar.box[0]), scale.share(bar.box[1])
        parts.append(f'<line class="whisker" x1="{low}%" x2="{high}%" y1="{top + 7}" y2="{top + 7}"/>')
        parts += [f'<line class="whisker" x1="{at}%" x2="{at}%" y1="{top + 2}" y2="{top + 12}"/>' for at in (low, high)]
    parts.append(f'<text x="{end}%" y="{top + 11}" dx="5">{escape(bar.text)}</text>')
    return "".join(parts)


def _drawn(series: Series, x: Axis, y: Axis) -> str:
    places = [(x.share(point.x), y.above(point.y)) for point in series.points]
    if series.kind == "marks":
        return "".join(
            _whisker(point, place, y, series.colour) + _mark(place, series.colour, point.tip)
            for point, place in zip(series.points, places, strict=True)
        )
    dotted = " dotted" if series.kind == "dotted" else ""
    lines = []
    for (x1, y1), (x2, y2) in itertools.pairwise(places):
        corners = [(x1, y1, x2, y2)] if dotted else [(x1, y1, x2, y1), (x2, y1, x2, y2)]
        lines += [
            f'<line class="s{series.colour}{dotted}" x1="{a}%" y1="{b}%" x2="{c}%" y2="{d}%"/>'
            for a, b, c, d in corners
            if (a, b) != (c, d)
        ]
    return "".join(lines)


def _whisker(point: Point, place: tuple[float, float], y: Axis, colour: int) -> str:
    if point.high is None:
        return ""
    low = place[1] if point.low is None else y.above(point.low)
    high = y.above(point.high)
    return f'<line class="s{colour} thin" x1="{place[0]}%" x2="{place[0]}%" y1="{low}%" y2="{high}%"/>'


def _mark(place: tuple[float, float], colour: int, tip: str) -> str:
    """Circles for even colours and squares for odd ones, so that ink alone tells them apart."""
    title = f"<title>{escape(tip)}</title>" if tip else ""
    at = f'x="{place[0]}%" y="{place[1]}%"'
    round_off = f' rx="{_MARK / 2}"' if colour % 2 == 0 else ""
    return f'<rect class="s{colour} mark" {at} width="{_MARK}" height="{_MARK}"{round_off}>{title}</rect>'


def _legend(names: Sequence[tuple[str, int]]) -> str:
    shown = ""
    for name, colour in names:
        round_off = ' rx="6"' if colour % 2 == 0 else ""
        mark = f'<svg width="12" height="12"><rect class="s{colour}" width="12" height="12"{round_off}/></svg>'
        shown += f"<span>{mark}{escape(name)}</span>"
    return f'<p class="legend">{shown}</p>' if shown else ""


def _round_step(least: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _short(value: float) -> str:
    return f"{value:,.6g}"
