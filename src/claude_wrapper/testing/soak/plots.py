"""Plots of a soak as SVG: points, lines and lanes over one axis of time. Pure; no scripts, colours by class."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

Point = tuple[float, float]
Span = tuple[float, float, str]
"""From when to when, and the class that gives its colour."""

WIDTH: Final = 960
_LEFT, _RIGHT, _TOP, _BOTTOM = 120, 12, 6, 20
_HEIGHT: Final = 130
_LANE: Final = 19
_TICKS: Final = 8
_LOG_LEAST: Final = 0.01
_NICE: Final = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True, slots=True)
class Series:
    """Some values over time. `style` is the class that gives the colour."""

    name: str
    style: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """Time, in seconds, as all plots of a page have it; `shades` lie behind them."""

    end: float
    shades: Sequence[Span] = ()

    def x(self, at: float) -> float:
        """Where a moment is drawn."""
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * min(1.0, max(0.0, at / self.end))

    def span(self, since: float, until: float) -> str:
        """Attributes of a rectangle of that time, seen even when it is short."""
        return f'x="{self.x(since):.1f}" width="{max(2.0, self.x(until) - self.x(since)):.1f}"'

    def behind(self, height: float) -> str:
        """The shades."""
        return "".join(
            f'<rect {self.span(since, until)} y="{_TOP}" height="{height}" class="shade {kind}"/>'
            for since, until, kind in self.shades
        )

    def ticks(self, bottom: float) -> str:
        """Moments below a plot."""
        step = nice_step(self.end, _TICKS)
        times = [number * step for number in range(int(self.end / step) + 1)]
        return "".join(
            f'<text x="{self.x(at):.1f}" y="{bottom + 14:.0f}" text-anchor="middle">{at:g} s</text>' for at in times
        )


def nice_step(length: float, most: int) -> float:
    """A round step that makes at most so many of `length`."""
    rough = max(length, 1e-9) / most
    size = 10.0 ** math.floor(math.log10(rough))
    return next(size * one for one in _NICE if size * one >= rough * (1 - 1e-9))


def plot(title: str, series: Sequence[Series], axis: Axis, *, logarithmic: bool = False) -> str:
    """One plot with a legend. `logarithmic`: powers of ten from 10 ms on."""
    values = [value for one in series for _, value in one.points]
    inner = _HEIGHT - _TOP - _BOTTOM
    bottom = _HEIGHT - _BOTTOM
    if logarithmic:
        least, most = math.log10(_LOG_LEAST), max(1.0, math.ceil(math.log10(max([*values, 1.0]))))
        marks = [10.0**power for power in range(int(least), int(most) + 1)]

        def y(value: float) -> float:
            return bottom - inner * (math.log10(max(value, _LOG_LEAST)) - least) / (most - least)
    else:
        step = nice_step(max([*values, 1e-6]), 4)
        top = step * math.ceil(max([*values, 1e-6]) / step)
        marks = [number * step for number in range(round(top / step) + 1)]

        def y(value: float) -> float:
            return bottom - inner * value / top

    grid = "".join(
        f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}" class="grid"/>'
        f'<text x="{_LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>'
        for mark in marks
    )
    drawn = "".join(_dots(one, axis, y) if one.dots else _line(one, axis, y) for one in series)
    legend = "".join(
        f'<span class="key {one.style}">{html.escape(one.name)}</span>' for one in series if len(series) > 1
    )
    picture = f'<svg viewBox="0 0 {WIDTH} {_HEIGHT}">{axis.behind(inner)}{grid}{drawn}{axis.ticks(bottom)}</svg>'
    return f"<figure><figcaption>{html.escape(title)} {legend}</figcaption>{picture}</figure>"


def _dots(one: Series, axis: Axis, y: Callable[[float], float]) -> str:
    return "".join(
        f'<circle cx="{axis.x(at):.1f}" cy="{y(value):.1f}" r="1.8" class="{one.style}"/>' for at, value in one.points
    )


def _line(one: Series, axis: Axis, y: Callable[[float], float]) -> str:
    path = " ".join(f"{axis.x(at):.1f},{y(value):.1f}" for at, value in one.points)
    return f'<polyline points="{path}" class="{one.style}"/>'


@dataclass(frozen=True, slots=True)
class Lane:
    """What happened in one respect: at moments, or for a while."""

    name: str
    moments: Sequence[float] = ()
    spans: Sequence[Span] = field(default_factory=tuple)
    style: str = "moment"


def lanes(title: str, rows: Sequence[Lane], axis: Axis) -> str:
    """Rows below each other, one for each kind of thing that happened."""
    height = _TOP + _LANE * len(rows)
    drawn = []
    for number, row in enumerate(rows):
        top = _TOP + _LANE * number
        drawn.append(
            f'<text x="{_LEFT - 6}" y="{top + 13}" text-anchor="end">{html.escape(row.name)}</text>'
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{top + _LANE - 1}" y2="{top + _LANE - 1}" class="grid"/>'
        )
        drawn += [
            f'<rect {axis.span(since, until)} y="{top + 3}" height="{_LANE - 7}" rx="2" class="span {kind}"/>'
            for since, until, kind in row.spans
        ]
        drawn += [
            f'<rect x="{axis.x(at) - 1:.1f}" width="2" y="{top + 3}" height="{_LANE - 7}" class="{row.style}"/>'
            for at in row.moments
        ]
    picture = f'<svg viewBox="0 0 {WIDTH} {height + _BOTTOM}">{"".join(drawn)}{axis.ticks(height)}</svg>'
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{picture}</figure>"
