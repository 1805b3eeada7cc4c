"""A picture of small panels, each with the same contestants, as SVG by hand.

Its colours follow the reader's light or dark scheme; each contestant has a
marker beside its colour, so that the picture does without colours too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 900  # of the picture; all lengths are in its units
PANEL, GAP, HEIGHT = 236, 72, 210  # of a panel: its width, what is left of it, its height
LEGEND = 22  # a line of the legend
TOP = 40  # of the first panel, below the legend
LIGHT = ("#0b5fff", "#c2410c", "#15803d", "#86198f", "#0e7490", "#a16207", "#57534e", "#be123c")
DARK = ("#7aa7ff", "#fb923c", "#4ade80", "#e879f9", "#67e8f9", "#facc15", "#d6d3d1", "#fda4af")
SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-4-4h8v8h-8z",
    "M0-5L5 4H-5z",
    "M0-5L5 0L0 5L-5 0z",
    "M0 5L5-4H-5z",
    "M-5-1h4v-4h2v4h4v2h-4v4h-2v-4h-4z",
    "M-5-2h10v4h-10z",
    "M-2-5h4v10h-4z",
)


@dataclass(frozen=True)
class Line:
    """A contestant's points, (rows, value); broken if it was stopped after the last."""

    name: str
    points: Sequence[tuple[float, float]]
    broken: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    lines: Sequence[Line]
    logarithmic: bool = True


@dataclass(frozen=True)
class Axis:
    """Where a value lies between two lengths."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = True

    def place(self, value: float) -> float:
        low, high, at = (self.scale(number) for number in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def scale(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.logarithmic else value

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return [self.low + (self.high - self.low) * part / 5 for part in range(6)]
        return [10.0**power for power in range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)]


def span(values: Sequence[float], start: float, end: float, *, logarithmic: bool = True) -> Axis:
    """An axis from a round number below all values to one above; from 0 to at least 100 if not logarithmic."""
    if not logarithmic:
        return Axis(0, max(100, math.ceil(max(values) / 50) * 50), start, end, logarithmic=False)
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    return Axis(10.0**low, 10.0**high, start, end)


def draw(panels: Sequence[Panel]) -> str:
    """The whole picture."""
    names = [line.name for line in panels[0].lines]
    top = TOP + LEGEND * math.ceil(len(names) / 2)
    height = top + HEIGHT + 50
    parts = [*draw_legend(names)]
    for number, panel in enumerate(panels):
        parts += draw_panel(panel, GAP - 20 + number * (PANEL + GAP - 10), top)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">\n'
        f"<title>{escape('; '.join(panel.title for panel in panels))}; by the number of rows</title>\n"
        f"<style>\n{compose_style()}</style>\n{body}\n</svg>\n"
    )


def compose_style() -> str:
    def colours(palette: Sequence[str], text: str, grid: str, ground: str) -> str:
        own = "".join(f".c{number}{{stroke:{colour};fill:{colour}}}" for number, colour in enumerate(palette))
        return f"{own}text{{fill:{text}}}.grid{{stroke:{grid}}}.ground{{fill:{ground}}}"

    return (
        "text{font:12px system-ui,sans-serif;stroke:none}.title{font-weight:600}"
        ".grid{stroke-width:1}.line{fill:none!important;stroke-width:1.5}.c0.line{stroke-width:3.5}\n"
        f"{colours(LIGHT, '#1f2328', '#d8dee4', '#ffffff')}\n"
        f"@media (prefers-color-scheme:dark){{{colours(DARK, '#e6edf3', '#3d444d', '#0d1117')}}}\n"
    )


def draw_legend(names: Sequence[str]) -> Iterator[str]:
    yield f'<rect class="ground" width="{WIDTH}" height="100%"/>'
    for number, name in enumerate(names):
        x, y = 60 + number % 2 * WIDTH / 2, 20 + number // 2 * LEGEND
        yield f'<path class="c{number} line" d="M{x - 30} {y}h24"/>' + mark(number, x - 18, y)
        yield f'<text x="{x}" y="{y + 4}">{escape(name)}</text>'


def mark(number: int, x: float, y: float) -> str:
    return f'<path class="c{number}" transform="translate({x:.1f} {y:.1f})" d="{SHAPES[number % len(SHAPES)]}"/>'


def draw_panel(panel: Panel, left: float, top: float) -> Iterator[str]:
    """Title, axes, and the lines with the first contestant's on top."""
    points = [point for line in panel.lines for point in line.points]
    across = span([rows for rows, _ in points], left, left + PANEL)
    up = span([value for _, value in points], top + HEIGHT, top + 10, logarithmic=panel.logarithmic)
    yield f'<text class="title" x="{left}" y="{top - 6}">{escape(panel.title)}</text>'
    for value in up.ticks():
        y = up.place(value)
        yield f'<path class="grid" d="M{left} {y:.1f}h{PANEL}"/>'
        yield f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{shorten(value)}</text>'
    for value in across.ticks():
        x = across.place(value)
        yield f'<text x="{x:.1f}" y="{top + HEIGHT + 18}" text-anchor="middle">{shorten(value)}</text>'
    yield f'<text x="{left + PANEL / 2}" y="{top + HEIGHT + 36}" text-anchor="middle">rows of the answer</text>'
    for number, line in reversed([*enumerate(panel.lines)]):
        yield from draw_line(number, [(across.place(rows), up.place(value)) for rows, value in line.points], line)


def draw_line(number: int, places: Sequence[tuple[float, float]], line: Line) -> Iterator[str]:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    yield f'<path class="c{number} line" d="M{path}"/>'
    for x, y in places:
        yield mark(number, x, y)
    if line.broken and places:
        x, y = places[-1]
        yield f'<text x="{x + 8:.1f}" y="{y + 4:.1f}">✕</text>'


def shorten(value: float) -> str:
    if value >= 1_000_000:
        return f"{value / 1e6:g} M"
    return f"{value / 1000:g} k" if value >= 1_000 else f"{value:g}"
