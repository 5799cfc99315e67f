"""Icicle chart of the class tree: root at the left, classes at the right, coloured by best F1."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from ...registry.taxonomies.taxonomy import Taxonomy
from .charts import GRID, INK, element, number, svg
from .short_names import fitted, short_names

STEPS = (
    (0.1, "#f4f6f9"),
    (0.25, "#d3e0ed"),
    (0.4, "#a5c2de"),
    (0.55, "#6c9dc9"),
    (0.75, "#2d72ae"),
    (1.01, "#0b4f8a"),
)
NOT_SCORED = "url(#not-scored)"
ROOT_WIDTH = 0.3  # of a column: the root is not scored


@dataclass(frozen=True)
class Cell:
    """A node's rectangle: its column, and the rows of its classes."""

    node: int
    column: int
    first: int
    rows: int


class Icicle:
    """The layout of a taxonomy, made once and drawn for many SAEs.

    Chains of single children are merged; a node with two parents is drawn below its primary one.

    Args:
        taxonomy: the class tree.
        short: name of a node -> what is written for it; by default `short_names` of all.
    """

    def __init__(self, taxonomy: Taxonomy, short: Mapping[str, str] | None = None) -> None:
        self.short = short_names(labels(taxonomy)) if short is None else short
        self.taxonomy = taxonomy.collapsed()
        self.cells, self.n_rows = _cells(self.taxonomy)
        self.n_columns = self.taxonomy.max_depth + 1

    @property
    def hatching(self) -> Markup:
        """The fill pattern of nodes that are not scored, to be put into the page once."""
        line = element("path", d="M0 4l4 -4", stroke="#d4d4da", stroke_width=0.8)
        return Markup(
            '<svg style="position: absolute; width: 0; height: 0" aria-hidden="true"><defs>'
            '<pattern id="not-scored" width="4" height="4" patternUnits="userSpaceOnUse">'
            f'<rect width="4" height="4" fill="#fff"/>{line}</pattern></defs></svg>'
        )

    def draw(self, f1: Mapping[str, float], *, label: str, width: int = 1120) -> Markup:
        """The large drawing, with names where they fit and every number on hovering."""
        unit = min(14.0, max(1.7, 940 / self.n_rows))
        parts = []
        for cell in self.cells:
            name, value = self.taxonomy.label(cell.node), self._value(f1, cell.node)
            x, column = self._span(cell, width)
            y, height = cell.first * unit, cell.rows * unit
            n_classes = int(self.taxonomy.n_leaves[cell.node])
            classes = "1 class" if n_classes == 1 else f"{n_classes} classes"
            score = f"F1 {number(value)}" if math.isfinite(value) else "not scored"
            rectangle = element(
                "rect",
                x=x,
                y=y,
                width=column - 1,
                height=max(height - 0.6, 0.8),
                fill=colour(value),
                stroke=GRID,
                stroke_width=0.5,
            )
            parts.append(f"<g>{element('title', f'{name}: {score}, {classes}')}{rectangle}</g>")
            if height >= 10.5:
                short = self.short.get(name, name)
                parts.append(_label(short, value, x, y + height / 2, column))
        return svg("".join(parts), width, self.n_rows * unit, label)

    def sketch(self, f1: Mapping[str, float], *, label: str) -> Markup:
        """The small drawing: one path per colour."""
        width, height = 160, 120
        unit = height / self.n_rows
        paths: dict[str, list[str]] = defaultdict(list)
        for cell in self.cells:
            x, column = self._span(cell, width)
            y = cell.first * unit
            w, h = column - 0.5, max(cell.rows * unit - 0.15, 0.3)
            fill = colour(self._value(f1, cell.node)).replace(NOT_SCORED, "#fff")
            paths[fill].append(f"M{x:.1f} {y:.1f}h{w:.1f}v{h:.1f}h-{w:.1f}z")
        drawn = [element("path", d="".join(path), fill=fill) for fill, path in paths.items()]
        edge = element("rect", width=width, height=height, fill="none", stroke=GRID)
        return svg("".join(drawn) + edge, width, height, label)

    def _span(self, cell: Cell, width: float) -> tuple[float, float]:
        """The left edge and the width of a cell's column."""
        column = width / (self.n_columns - 1 + ROOT_WIDTH)
        if cell.column == 0:
            return 0.0, ROOT_WIDTH * column
        return (cell.column - 1 + ROOT_WIDTH) * column, column

    def _value(self, f1: Mapping[str, float], node: int) -> float:
        return f1.get(self.taxonomy.nodes[node], math.nan)


def labels(taxonomy: Taxonomy) -> list[str]:
    """The human name of every node."""
    return [taxonomy.label(v) for v in range(len(taxonomy.nodes))]


def colour(value: float) -> str:
    """The fill of an F1 value; hatched where undefined."""
    if not math.isfinite(value):
        return NOT_SCORED
    return next(fill for bound, fill in STEPS if value < bound)


def scale() -> list[tuple[str, str]]:
    """(fill, range of F1) for the legend."""
    bounds = [0.0, *(bound for bound, _ in STEPS[:-1]), 1.0]
    return [(fill, f"{low:g}–{high:g}") for (_, fill), low, high in zip(STEPS, bounds, bounds[1:])]


def _cells(taxonomy: Taxonomy) -> tuple[list[Cell], int]:
    below: dict[int, list[int]] = defaultdict(list)
    for v in range(1, len(taxonomy.nodes)):
        below[int(taxonomy.primary_parent[v])].append(v)
    is_class = set(taxonomy.class_nodes.tolist())
    first: dict[int, int] = {}
    end: dict[int, int] = {}
    at = 0
    stack = [(taxonomy.root, False)]
    while stack:
        v, leaving = stack.pop()
        if leaving:
            end[v] = at
            continue
        first[v] = at
        at += v in is_class  # a class has its own row, even where others are below it
        stack.append((v, True))
        # The largest branches first, so that the drawing reads from the top.
        children = sorted(below[v], key=lambda c: (taxonomy.n_leaves[c], taxonomy.label(c)))
        stack.extend((child, False) for child in children)
    cells = [Cell(v, int(taxonomy.depth[v]), first[v], end[v] - first[v]) for v in first]
    return [cell for cell in cells if cell.rows], at


def _label(short: str, value: float, x: float, middle: float, column: float) -> str:
    room = int((column - 8) / 5.4)
    shown = f"  {value:.2f}".replace("0.", ".") if math.isfinite(value) else ""
    if len(short) + len(shown) > room:
        shown = ""
    text = fitted(short, room)
    dark = math.isfinite(value) and value >= STEPS[3][0]
    return element(
        "text", text + shown, x=x + 4, y=middle + 3.4, font_size=10, fill="#fff" if dark else INK
    )
