"""Static charts as SVG text, which need no script.

Lines differ in marker and dash as well as colour, for greyscale print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from markupsafe import Markup

INK, MUTED, GRID = "#1d1d21", "#6c6c75", "#e4e4e8"
FONT = "Inter, Helvetica, Segoe UI, Liberation Sans, Arial, sans-serif"


@dataclass(frozen=True)
class Style:
    """Colour, marker, dashes and width of a line."""

    colour: str
    marker: str
    dashes: str = ""
    width: float = 1.4


VALUE = Style("#0b4f8a", "disc", width=2.4)
NULL_STYLES: dict[str, Style] = {
    "permuted_classes": Style("#bf4b17", "ring", "6 3"),
    "shuffled": Style("#8a8a93", "cross", "1 3"),
    "random": Style("#4f7a36", "triangle", "8 3 2 3"),
    "neurons": Style("#7d5a9e", "square", "3 3"),
}
RUN_STYLES = (
    VALUE,
    Style("#bf4b17", "square", width=2),
    Style("#4f7a36", "triangle", width=2),
    Style("#7d5a9e", "ring", width=2),
    Style("#9a7300", "cross", width=2),
    Style("#1d1d21", "square", "4 2", width=2),
    Style("#0f7f86", "disc", "4 2", width=2),
    Style("#a5346f", "triangle", "4 2", width=2),
)


@dataclass(frozen=True)
class Line:
    """One line of a chart: `y` is NaN where it has no point.

    `low` and `high` bound a band; `bars` are the intervals of the points, (low, high) each.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: Style
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    bars: Sequence[tuple[float, float]] = ()


@dataclass
class Frame:
    """The plotting area and its two linear scales."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = 360
    height: int = 210
    left: int = 46
    right: int = 12
    top: int = 10
    bottom: int = 30
    parts: list[str] = field(default_factory=list)

    def at_x(self, value: float) -> float:
        """The horizontal position of a value, in pixels from the left."""
        low, high = self.x
        room = self.width - self.left - self.right
        return self.left + room * (value - low) / ((high - low) or 1)

    def at_y(self, value: float) -> float:
        """The vertical position of a value, in pixels from the top."""
        low, high = self.y
        room = self.height - self.top - self.bottom
        return self.height - self.bottom - room * (value - low) / ((high - low) or 1)

    def add(self, tag: str, text: str | None = None, **attributes: object) -> None:
        """Add an element; see `element`."""
        self.parts.append(element(tag, text, **attributes))

    def svg(self, label: str) -> Markup:
        """The SVG document of all elements."""
        return svg("".join(self.parts), self.width, self.height, label)


def svg(content: str, width: float, height: float, label: str) -> Markup:
    """An SVG document of elements, with a label for screen readers."""
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:.6g}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{content}</svg>'
    )


def element(tag: str, text: str | None = None, **attributes: object) -> str:
    """An escaped SVG element; underscores in attribute names become hyphens."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for name, value in attributes.items()
        if value not in (None, "")
    )
    return f"<{tag}{written}/>" if text is None else f"<{tag}{written}>{escape(text)}</{tag}>"


def curves(
    lines: Sequence[Line], *, label: str, x_ticks: Mapping[float, str], x_title: str = "layer"
) -> Markup:
    """A chart of lines over layers, with gaps at undefined points."""
    values = [
        v
        for line in lines
        for part in (line.y, line.low, line.high, *line.bars)
        for v in part or ()
    ]
    frame = Frame(_padded(list(x_ticks), 0.03), _padded(values, 0.07))
    _grid(frame, x_ticks, x_title)
    for line in lines:
        if line.low is not None and line.high is not None:
            for run in _runs(line.x, line.low, line.high):
                there = [(frame.at_x(x), frame.at_y(low)) for x, low, _ in run]
                back = [(frame.at_x(x), frame.at_y(high)) for x, _, high in reversed(run)]
                frame.add(
                    "polygon", points=_points(there + back), fill=line.style.colour, opacity=0.13
                )
    for line in reversed(lines):  # the first line is drawn on top
        _draw(frame, line)
    return frame.svg(label)


def dots(rows: Mapping[str, Sequence[Line]], *, label: str) -> Markup:
    """A chart with one row per SAE and one mark per line, for runs without a curve over layers."""
    values = [
        v
        for lines in rows.values()
        for line in lines
        for part in (line.y, *line.bars)
        for v in part
    ]
    left = min(200, 24 + max((len(name) for name in rows), default=0) * 6)
    frame = Frame(_padded(values, 0.07), (0, 1), height=46 + 22 * len(rows), left=left)
    for value in ticks(*frame.x):
        x = frame.at_x(value)
        frame.add("line", x1=x, x2=x, y1=frame.top, y2=frame.height - frame.bottom, stroke=GRID)
        _text(frame, _tick(value), x, frame.height - 12, anchor="middle")
    for i, (name, lines) in enumerate(rows.items()):
        y = frame.top + 11 + 22 * i
        short = name if len(name) <= 30 else f"…{name[-29:]}"
        _text(frame, short, left - 10, y + 4, anchor="end", fill=INK)
        for line in reversed(lines):
            for low, high in line.bars:
                if math.isfinite(low) and math.isfinite(high):
                    ends = {"x1": frame.at_x(low), "x2": frame.at_x(high), "y1": y, "y2": y}
                    frame.add("line", **ends, stroke=line.style.colour, opacity=0.7)
            for value in line.y:
                if math.isfinite(value):
                    title = f"{name}: {line.label} {number(value)}"
                    frame.parts.append(mark(line.style, frame.at_x(value), y, title))
    return frame.svg(label)


def captioned(
    chart: Markup, *, title: str, subtitle: str, legend: Sequence[tuple[Style, str]]
) -> Markup:
    """A chart as a separate document on white, with its title above and its legend below."""
    width, height = map(float, str(chart).split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split())
    top, row = 40.0, 17.0
    longest = max([len(title) * 1.15, len(subtitle), *(len(words) + 8 for _, words in legend)])
    frame = Frame((0, 1), (0, 1))
    frame.width = math.ceil(max(width, 24 + 6 * longest))
    frame.height = math.ceil(top + height + row * len(legend) + 10)
    frame.add("rect", width=frame.width, height=frame.height, fill="#fff")
    frame.add("text", title, x=12, y=18, fill=INK, font_size=12.5, font_weight=600)
    _text(frame, subtitle, 12, 33, anchor="start")
    placed = f'<svg y="{top:g}" width="{width:g}" height="{height:g}"'
    frame.parts.append(str(chart).replace("<svg", placed, 1))
    for i, (style, words) in enumerate(legend):
        y = top + height + row * (i + 0.5)
        sample = element("path", d="M1 7h32", **_stroke(style)) + mark(style, 17, 7)
        frame.parts.append(f'<g transform="translate(12 {y - 7:g})">{sample}</g>')
        _text(frame, words, 54, y + 4, anchor="start", fill=INK)
    document = str(frame.svg(f"{title}, {subtitle}"))
    shown = f'<svg width="{frame.width}" height="{frame.height}" font-family="{FONT}"'
    return Markup(document.replace("<svg", shown, 1))


def key(style: Style) -> Markup:
    """A line sample for a legend."""
    line = element("path", d="M1 7h32", **_stroke(style))
    return Markup(
        f'<svg class="key" viewBox="0 0 34 14" aria-hidden="true">{line}{mark(style, 17, 7)}</svg>'
    )


def _stroke(style: Style) -> dict[str, Any]:
    return {
        "fill": "none",
        "stroke": style.colour,
        "stroke_width": style.width,
        "stroke_dasharray": style.dashes,
        "stroke_linejoin": "round",
    }


MARKS = {
    "disc": "M-3.1 0a3.1 3.1 0 1 0 6.2 0a3.1 3.1 0 1 0 -6.2 0z",
    "ring": "M-2.8 0a2.8 2.8 0 1 0 5.6 0a2.8 2.8 0 1 0 -5.6 0z",
    "square": "M-2.5 -2.5h5v5h-5z",
    "triangle": "M0 -3.4l3 5.8h-6z",
    "cross": "M-2.4 -2.4l4.8 4.8m0 -4.8l-4.8 4.8",
}


def mark(style: Style, x: float, y: float, title: str = "") -> str:
    """A marker, with `title` shown on hovering."""
    drawn = element(
        "path",
        d=MARKS[style.marker],
        transform=f"translate({x:.1f} {y:.1f})",
        fill=style.colour if style.marker == "disc" else "#fff",
        stroke=style.colour,
        stroke_width=1.3,
    )
    return f"<g>{element('title', title)}{drawn}</g>" if title else drawn


def number(value: float | None, beside: float = 0.0) -> str:
    """A value with three significant digits, or a dash where it is undefined.

    A value near 0 that is shown beside one that is not near 0 has three decimals.
    """
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size < 1e-9:  # a rounding error
        return "0"
    if size >= 1000 or (value == round(value) and size >= 10):
        return f"{value:,.0f}"
    if size < 0.0005 <= abs(beside):
        return "0.000"
    if size < 0.0005:
        return f"{value:.0e}".replace("-", "−")
    text = f"{value:.3f}" if size < 1 else f"{value:.{2 if size < 10 else 1 if size < 100 else 0}f}"
    return text.replace("-", "−")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` round values between `low` and `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _draw(frame: Frame, line: Line) -> None:
    style = line.style
    for x, (low, high) in zip(line.x, line.bars):
        if math.isfinite(low) and math.isfinite(high):
            at = {
                "x1": (x := frame.at_x(x)),
                "x2": x,
                "y1": frame.at_y(low),
                "y2": frame.at_y(high),
            }
            frame.add("line", **at, stroke=style.colour, stroke_width=1.2, opacity=0.7)
    for run in _runs(line.x, line.y):
        if len(run) > 1:
            points = _points([(frame.at_x(x), frame.at_y(y)) for x, y in run])
            frame.add("polyline", points=points, **_stroke(style))
        for x, y in run:
            title = f"{line.label}, {x:g}: {number(y)}"
            frame.parts.append(mark(style, frame.at_x(x), frame.at_y(y), title))


def _grid(frame: Frame, x_ticks: Mapping[float, str], x_title: str) -> None:
    bottom = frame.height - frame.bottom
    for value in ticks(*frame.y):
        y = frame.at_y(value)
        colour = GRID if value else "#b9b9c0"
        frame.add("line", x1=frame.left, x2=frame.width - frame.right, y1=y, y2=y, stroke=colour)
        _text(frame, _tick(value), frame.left - 6, y + 3.5, anchor="end")
    longest = max((len(text) for text in x_ticks.values()), default=1)
    room = (frame.width - frame.left - frame.right) / max(1, len(x_ticks))
    every = max(1, math.ceil((longest * 6 + 8) / room))
    for i, (value, text) in enumerate(x_ticks.items()):
        if i % every == 0:
            _text(frame, text, frame.at_x(value), bottom + 16, anchor="middle")
    _text(frame, x_title, frame.width - frame.right, frame.height - 2, anchor="end")


def _text(frame: Frame, text: str, x: float, y: float, *, anchor: str, fill: str = MUTED) -> None:
    frame.add("text", text, x=x, y=y, text_anchor=anchor, fill=fill, font_size=10.5)


def _padded(values: Iterable[float], share: float) -> tuple[float, float]:
    finite = [v for v in values if v is not None and math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if low >= 0 and low < 0.4 * high:
        low = 0.0
    margin = (high - low) * share or abs(high) * 0.1 or 0.5
    return (low if low == 0 and share > 0.05 else low - margin, high + margin)


def _runs(*columns: Sequence[float]) -> list[list[tuple[float, ...]]]:
    """The rows of the columns, cut where one of them is undefined."""
    runs: list[list[tuple[float, ...]]] = [[]]
    for row in zip(*columns, strict=True):
        if np.isfinite(row).all():
            runs[-1].append(row)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
