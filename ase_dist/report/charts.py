"""Line charts as inline SVG, in the colours of the page, dark or light; a script shows the values at the pointer.

SVG charts have a few kilobytes each and print sharply. Colours of lines are those of
``ase_dist.training.record.plots``; "ink" is the colour of text.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from ase_dist.report.text import brief, significant
from ase_dist.training.record.records import Series

WIDTH, HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 8.0, 24.0
POINTS = 400  # per line: about one per pixel
FEW = 40  # up to so many points each gets a dot
INK = "ink"


@dataclass(frozen=True)
class Line:
    """One curve. ``spread`` is a half-width per value, drawn as a band; without ``label`` no value is shown at it."""

    series: Series
    color: str = INK
    label: str = ""
    style: Literal["plain", "pale", "dashed", "thin"] = "plain"
    spread: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """A panel with a title above it; ``note`` stands next to the title, ``value`` is the latest number in words."""

    title: str
    lines: Sequence[Line]
    note: str = ""
    value: str = ""
    zero: bool = False
    legend: bool = False

    @functools.cached_property
    def _drawn(self) -> list[Line]:
        shown = [line for line in self.lines if line.series]
        return [line if line.spread else replace(line, series=line.series.thinned(POINTS)) for line in shown]

    @functools.cached_property
    def _frame(self) -> _Frame:
        return _Frame.around(self._drawn, zero=self.zero)

    @property
    def svg(self) -> Markup:
        """The picture as an element for the page."""
        svg = Element("svg", viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", role="img")
        svg.set("aria-label", f"{self.title} over the steps")
        _draw_axes(svg, self._frame)
        for line in self._drawn:
            _draw_line(svg, line, self._frame)
        return Markup(tostring(svg, encoding="unicode"))  # ElementTree has escaped every text and attribute

    @property
    def hover(self) -> str:
        """JSON for the script: the range of steps, the margins, and the points of the lines that have a label."""
        lines = [
            [line.label, [[step, significant(value)] for step, value in _points(line.series)]]
            for line in self._drawn
            if line.label
        ]
        box = [LEFT, WIDTH - RIGHT, WIDTH]
        return json.dumps({"x": self._frame.x, "box": box, "lines": lines}, separators=(",", ":"))

    def __bool__(self) -> bool:
        return any(line.series for line in self.lines)


@dataclass(frozen=True)
class _Frame:
    """The ranges of both axes, and where a value lies in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    @classmethod
    def around(cls, lines: Sequence[Line], *, zero: bool) -> _Frame:
        steps = [step for line in lines for step in line.series.steps]
        values = [v for line in lines for edge in (-1, 1) for v in _shifted(line, edge) if math.isfinite(v)]
        if zero:
            values.append(0.0)
        low, high = min(values, default=0.0), max(values, default=1.0)
        pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
        bottom = low if zero and low == 0 else low - pad
        first, last = min(steps, default=0.0), max(steps, default=1.0)
        return cls((first, last) if last > first else (first - 0.5, first + 0.5), (bottom, high + pad))

    def left(self, step: float) -> float:
        return LEFT + (step - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def top(self, value: float) -> float:
        return TOP + (self.y[1] - value) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)

    def point(self, step: float, value: float) -> str:
        return f"{self.left(step):.1f} {self.top(value):.1f}"


def _draw_axes(svg: Element, frame: _Frame) -> None:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for value in _ticks(frame.y):
        SubElement(svg, "path", {"class": "rule", "d": f"M{LEFT:g} {frame.top(value):.1f}H{right:g}"})
        _text(svg, LEFT - 6, frame.top(value) + 3.5, brief(value), anchor="end")
    for y in [bottom, *([frame.top(0)] if frame.y[0] < 0 < frame.y[1] else [])]:
        SubElement(svg, "path", {"class": "axis", "d": f"M{LEFT:g} {y:.1f}H{right:g}"})
    for step in _ticks(frame.x, whole=True):
        x = frame.left(step)
        SubElement(svg, "path", {"class": "axis", "d": f"M{x:.1f} {bottom:g}v4"})
        at_edge = "end" if x > right - 12 else "middle"
        _text(svg, min(x, right + 4) if at_edge == "end" else x, bottom + 16, f"{step:,.0f}", anchor=at_edge)


def _ticks(ends: tuple[float, float], *, whole: bool = False) -> list[float]:
    """Up to six round values between the ends."""
    found = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1).tick_values(*ends)
    return [float(value) for value in found if ends[0] <= value <= ends[1]]


def _text(svg: Element, x: float, y: float, text: str, *, anchor: str) -> None:
    SubElement(svg, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}).text = text


def _draw_line(svg: Element, line: Line, frame: _Frame) -> None:
    paint = {"class": f"line {line.style}"}
    if line.color != INK:
        paint["stroke"] = line.color
    if line.spread:
        edges = [_points(Series(line.series.steps, _shifted(line, edge))) for edge in (1, -1)]
        outline = [frame.point(x, y) for x, y in (*edges[0], *reversed(edges[1]))]
        band = {"class": "band"} if line.color == INK else {"class": "band", "fill": line.color}
        if outline:
            SubElement(svg, "path", {**band, "d": f"M{'L'.join(outline)}Z"})
    path, pen_is_down = [], False
    for step, value in zip(line.series.steps, line.series.values, strict=True):
        is_known = math.isfinite(value)
        if is_known:
            path.append(("L" if pen_is_down else "M") + frame.point(step, value))
        pen_is_down = is_known  # a gap where a value is missing
    SubElement(svg, "path", {**paint, "d": "".join(path)})
    if len(line.series.steps) <= FEW and line.style == "plain":
        dots = [frame.point(x, y) for x, y in _points(line.series)]
        SubElement(svg, "path", {**paint, "class": "dots", "d": "".join(f"M{dot}h0" for dot in dots)})


def _points(series: Series) -> list[tuple[float, float]]:
    pairs = zip(series.steps, series.values, strict=True)
    return [(step, value) for step, value in pairs if math.isfinite(value)]


def _shifted(line: Line, sign: int) -> list[float]:
    """The values moved by the half-width of the band."""
    spread = line.spread or [0.0] * len(line.series.values)
    return [value + sign * half for value, half in zip(line.series.values, spread, strict=True)]
