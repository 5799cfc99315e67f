"""Vehicles: hard edges, windows and a means of moving. On roads, on water, in the air, on rails."""

from __future__ import annotations

from functools import partial

import numpy as np
from pen import Pen, arc

# fmt: off  (the points of an outline read better as rows than one to a line)


def _panes(pen: Pen, xs: list[float], y0: float, y1: float, width: float) -> None:
    for x in xs:
        pen.box(x, y0, x + width, y1, pen.look.pale)


def buggy(pen: Pen, *, top: str) -> None:
    look, r = pen.look, pen.jitter(0.25, 0.1)
    if top == "dome":
        pen.poly([*arc(0.02, 0.0, 0.62, 0.6, np.pi, 2 * np.pi)], look.main)
        pen.poly([*arc(-0.06, -0.02, 0.42, 0.42, np.pi, 1.5 * np.pi), (-0.06, -0.02)], look.pale)
        pen.poly([(0.08, -0.02), *arc(0.08, -0.02, 0.4, 0.42, 1.5 * np.pi, 2 * np.pi)], look.pale)
    elif top == "estate":
        pen.poly([(-0.62, 0.0), (-0.36, -0.46), (0.84, -0.46), (0.9, 0.0)], look.main)
        _panes(pen, [-0.28, 0.08, 0.44], -0.36, -0.04, 0.28)
    else:
        pen.stroke([(-0.3, 0.0), (-0.12, -0.42)], 0.05, look.pale)
        pen.oval(0.2, -0.22, 0.15, 0.18, look.second)
        pen.stroke([(0.42, 0.06), (0.5, -0.22)], 0.1, look.accent)
    pen.blob(
        [
            (-0.98, 0.32),
            (-0.92, 0.08),
            (-0.5, -0.04),
            (0.5, -0.06),
            (0.92, 0.04),
            (0.98, 0.34),
            (0.5, 0.42),
            (-0.5, 0.42),
        ],
        look.main,
    )
    pen.oval(-0.88, 0.14, 0.08, 0.08, look.accent)
    for x in (-0.52, 0.54):
        pen.wheel(x, 0.4, r)


def lorry(pen: Pen, *, load: str) -> None:
    look, r = pen.look, pen.jitter(0.19, 0.1)
    pen.box(-0.9, 0.28, 0.98, 0.42, look.ink)
    if load == "box":
        pen.box(-0.36, -0.62, 0.98, 0.3, look.second)
        pen.hair([(-0.3, -0.2), (0.94, -0.2)], 0.05)
    elif load == "tank":
        pen.oval(0.32, -0.06, 0.66, 0.34, look.second)
        pen.box(0.2, -0.5, 0.44, -0.38, look.accent)
    else:
        for x, y, s in ((-0.02, -0.32, 0.2), (0.3, -0.42, 0.24), (0.62, -0.34, 0.22)):
            pen.oval(x, y, s, 0.8 * s, look.accent)
        pen.poly([(-0.36, -0.24), (1.06, -0.24), (0.9, 0.3), (-0.24, 0.3)], look.second)
    pen.poly([(-0.94, 0.3), (-0.94, -0.06), (-0.82, -0.4), (-0.46, -0.4), (-0.46, 0.3)], look.main)
    pen.poly([(-0.86, -0.06), (-0.78, -0.3), (-0.56, -0.3), (-0.56, -0.06)], look.pale)
    for x in (-0.66, 0.3, 0.72):
        pen.wheel(x, 0.46, r)


def _sea(pen: Pen) -> None:
    crests = [(x, 0.66 + 0.07 * np.sin(9 * x)) for x in np.linspace(-1.05, 1.05, 22)]
    pen.stroke(crests, 0.07, pen.look.pale)


def sailer(pen: Pen, *, masts: int) -> None:
    look = pen.look
    if masts == 1:
        pen.stroke([(0, 0.3), (0, -0.98)], 0.05, look.second)
        pen.poly([(0.08, -0.92), (0.08, 0.16), (pen.jitter(0.78), 0.16)], look.main)
        pen.poly([(-0.08, -0.72), (-0.08, 0.16), (pen.jitter(-0.62), 0.16)], look.accent)
    else:
        for x, top in ((-0.36, -0.78), (0.34, -0.98)):
            pen.stroke([(x, 0.3), (x, top)], 0.05, look.second)
            for y0, y1, w in ((top + 0.08, top + 0.44, 0.24), (top + 0.52, 0.16, 0.32)):
                pen.poly(
                    [(x - w, y1), (x - 0.8 * w, y0), (x + 0.8 * w, y0), (x + w, y1), (x, y1 - 0.1)],
                    look.main,
                )
    pen.poly([(-0.92, 0.28), (0.96, 0.28), (0.62, 0.66), (-0.6, 0.66)], look.second)
    _sea(pen)


def steamer(pen: Pen, *, funnels: int) -> None:
    look = pen.look
    xs = {1: [0.06], 2: [-0.2, 0.3], 3: [-0.32, 0.04, 0.4]}[funnels]
    width = {1: 0.17, 2: 0.12, 3: 0.1}[funnels]
    for x in xs:
        pen.poly(
            [
                (x - width, 0.0),
                (x - width + 0.03, -0.72),
                (x + width + 0.03, -0.72),
                (x + width, 0.0),
            ],
            look.accent,
        )
        pen.box(x - width + 0.02, -0.58, x + width + 0.02, -0.42, look.pale, outlined=False)
    pen.box(-0.56, -0.08, 0.66, 0.22, look.pale)
    for x in (-0.38, -0.1, 0.18, 0.46):
        pen.oval(x, 0.07, 0.06, 0.06, look.ink, outlined=False)
    pen.poly([(-1.02, 0.2), (0.98, 0.2), (0.8, 0.66), (-0.72, 0.66)], look.main)
    pen.hair([(-0.86, 0.36), (0.92, 0.36)], 0.05)
    _sea(pen)


def plane(pen: Pen, *, wings: int) -> None:
    look = pen.look
    pen.poly([(0.62, -0.1), (0.86, -0.58), (1.02, -0.58), (0.96, 0.02)], look.second)
    pen.hair([(-0.86, -0.42), (-0.86, 0.42)], 0.08)
    if wings == 2:
        for x in (-0.4, 0.16):
            pen.hair([(x, -0.62), (x, 0.26)], 0.06)
    pen.blob(
        [
            (-0.86, 0.0),
            (-0.6, -0.2),
            (0.1, -0.2),
            (0.98, -0.06),
            (0.98, 0.06),
            (0.1, 0.24),
            (-0.6, 0.22),
        ],
        look.main,
    )
    pen.blob([(-0.34, -0.16), (-0.16, -0.38), (0.14, -0.34), (0.2, -0.16)], look.pale)
    if wings == 2:
        for y in (-0.64, 0.28):
            pen.blob(
                [(-0.64, y - 0.07), (0.36, y - 0.07), (0.44, y + 0.03), (-0.62, y + 0.08)],
                look.accent,
            )
    else:
        pen.poly([(-0.4, 0.04), (0.1, 0.04), (0.56, 0.62), (0.28, 0.66)], look.accent)
    pen.oval(-0.86, 0, 0.09, 0.1, look.second)
    for x in (-0.46, -0.06):
        pen.wheel(x, 0.54 if wings == 2 else 0.38, 0.11)


def whirler(pen: Pen, *, rotors: int) -> None:
    look = pen.look
    for x in (-0.5, 0.16) if rotors == 1 else (-0.4, 0.4):
        pen.hair([(x, 0.2), (x, 0.62)], 0.06)
    pen.stroke([(-0.72, 0.64), (0.42, 0.64)], 0.05, look.second)
    masts = [-0.2] if rotors == 1 else [-0.56, 0.6]
    reach = 0.84 if rotors == 1 else 0.46
    if rotors == 1:
        pen.poly([(0.1, -0.16), (1.0, -0.1), (1.0, 0.0), (0.1, 0.22)], look.main)
        pen.oval(0.98, -0.08, 0.2, 0.2, look.accent)
        pen.blob(
            [
                (-0.86, 0.12),
                (-0.66, -0.24),
                (-0.14, -0.36),
                (0.3, -0.14),
                (0.28, 0.26),
                (-0.2, 0.42),
                (-0.7, 0.36),
            ],
            look.main,
        )
        pen.blob([(-0.8, 0.1), (-0.6, -0.18), (-0.28, -0.22), (-0.28, 0.1)], look.pale)
    else:
        pen.blob(
            [
                (-0.92, 0.12),
                (-0.74, -0.18),
                (-0.2, -0.1),
                (0.3, -0.12),
                (0.82, -0.3),
                (0.92, 0.1),
                (0.6, 0.36),
                (-0.6, 0.38),
            ],
            look.main,
        )
        pen.blob([(-0.88, 0.1), (-0.7, -0.12), (-0.46, -0.1), (-0.46, 0.12)], look.pale)
        _panes(pen, [-0.18, 0.14, 0.46], 0.0, 0.16, 0.16)
    for x in masts:
        pen.stroke([(x, -0.2), (x, -0.56)], 0.06, look.second)
        tilt = pen.rng.uniform(-0.06, 0.06)
        pen.stroke([(x - reach, -0.58 + tilt), (x + reach, -0.58 - tilt)], 0.07, look.accent)


def _rails(pen: Pen) -> None:
    pen.hair([(-1.08, 0.8), (1.08, 0.8)], 0.06)
    for x in np.arange(-1.0, 1.1, 0.25):
        pen.hair([(x, 0.8), (x, 0.9)], 0.07)


def engine(pen: Pen, *, steam: bool) -> None:
    look = pen.look
    _rails(pen)
    if steam:
        for i, (x, y) in enumerate(((-0.5, -0.92), (-0.2, -1.02), (0.12, -0.98))):
            pen.oval(x, y, 0.15 + 0.02 * i, 0.12, look.pale)
        pen.poly(
            [
                (-0.72, -0.1),
                (-0.66, -0.62),
                (-0.78, -0.78),
                (-0.36, -0.78),
                (-0.46, -0.62),
                (-0.4, -0.1),
            ],
            look.second,
        )
        pen.oval(0.04, -0.24, 0.15, 0.2, look.accent)
        pen.box(0.34, -0.68, 0.96, 0.5, look.main)
        pen.box(0.46, -0.5, 0.82, -0.14, look.pale)
        pen.box(0.26, -0.78, 1.02, -0.64, look.second)
        pen.box(-0.86, -0.2, 0.36, 0.42, look.main)
        for x in (-0.44, 0.0):
            pen.hair([(x, -0.2), (x, 0.42)], 0.05)
    else:
        pen.blob(
            [
                (-1.06, 0.42),
                (-0.9, 0.0),
                (-0.5, -0.42),
                (0.1, -0.5),
                (0.96, -0.5),
                (1.0, 0.0),
                (0.98, 0.5),
                (0.0, 0.52),
            ],
            look.main,
        )
        pen.poly([(-0.74, -0.06), (-0.46, -0.34), (-0.16, -0.38), (-0.16, -0.06)], look.pale)
        _panes(pen, [0.04, 0.36, 0.68], -0.34, -0.08, 0.2)
        pen.stroke([(-0.8, 0.2), (0.94, 0.2)], 0.08, look.second)
    pen.poly([(-0.86, 0.44), (-1.1, 0.74), (-0.8, 0.74)], look.accent)
    for x in (-0.56, 0.02, 0.62):
        pen.wheel(x, 0.58, 0.22 if steam else 0.17)


def wagon(pen: Pen, *, load: str) -> None:
    look = pen.look
    _rails(pen)
    pen.hair([(-1.1, 0.48), (1.1, 0.48)], 0.07)
    if load == "coal":
        for x, y, s in ((-0.5, -0.18, 0.26), (0.0, -0.3, 0.3), (0.5, -0.2, 0.26)):
            pen.oval(x, y, s, 0.8 * s, look.accent)
        pen.poly([(-0.98, -0.14), (0.98, -0.14), (0.86, 0.48), (-0.86, 0.48)], look.main)
        for x in (-0.44, 0.0, 0.44):
            pen.hair([(x, -0.14), (x, 0.48)], 0.06)
    elif load == "tank":
        pen.oval(0, 0.06, 0.94, 0.42, look.main)
        pen.box(-0.16, -0.5, 0.16, -0.32, look.second)
        for x in (-0.4, 0.4):
            pen.hair([(x, -0.32), (x, 0.44)], 0.06)
    else:
        pen.box(-0.96, -0.5, 0.96, 0.48, look.main)
        pen.poly([(-1.04, -0.46), (-0.86, -0.7), (0.86, -0.7), (1.04, -0.46)], look.second)
        _panes(pen, [-0.82, -0.4, 0.1, 0.52], -0.32, 0.02, 0.3)
        pen.stroke([(-0.88, 0.24), (0.88, 0.24)], 0.06, look.second)
    for x in (-0.6, 0.6):
        pen.wheel(x, 0.6, 0.19)


# fmt: on
VEHICLES = {
    "road vehicle": {
        "buggy": {
            "dome buggy": partial(buggy, top="dome"),
            "estate buggy": partial(buggy, top="estate"),
            "open buggy": partial(buggy, top="open"),
        },
        "lorry": {
            "box lorry": partial(lorry, load="box"),
            "tank lorry": partial(lorry, load="tank"),
            "tipper lorry": partial(lorry, load="heap"),
        },
    },
    "boat": {
        "sailer": {
            "one-mast sailer": partial(sailer, masts=1),
            "two-mast sailer": partial(sailer, masts=2),
        },
        "steamer": {
            "one-funnel steamer": partial(steamer, funnels=1),
            "three-funnel steamer": partial(steamer, funnels=3),
        },
    },
    "aircraft": {
        "plane": {
            "monoplane": partial(plane, wings=1),
            "biplane": partial(plane, wings=2),
        },
        "whirler": {
            "solo whirler": partial(whirler, rotors=1),
            "tandem whirler": partial(whirler, rotors=2),
        },
    },
    "train": {
        "engine": {
            "steam engine": partial(engine, steam=True),
            "bullet engine": partial(engine, steam=False),
        },
        "wagon": {
            "coal wagon": partial(wagon, load="coal"),
            "tank wagon": partial(wagon, load="tank"),
            "coach wagon": partial(wagon, load="coach"),
        },
    },
}
