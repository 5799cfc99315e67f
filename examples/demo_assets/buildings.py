"""Buildings: walls on a plinth, doors and openings. Houses, towers, bridges and temples."""

from __future__ import annotations

from functools import partial

import numpy as np
from pen import Pen, arc

# fmt: off  (the points of an outline read better as rows than one to a line)


def _plinth(pen: Pen, half: float) -> None:
    pen.box(-half, 0.82, half, 0.96, pen.look.pale)


def _door(pen: Pen, x: float, width: float, height: float, base: float = 0.84) -> None:
    top = arc(x, base - height + width / 2, width / 2, width / 2, np.pi, 2 * np.pi, n=8)
    pen.poly([(x - width / 2, base), *top, (x + width / 2, base)], pen.look.accent)


def _window(pen: Pen, x: float, y: float, size: float) -> None:
    pen.box(x - size, y - size, x + size, y + size, pen.look.pale)
    pen.hair([(x, y - size), (x, y + size)], 0.035)


def cottage(pen: Pen, *, extra: str) -> None:
    look, eaves = pen.look, pen.jitter(0.06, 0.8)
    _plinth(pen, 0.98)
    if extra == "chimney":
        pen.box(0.34, -0.82, 0.6, -0.2, look.accent)
        for i in range(3):
            pen.oval(0.5 + 0.12 * i, -0.92 - 0.05 * i, 0.1 + 0.02 * i, 0.08, look.pale)
    pen.box(-0.72, -0.04, 0.72, 0.84, look.main)
    pen.poly([(-0.94, eaves), (-0.46, -0.66), (0.46, -0.66), (0.94, eaves)], look.second)
    if extra == "dormer":
        for x in (-0.34, 0.34):
            pen.poly([(x - 0.24, -0.3), (x, -0.62), (x + 0.24, -0.3)], look.second)
            pen.box(x - 0.17, -0.32, x + 0.17, -0.04, look.main)
            _window(pen, x, -0.18, 0.09)
    for x in (-0.42, 0.42):
        _window(pen, x, 0.38, 0.15)
    _door(pen, 0.0, 0.26, 0.52)


def townhouse(pen: Pen, *, gable: str) -> None:
    look, half = pen.look, pen.jitter(0.46, 0.1)
    _plinth(pen, 0.7)
    if gable == "steps":
        pen.poly(
            [
                (-half, 0.84),
                (-half, -0.36),
                (-0.68 * half, -0.36),
                (-0.68 * half, -0.66),
                (-0.34 * half, -0.66),
                (-0.34 * half, -0.96),
                (0.34 * half, -0.96),
                (0.34 * half, -0.66),
                (0.68 * half, -0.66),
                (0.68 * half, -0.36),
                (half, -0.36),
                (half, 0.84),
            ],
            look.main,
        )
    else:
        pen.box(-half, -0.62, half, 0.84, look.main)
        pen.poly(
            [(-half - 0.1, -0.56), (-0.8 * half, -0.92), (0.8 * half, -0.92), (half + 0.1, -0.56)],
            look.second,
        )
    for y in (-0.3, 0.08):
        for x in (-0.5 * half, 0.5 * half):
            _window(pen, x, y, 0.11)
    _door(pen, 0.0, 0.26, 0.46)


def lighthouse(pen: Pen, *, skin: str) -> None:
    look, top = pen.look, pen.jitter(0.22, 0.12)
    _plinth(pen, 0.62)
    pen.poly(
        [(-0.4, 0.84), (-top, -0.46), (top, -0.46), (0.4, 0.84)], look.main, skin=skin, period=0.48
    )
    pen.box(-0.36, -0.54, 0.36, -0.44, look.accent)
    pen.box(-0.2, -0.78, 0.2, -0.52, (255, 244, 190))
    pen.poly([(-0.28, -0.76), (0, -1.04), (0.28, -0.76)], look.accent)
    _door(pen, 0.0, 0.22, 0.34)


def keep(pen: Pen, *, towers: int) -> None:
    look = pen.look
    _plinth(pen, 0.98)
    flanks = {1: [(0.0, 0.36, -0.72)], 2: [(-0.6, 0.26, -0.56), (0.6, 0.26, -0.56)]}[towers]
    if towers == 2:
        pen.box(-0.5, -0.06, 0.5, 0.84, look.second)
    else:
        pen.box(-0.84, 0.2, 0.84, 0.84, look.second)
    for x, half, top in flanks:
        pen.box(x - half, top, x + half, 0.84, look.main)
        step = 2 * half / 5
        for i in range(3):
            left = x - half + 2 * i * step
            pen.box(left, top - 0.18, left + step, top + 0.02, look.main)
        pen.box(x - 0.06, top + 0.2, x + 0.06, top + 0.5, look.ink)
    x, _, top = flanks[0]
    pen.hair([(x, top - 0.02), (x, top - 0.42)], 0.05)
    pen.poly([(x, top - 0.44), (x + 0.34, top - 0.34), (x, top - 0.24)], look.accent)
    _door(pen, 0.0, 0.32, 0.44)


def mill(pen: Pen, *, sails: int) -> None:
    look, turn = pen.look, pen.rng.uniform(0, 2 * np.pi)
    _plinth(pen, 0.62)
    pen.poly([(-0.44, 0.84), (-0.26, -0.22), (0.26, -0.22), (0.44, 0.84)], look.main)
    pen.poly([*arc(0, -0.2, 0.32, 0.34, np.pi, 2 * np.pi)], look.second)
    _window(pen, 0.0, 0.2, 0.09)
    _door(pen, 0.0, 0.22, 0.34)
    for a in np.arange(sails) * 2 * np.pi / sails + turn:
        c, s = np.cos(a), np.sin(a)
        along, across = np.array([c, s]), np.array([-s, c])
        hub = np.array([0.0, -0.24])
        pen.hair([tuple(hub), tuple(hub + 0.8 * along)], 0.05)
        wide = 0.2 if sails == 4 else 0.14
        corners = [
            hub + 0.2 * along,
            hub + 0.8 * along,
            hub + 0.8 * along + wide * across,
            hub + 0.2 * along + wide * across,
        ]
        pen.poly([tuple(p) for p in corners], look.accent)
    pen.oval(0, -0.24, 0.08, 0.08, look.second)


def _deck_water(pen: Pen) -> None:
    crests = [(x, 0.84 + 0.05 * np.sin(8 * x)) for x in np.linspace(-1.05, 1.05, 20)]
    pen.stroke(crests, 0.05, pen.look.pale)


def stone_bridge(pen: Pen, *, arches: int) -> None:
    look, rise = pen.look, pen.jitter(0.16, 0.4)
    deck = [(x, -0.16 - rise * (1 - x * x)) for x in np.linspace(-1.06, 1.06, 15)]
    half = {1: 0.66, 2: 0.4, 3: 0.27}[arches]
    height = {1: 0.72, 2: 0.62, 3: 0.56}[arches]
    centres = np.linspace(-1.06, 1.06, 2 * arches + 1)[1::2] if arches > 1 else [0.0]
    underside: list[tuple[float, float]] = []
    for x in centres:
        curve = arc(float(x), 0.8, half, height, 2 * np.pi, np.pi)
        underside = [(float(a), float(b)) for a, b in curve] + underside
    pen.poly([*deck, (1.06, 0.8), *underside, (-1.06, 0.8)], look.main)
    pen.stroke(deck, 0.1, look.second)
    for x in np.linspace(-0.9, 0.9, 7):
        y = -0.16 - rise * (1 - x * x)
        pen.hair([(x, y), (x, y - 0.16)], 0.05)
    _deck_water(pen)


def hanging_bridge(pen: Pen, *, pylons: int) -> None:
    look = pen.look
    xs = [0.0] if pylons == 1 else [-0.52, 0.52]
    deck, top = 0.36, pen.jitter(-0.78, 0.08)
    if pylons == 1:
        for x in np.linspace(0.25, 1.0, 4):
            for side in (-1, 1):
                pen.hair([(0, top + 0.06), (side * x, deck)], 0.04)
    else:
        cable = [
            (x, deck - 0.08 + (top - deck + 0.16) * (x / 0.52) ** 2)
            for x in np.linspace(-0.52, 0.52, 15)
        ]
        pen.hair([(-1.06, deck), (-0.52, top), *cable, (0.52, top), (1.06, deck)], 0.05)
        for x, y in cable[2:-2:2]:
            pen.hair([(x, y), (x, deck)], 0.03)
    for x in xs:
        pen.poly([(x - 0.13, 0.84), (x - 0.08, top), (x + 0.08, top), (x + 0.13, 0.84)], look.main)
    pen.box(-1.08, deck, 1.08, deck + 0.13, look.second)
    _deck_water(pen)


def _columns(pen: Pen, n: int, top: float) -> None:
    for x in np.linspace(-0.68, 0.68, n):
        pen.box(x - 0.085, top, x + 0.085, 0.84, pen.look.main)


def portico(pen: Pen, *, roof: str) -> None:
    look = pen.look
    _plinth(pen, 1.0)
    pen.box(-0.72, -0.1, 0.72, 0.84, look.ink)
    _columns(pen, 5, -0.12)
    if roof == "peak":
        pen.poly([(-0.98, -0.1), (0, pen.jitter(-0.78, 0.1)), (0.98, -0.1)], look.second)
        pen.oval(0, -0.32, 0.13, 0.13, look.accent)
    else:
        for i, half in enumerate((0.96, 0.66, 0.36)):
            pen.box(-half, -0.32 - 0.22 * i, half, -0.1 - 0.22 * i, look.second)


def dome(pen: Pen, *, kind: str) -> None:
    look = pen.look
    _plinth(pen, 1.0)
    pen.box(-0.78, 0.06, 0.78, 0.84, look.main)
    if kind == "onion":
        pen.hair([(0, -0.7), (0, -1.1)], 0.06)
        pen.blob(
            [
                (-0.3, 0.08),
                (-0.52, -0.26),
                (-0.22, -0.62),
                (0, -0.9),
                (0.22, -0.62),
                (0.52, -0.26),
                (0.3, 0.08),
            ],
            look.second,
        )
    elif kind == "half":
        pen.poly([*arc(0, 0.08, 0.7, pen.jitter(0.74, 0.08), np.pi, 2 * np.pi)], look.second)
        pen.poly([(-0.1, 0.04), (0.02, -0.64), (0.2, -0.58), (0.14, 0.04)], look.ink)
    else:
        for x, r in ((-0.54, 0.26), (0.54, 0.26), (0.0, 0.38)):
            pen.hair([(x, 0.0), (x, -1.5 * r - 0.16)], 0.05)
            pen.poly([*arc(x, 0.08, r, 1.3 * r, np.pi, 2 * np.pi)], look.second)
    for x in (-0.52, 0.52):
        _door(pen, x, 0.2, 0.36, base=0.66)
    _door(pen, 0.0, 0.32, 0.54)


# fmt: on
BUILDINGS = {
    "house": {
        "cottage": {
            "chimney cottage": partial(cottage, extra="chimney"),
            "dormer cottage": partial(cottage, extra="dormer"),
        },
        "townhouse": {
            "stair townhouse": partial(townhouse, gable="steps"),
            "mansard townhouse": partial(townhouse, gable="mansard"),
        },
    },
    "tower": {
        "lighthouse": {
            "banded lighthouse": partial(lighthouse, skin="bands"),
            "barber lighthouse": partial(lighthouse, skin="slants"),
        },
        "keep": {
            "lone keep": partial(keep, towers=1),
            "twin keep": partial(keep, towers=2),
        },
        "windmill": {
            "four-sail mill": partial(mill, sails=4),
            "six-sail mill": partial(mill, sails=6),
        },
    },
    "bridge": {
        "stone bridge": {
            "one-arch bridge": partial(stone_bridge, arches=1),
            "three-arch bridge": partial(stone_bridge, arches=3),
        },
        "hanging bridge": {
            "one-pylon bridge": partial(hanging_bridge, pylons=1),
            "two-pylon bridge": partial(hanging_bridge, pylons=2),
        },
    },
    "temple": {
        "portico": {
            "peaked portico": partial(portico, roof="peak"),
            "stepped portico": partial(portico, roof="steps"),
        },
        "domed hall": {
            "onion hall": partial(dome, kind="onion"),
            "observatory hall": partial(dome, kind="half"),
            "three-dome hall": partial(dome, kind="three"),
        },
    },
}
