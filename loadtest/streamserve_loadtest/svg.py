"""Plots as SVG text: lines, steps and timelines on axes, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 40
NUM_COLOURS = 8


@dataclass(frozen=True, slots=True)
class Series:
    """Points to be joined, in the colour with this number."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    has_markers: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """From ``low`` to ``high``, in tens if ``is_log``."""

    label: str
    low: float
    high: float
    is_log: bool = False
    unit: Callable[[float], str] = "{:g}".format

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end; what is beyond is put on the edge."""
        if self.is_log:
            low, high = math.log(self.low), math.log(self.high)
            share = (math.log(max(value, self.low)) - low) / (high - low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Round values for the grid."""
        if self.is_log:
            first = math.floor(math.log10(self.low))
            last = math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if self.high / self.low < 2e3 else (1,)
            values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        else:
            step = _round_step((self.high - self.low) / 6)
            count = int((self.high - self.low) / step + 1e-9)
            values = [math.ceil(self.low / step) * step + step * i for i in range(count + 1)]
        return [value for value in values if self.low <= value <= self.high * (1 + 1e-9)]


def log_axis(label: str, values: Sequence[float], unit: Callable[[float], str]) -> Axis:
    """A logarithmic axis around positive values."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / 1.1, max(positive) * 1.1
    return Axis(label, low, max(high, low * 2), is_log=True, unit=unit)


def line_plot(series: Sequence[Series], x: Axis, y: Axis, title: str) -> str:
    """Lines over two axes, with a legend if there is more than one."""
    parts = _frame(x, y)
    for line in series:
        points = [(_x(x.place(px)), _y(y.place(py))) for px, py in line.points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline class="line c{line.colour % NUM_COLOURS}" points="{path}"/>')
        if line.has_markers:
            parts += [
                f'<circle class="dot c{line.colour % NUM_COLOURS}" cx="{px:.1f}" cy="{py:.1f}" '
                f'r="3.5"><title>{escape(line.name)}: {x.unit(vx)}, {y.unit(vy)}</title></circle>'
                for (px, py), (vx, vy) in zip(points, line.points, strict=True)
            ]
    legend = _legend([(line.name, line.colour) for line in series]) if len(series) > 1 else ""
    return _figure(parts, title, HEIGHT) + legend


def timeline(
    rows: Sequence[tuple[str, int, float, Sequence[float], float]], x: Axis, title: str
) -> str:
    """A row for each stream: its wait, and a tick for every chunk.

    A row is (label, colour, when due, when its chunks came, when it ended).
    """
    step = max(3.0, min(14.0, 420 / max(len(rows), 1)))
    height = TOP + BOTTOM + step * len(rows)
    parts = _x_grid(x, height)
    for number, (label, colour, due, chunks, end) in enumerate(rows):
        middle = TOP + step * (number + 0.5)
        half = step * 0.36
        first = chunks[0] if chunks else end
        parts.append(
            f'<line class="wait" x1="{_x(x.place(due)):.1f}" x2="{_x(x.place(first)):.1f}" '
            f'y1="{middle:.1f}" y2="{middle:.1f}"><title>{escape(label)}</title></line>'
        )
        ticks = "".join(
            f"M{position:.1f} {middle - half:.1f}v{2 * half:.1f}"
            for position in dict.fromkeys(round(_x(x.place(t)), 1) for t in chunks)
        )
        if ticks:
            parts.append(f'<path class="tick c{colour % NUM_COLOURS}" d="{ticks}"/>')
    return _figure(parts, title, height)


def _frame(x: Axis, y: Axis) -> list[str]:
    parts = _x_grid(x, HEIGHT)
    for value in y.ticks():
        level = _y(y.place(value))
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" '
            f'y2="{level:.1f}"/><text class="y" x="{LEFT - 6}" y="{level + 4:.1f}">'
            f"{escape(y.unit(value))}</text>"
        )
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    parts.append(
        f'<text class="label" transform="translate(13 {middle:.0f}) rotate(-90)">'
        f"{escape(y.label)}</text>"
    )
    return parts


def _x_grid(x: Axis, height: float) -> list[str]:
    parts = []
    bottom = height - BOTTOM
    for value in x.ticks():
        place = _x(x.place(value))
        parts.append(
            f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{bottom:.1f}"/>'
            f'<text class="x" x="{place:.1f}" y="{bottom + 16:.1f}">{escape(x.unit(value))}</text>'
        )
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle:.0f}" y="{height - 6:.1f}">{escape(x.label)}</text>'
    )
    return parts


def _figure(parts: Sequence[str], title: str, height: float) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )


def _legend(entries: Sequence[tuple[str, int]]) -> str:
    items = "".join(
        f'<span><i class="k{colour % NUM_COLOURS}"></i>{escape(name)}</span>'
        for name, colour in entries
    )
    return f'<p class="legend">{items}</p>'


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)
