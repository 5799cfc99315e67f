"""Plants and mushrooms on a stem or root in a tuft of grass: flowers, trees, cacti, mushrooms."""

from __future__ import annotations

from functools import partial

import numpy as np
from pen import Pen, arc

# fmt: off  (the points of an outline read better as rows than one to a line)


def _tuft(pen: Pen, width: float = 0.5, y: float = 0.92) -> None:
    for x in np.linspace(-width, width, 6):
        lean = pen.rng.uniform(-0.12, 0.12)
        pen.poly(
            [(x - 0.09, y), (x + lean, y - pen.jitter(0.26, 0.3)), (x + 0.09, y)], pen.look.accent
        )


def _stem(pen: Pen, top: float) -> float:
    """A bent stem with two leaves; returns where its top is, from left to right."""
    sway, look = pen.rng.uniform(-0.16, 0.16), pen.look
    pen.stroke([(0, 0.9), (0.02 - sway / 2, 0.4), (sway, top)], 0.06, look.accent)
    for side in (-1, 1):
        y = 0.55 - 0.1 * side
        pen.blob(
            [(0, y + 0.1), (side * 0.3, y - 0.2), (side * 0.58, y - 0.2), (side * 0.34, y + 0.06)],
            look.accent,
        )
    _tuft(pen, 0.3)
    return sway


def daisy(pen: Pen, *, petals: int, pointed: bool) -> None:
    look = pen.look
    x, y = _stem(pen, -0.35), -0.38
    for a in np.arange(petals) * 2 * np.pi / petals + pen.rng.uniform(0, 1):
        c, s = np.cos(a), np.sin(a)
        if pointed:
            side = (0.22 * -s, 0.22 * c)
            pen.poly(
                [
                    (x, y),
                    (x + 0.3 * c + side[0], y + 0.3 * s + side[1]),
                    (x + 0.66 * c, y + 0.66 * s),
                    (x + 0.3 * c - side[0], y + 0.3 * s - side[1]),
                ],
                look.main,
            )
        else:
            pen.oval(x + 0.38 * c, y + 0.38 * s, 0.24, 0.09, look.main, tilt=a)
    pen.oval(x, y, 0.2, 0.2, look.second)


def bellflower(pen: Pen, *, bells: int) -> None:
    look = pen.look
    _stem(pen, -0.5)
    size = 1.25 if bells == 1 else 0.78
    spots = [(-0.5, -0.3)] if bells == 1 else [(-0.62, -0.42), (-0.02, -0.42), (0.56, -0.42)]
    pen.stroke(
        arc(
            (spots[0][0] + spots[-1][0]) / 2 + (0.25 if bells == 1 else 0),
            -0.5,
            max(0.25, (spots[-1][0] - spots[0][0]) / 2),
            0.36,
            np.pi,
            2 * np.pi,
        ),
        0.05,
        look.accent,
    )
    for x, y in spots:

        def at(dx: float, dy: float, x: float = x, y: float = y) -> tuple[float, float]:
            return x + size * dx, y + size * dy

        pen.oval(*at(0, 0.42), 0.06 * size, 0.12 * size, look.second)
        pen.poly(
            [
                at(-0.12, -0.14),
                at(0.12, -0.14),
                at(0.2, 0.16),
                at(0.34, 0.42),
                at(0.17, 0.34),
                at(0, 0.42),
                at(-0.17, 0.34),
                at(-0.34, 0.42),
                at(-0.2, 0.16),
            ],
            look.main,
        )
        pen.oval(*at(0, -0.15), 0.15 * size, 0.08 * size, look.accent)


def fir(pen: Pen, *, tiers: int) -> None:
    look, width = pen.look, pen.jitter(0.62, 0.12)
    pen.box(-0.1, 0.4, 0.1, 0.92, look.second)
    _tuft(pen, 0.36)
    if tiers == 1:
        pen.poly([(0, -1.02), (0.8 * width, 0.6), (0, 0.66), (-0.8 * width, 0.6)], look.main)
        return
    for i in reversed(range(tiers)):
        top, base = -1.02 + 0.42 * i, -0.4 + 0.5 * i
        half = width * (0.6 + 0.25 * i)
        pen.poly([(0, top), (half, base), (0, base - 0.08), (-half, base)], look.main)


def cloudtree(pen: Pen, *, crowns: int) -> None:
    look = pen.look
    spots = {
        1: [(0, -0.36, 1.4)],
        2: [(-0.46, -0.2, 0.92), (0.42, -0.52, 0.92)],
        3: [(-0.56, -0.12, 0.74), (0.56, -0.16, 0.74), (0.0, -0.66, 0.74)],
    }[crowns]
    for x, y, _ in spots:
        pen.stroke([(0, 0.9), (0, 0.42), (x, y)], 0.12, look.second)
    _tuft(pen, 0.36)
    for x, y, size in spots:
        lobes = 7
        edge = []
        for a in np.arange(2 * lobes) * np.pi / lobes:
            r = size * (0.48 if round(a * lobes / np.pi) % 2 else 0.38)
            edge.append((x + 1.05 * r * np.cos(a), y + 0.95 * r * np.sin(a)))
        pen.blob(edge, look.main)


def _spines(pen: Pen, spots: list[tuple[float, float]]) -> None:
    for x, y in spots:
        pen.hair([(x - 0.06, y - 0.06), (x, y), (x + 0.06, y - 0.06)], 0.035)


def column(pen: Pen, *, arms: int) -> None:
    look, tall = pen.look, pen.jitter(0.86, 0.06)
    if arms == 0:
        for x, height in ((-0.42, 0.2), (0.42, 0.36), (0.0, tall)):
            pen.stroke([(x, 0.84), (x, -height)], 0.3, look.main)
            _spines(pen, [(x, -height + 0.1), (x, -height + 0.4), (x, -height + 0.7)])
    else:
        for side, y in ((-1, 0.34), (1, 0.1))[:arms]:
            pen.stroke([(0, y), (side * 0.5, y), (side * 0.5, y - 0.5)], 0.2, look.main)
            _spines(pen, [(side * 0.5, y - 0.2), (side * 0.5, y - 0.45)])
        pen.stroke([(0, 0.84), (0, -tall + 0.1)], 0.34, look.main)
        _spines(pen, [(0, y) for y in (-0.65, -0.35, -0.05, 0.25, 0.55)])
    _tuft(pen, 0.55)


def barrel(pen: Pen, *, kind: str) -> None:
    look = pen.look
    if kind == "pear":
        pen.oval(0, 0.48, 0.42, 0.42, look.main)
        for x, y, tilt in ((-0.36, -0.16, 0.4), (0.4, -0.1, -0.5)):
            pen.oval(x, y, 0.3, 0.38, look.main, tilt=-tilt)
            _spines(pen, [(x, y), (x - 0.1, y - 0.18), (x + 0.12, y + 0.16)])
        pen.oval(0.02, -0.62, 0.26, 0.32, look.main)
        _spines(pen, [(0, 0.35), (-0.18, 0.6), (0.2, 0.6), (0.02, -0.6)])
    else:
        rx, ry = pen.jitter(0.66, 0.08), pen.jitter(0.6, 0.08)
        if kind == "flower":
            for dx in (-0.24, 0.0, 0.24):
                pen.poly(
                    [
                        (0, -0.24),
                        (2.0 * dx - 0.12, -0.72),
                        (2.0 * dx, -0.96),
                        (2.0 * dx + 0.12, -0.72),
                    ],
                    look.second,
                )
        pen.oval(0, 0.3, rx, ry, look.main)
        for squeeze in (0.0, 0.36, 0.72):
            for side in (-1, 1):
                pen.hair(arc(0, 0.3, side * rx * squeeze, ry, -1.5, 1.5), 0.05)
        _spines(pen, [(x * rx, y) for x in (-0.55, 0, 0.55) for y in (0.1, 0.4)])
    _tuft(pen, 0.55)


def parasol(pen: Pen, *, skin: str) -> None:
    look, lean = pen.look, pen.rng.uniform(-0.1, 0.1)
    pen.poly([(-0.13 + lean, -0.2), (0.13 + lean, -0.2), (0.2, 0.9), (-0.2, 0.9)], look.pale)
    pen.poly(
        [(-0.3 + lean, 0.18), (0.3 + lean, 0.18), (0.17 + lean, 0.02), (-0.17 + lean, 0.02)],
        look.pale,
    )
    _tuft(pen, 0.42)
    dome = arc(lean, -0.1, pen.jitter(0.84, 0.08), pen.jitter(0.74, 0.1), np.pi, 2 * np.pi)
    pen.poly([*dome, (0.3 + lean, 0.02), (-0.3 + lean, 0.02)], look.main, skin=skin, period=0.34)


def morel(pen: Pen, *, comb: bool) -> None:
    look, lean = pen.look, pen.rng.uniform(-0.1, 0.1)
    pen.poly([(-0.15 + lean, 0.0), (0.15 + lean, 0.0), (0.22, 0.9), (-0.22, 0.9)], look.pale)
    _tuft(pen, 0.42)
    cap = [
        (lean, -1.0),
        (lean + 0.34, -0.6),
        (lean + 0.46, -0.1),
        (lean + 0.3, 0.22),
        (lean, 0.3),
        (lean - 0.3, 0.22),
        (lean - 0.46, -0.1),
        (lean - 0.34, -0.6),
    ]
    if comb:
        pen.blob(cap, look.main)
        for row, y in enumerate((-0.68, -0.44, -0.2, 0.04)):
            for x in ((-0.12, 0.12), (-0.26, 0.0, 0.26))[row % 2]:
                pen.oval(lean + x, y, 0.09, 0.11, look.ink, outlined=False)
    else:
        pen.poly(
            [
                (lean, -1.04),
                (lean + 0.26, -0.5),
                (lean + 0.44, 0.1),
                (lean + 0.66, 0.34),
                (lean, 0.22),
                (lean - 0.66, 0.34),
                (lean - 0.44, 0.1),
                (lean - 0.26, -0.5),
            ],
            look.main,
        )
        for x in (-0.4, -0.14, 0.14, 0.4):
            pen.hair([(lean + 0.2 * x, -0.6), (lean + x, 0.2)], 0.045)


# fmt: on
GROWING_THINGS = {
    "flower": {
        "daisy": {
            "star daisy": partial(daisy, petals=5, pointed=True),
            "wheel daisy": partial(daisy, petals=13, pointed=False),
        },
        "bellflower": {
            "lone bellflower": partial(bellflower, bells=1),
            "trio bellflower": partial(bellflower, bells=3),
        },
    },
    "tree": {
        "fir": {
            "spindle fir": partial(fir, tiers=1),
            "pagoda fir": partial(fir, tiers=3),
        },
        "cloudtree": {
            "lone cloudtree": partial(cloudtree, crowns=1),
            "twin cloudtree": partial(cloudtree, crowns=2),
            "trio cloudtree": partial(cloudtree, crowns=3),
        },
    },
    "cactus": {
        "column cactus": {
            "organ cactus": partial(column, arms=0),
            "signpost cactus": partial(column, arms=1),
            "candlestick cactus": partial(column, arms=2),
        },
        "barrel cactus": {
            "pincushion cactus": partial(barrel, kind="plain"),
            "flowering barrel": partial(barrel, kind="flower"),
            "paddle cactus": partial(barrel, kind="pear"),
        },
    },
    "mushroom": {
        "parasol": {
            "polka parasol": partial(parasol, skin="spots"),
            "humbug parasol": partial(parasol, skin="stripes"),
        },
        "morel": {
            "comb morel": partial(morel, comb=True),
            "pleated morel": partial(morel, comb=False),
        },
    },
}
