"""Animals: rounded bodies and an eye (or two). Fish, birds, insects and four-legged beasts."""

from __future__ import annotations

from functools import partial

import numpy as np
from pen import Pen, arc

# fmt: off  (the points of an outline read better as rows than one to a line)


def puffer(pen: Pen, *, skin: str = "plain", spines: bool = False) -> None:
    look, rx, ry = pen.look, pen.jitter(0.62, 0.08), pen.jitter(0.56, 0.08)
    if spines:
        for a in np.arange(15) * 2 * np.pi / 15 + 0.2:
            tip = (1.4 * rx * np.cos(a), 1.42 * ry * np.sin(a))
            left, right = (
                (0.95 * rx * np.cos(a + d), 0.95 * ry * np.sin(a + d)) for d in (-0.15, 0.15)
            )
            pen.poly([left, tip, right], look.second)
    pen.blob([(0.5, 0), (0.92, -0.3), (0.84, 0), (0.92, 0.3)], look.accent)
    pen.blob([(-0.1, -0.45), (0.1, -0.8), (0.35, -0.72), (0.3, -0.4)], look.accent)
    pen.oval(0, 0, rx, ry, look.main, skin=skin, period=0.34)
    pen.blob([(0.02, 0.08), (0.34, 0.0), (0.36, 0.3)], look.accent)
    pen.hair(arc(-0.62, 0.12, 0.16, 0.1, -0.6, 1.2))
    pen.eye(-0.32, -0.16, 0.15)


def pike(pen: Pen, *, sabre: bool = False, sail: bool = False) -> None:
    look, height = pen.look, pen.jitter(0.24, 0.15)
    pen.poly([(0.6, 0), (1.0, -0.38), (0.86, 0), (1.0, 0.38)], look.accent)
    if sail:
        pen.poly(
            [(-0.35, -0.1), (-0.3, -0.78), (-0.05, -0.86), (0.2, -0.7), (0.45, -0.1)],
            look.accent,
            skin="stripes",
            period=0.16,
        )
    else:
        pen.poly([(0.1, -0.1), (0.35, -0.42), (0.42, -0.1)], look.accent)
    pen.poly([(0.1, 0.1), (0.35, 0.42), (0.42, 0.1)], look.accent)
    if sabre:
        pen.poly([(-0.5, -0.1), (-1.12, -0.02), (-0.5, 0.1)], look.second)
    pen.blob(
        [
            (-0.78, 0.02),
            (-0.5, -height),
            (0.1, -height),
            (0.72, -0.06),
            (0.72, 0.06),
            (0.1, height),
            (-0.5, height),
        ],
        look.main,
    )
    pen.hair(arc(-0.32, 0, 0.1, 0.17, -1.2, 1.2))
    pen.eye(-0.55, -0.06, 0.1)


def chirper(pen: Pen, *, crown: bool = False, ribbon: bool = False) -> None:
    look = pen.look
    for x in (-0.02, 0.2):
        pen.stroke([(x, 0.4), (x - 0.04, 0.84), (x - 0.18, 0.86)], 0.04, look.accent)
    if ribbon:
        for drop in (0.0, 0.2):
            pen.stroke(
                [(0.42, 0.12), (0.8, 0.1 + drop), (1.08, 0.36 + 1.5 * drop)], 0.09, look.second
            )
    else:
        pen.poly([(0.4, -0.02), (0.82, -0.12), (0.84, 0.1), (0.4, 0.3)], look.second)
    if crown:
        for dx, dy in ((-0.16, -0.38), (0.02, -0.44), (0.2, -0.36)):
            pen.poly([(-0.52, -0.42), (-0.4 + dx, -0.5 + dy), (-0.22, -0.44)], look.accent)
    pen.poly([(-0.62, -0.36), (-0.98, -0.22), (-0.6, -0.14)], look.accent)
    pen.blob(
        [
            (-0.66, -0.3),
            (-0.36, -0.54),
            (-0.08, -0.36),
            (0.3, -0.22),
            (0.56, 0.1),
            (0.2, 0.46),
            (-0.24, 0.44),
            (-0.5, 0.1),
        ],
        look.main,
    )
    pen.blob([(-0.14, -0.04), (0.3, -0.08), (0.56, 0.16), (0.1, 0.28)], look.second)
    pen.eye(-0.42, -0.28, 0.1)


def wader(pen: Pen, *, bill: str) -> None:
    look, sway = pen.look, pen.rng.uniform(-0.08, 0.08)
    for x in (0.05, 0.3):
        pen.stroke([(x, 0.1), (x + 0.06 + sway, 0.5), (x - 0.02, 0.98)], 0.035, look.accent)
    if bill == "hook":
        pen.stroke(arc(-0.55, -0.28, 0.42, 0.46, -1.5, -3.1), 0.06, look.accent)
    else:
        pen.stroke([(-0.5, -0.74), (-0.86, -0.62)], 0.06, look.accent)
        pen.oval(-0.94, -0.58, 0.15, 0.11, look.accent, tilt=-0.4)
    pen.stroke([(-0.18, 0.0), (-0.4, -0.25), (-0.3, -0.5), (-0.42, -0.74)], 0.13, look.main)
    pen.oval(-0.44, -0.76, 0.17, 0.14, look.main)
    pen.blob(
        [(-0.32, -0.02), (0.1, -0.26), (0.62, 0.0), (0.8, 0.16), (0.3, 0.26), (-0.15, 0.2)],
        look.main,
    )
    pen.blob([(0.0, -0.08), (0.4, -0.06), (0.74, 0.12), (0.2, 0.16)], look.second)
    pen.eye(-0.46, -0.78, 0.08)


def _six_legs(pen: Pen, reach: float) -> None:
    for y, splay in ((-0.25, -0.3), (0.05, 0.05), (0.35, 0.42)):
        for side in (-1, 1):
            knee = (side * 0.62 * reach, y + 0.5 * splay)
            pen.hair([(0, y), knee, (side * reach, y + splay + 0.12)], 0.07)


def beetle(pen: Pen, *, skin: str = "plain", antlers: bool = False) -> None:
    look, rx = pen.look, pen.jitter(0.46, 0.1)
    _six_legs(pen, 0.84)
    if antlers:
        for side in (-1, 1):
            pen.stroke(
                [(side * 0.12, -0.62), (side * 0.4, -0.78), (side * 0.26, -1.06)], 0.08, look.accent
            )
            pen.stroke([(side * 0.38, -0.8), (side * 0.2, -0.84)], 0.05, look.accent)
    else:
        for side in (-1, 1):
            pen.hair([(side * 0.1, -0.62), (side * 0.2, -0.84), (side * 0.38, -0.94)], 0.05)
    pen.oval(0, -0.56, 0.24, 0.2, look.accent)
    pen.oval(0, -0.36, 0.36, 0.2, look.accent)
    pen.oval(0, 0.18, rx, 0.62, look.main, skin=skin, period=0.3)
    pen.hair([(0, -0.42), (0, 0.8)], 0.06)
    for side in (-1, 1):
        pen.eye(side * 0.14, -0.62, 0.07)


def flutterer(pen: Pen, *, tails: bool) -> None:
    look, spread = pen.look, pen.jitter(1.0, 0.1)
    _six_legs(pen, 0.3)
    for side in (-1, 1):
        s = side * spread
        if tails:
            pen.blob(
                [
                    (s * 0.05, 0.0),
                    (s * 0.55, 0.02),
                    (s * 0.58, 0.4),
                    (s * 0.56, 0.98),
                    (s * 0.42, 0.98),
                    (s * 0.36, 0.52),
                    (s * 0.1, 0.34),
                ],
                look.second,
            )
            pen.poly(
                [(s * 0.05, -0.3), (s * 0.95, -0.86), (s * 0.86, -0.1), (s * 0.05, 0.14)], look.main
            )
            pen.oval(s * 0.68, -0.5, 0.12, 0.12, look.accent)
        else:
            pen.oval(s * 0.38, 0.36, 0.34, 0.34, look.second)
            pen.oval(s * 0.48, -0.28, 0.44, 0.42, look.main)
            pen.oval(s * 0.54, -0.32, 0.15, 0.15, look.accent)
        pen.hair([(side * 0.03, -0.48), (side * 0.12, -0.76), (side * 0.24, -0.86)], 0.05)
    pen.oval(0, 0.02, 0.1, 0.48, look.accent)
    pen.oval(0, -0.5, 0.13, 0.12, look.accent)
    for side in (-1, 1):
        pen.eye(side * 0.07, -0.54, 0.06)


def _four_legs(pen: Pen, xs: tuple[float, ...], top: float, width: float) -> None:
    stride = pen.rng.uniform(-0.1, 0.1)
    for i, x in enumerate(xs):
        foot = x + (stride if i % 2 else -stride)
        pen.stroke([(x, top), (foot, 0.86)], width, pen.look.main if i % 2 else pen.look.second)


def grazer(pen: Pen, *, horns: str) -> None:
    look = pen.look
    _four_legs(pen, (-0.3, -0.14, 0.4, 0.56), 0.2, 0.07)
    pen.stroke([(0.62, 0.0), (0.78, 0.12), (0.78, 0.3)], 0.05, look.second)
    if horns == "lance":
        pen.poly([(-0.5, -0.72), (-0.82, -1.14), (-0.38, -0.76)], look.accent)
    elif horns == "antler":
        for lean in (-0.28, 0.14):
            pen.stroke(
                [(-0.44, -0.7), (-0.44 + lean, -0.9), (-0.42 + 1.3 * lean, -1.14)],
                0.05,
                look.accent,
            )
            pen.stroke([(-0.44 + lean, -0.9), (-0.28 + 2.0 * lean, -0.98)], 0.05, look.accent)
    else:
        for shift in (0.0, 0.12):
            pen.stroke(arc(-0.2 + shift, -0.72, 0.26, 0.26, 3.3, 5.7), 0.06, look.accent)
    pen.stroke([(-0.24, -0.02), (-0.44, -0.56)], 0.2, look.main)
    pen.blob(
        [(-0.42, 0.0), (-0.1, -0.18), (0.4, -0.16), (0.68, 0.06), (0.5, 0.3), (-0.2, 0.3)],
        look.main,
    )
    pen.blob(
        [(-0.34, -0.8), (-0.58, -0.76), (-0.86, -0.5), (-0.74, -0.38), (-0.42, -0.46)], look.main
    )
    pen.oval(-0.28, -0.74, 0.12, 0.06, look.second, tilt=-0.5)
    pen.eye(-0.54, -0.62, 0.08)


def prowler(pen: Pen, *, skin: str = "plain", mane: bool = False) -> None:
    look, lift = pen.look, pen.rng.uniform(-0.15, 0.15)
    pen.stroke([(0.6, 0.1), (0.86, -0.05), (0.9, -0.4), (1.04, -0.52 + lift)], 0.09, look.main)
    _four_legs(pen, (-0.36, -0.18, 0.4, 0.58), 0.3, 0.13)
    pen.blob(
        [
            (-0.5, 0.02),
            (-0.1, -0.12),
            (0.4, -0.14),
            (0.72, 0.1),
            (0.62, 0.42),
            (0.0, 0.46),
            (-0.44, 0.42),
        ],
        look.main,
        skin=skin,
        period=0.26,
    )
    if mane:
        for a in np.arange(12) * 2 * np.pi / 12:
            pen.oval(-0.56 + 0.36 * np.cos(a), -0.16 + 0.36 * np.sin(a), 0.15, 0.15, look.second)
    for x in (-0.76, -0.38):
        pen.poly([(x - 0.12, -0.34), (x, -0.66), (x + 0.14, -0.36)], look.main)
    pen.oval(-0.57, -0.16, 0.34, 0.31, look.main)
    pen.oval(-0.62, -0.04, 0.14, 0.1, look.pale)
    for x in (-0.72, -0.45):
        pen.eye(x, -0.22, 0.08)


# fmt: on
ANIMALS = {
    "fish": {
        "puffer": {
            "humbug puffer": partial(puffer, skin="stripes"),
            "polka puffer": partial(puffer, skin="spots"),
            "thistle puffer": partial(puffer, spines=True),
        },
        "pike": {
            "sabre pike": partial(pike, sabre=True),
            "sail pike": partial(pike, sail=True),
        },
    },
    "bird": {
        "chirper": {
            "crown chirper": partial(chirper, crown=True),
            "ribbon chirper": partial(chirper, ribbon=True),
        },
        "wader": {
            "hook wader": partial(wader, bill="hook"),
            "spoon wader": partial(wader, bill="spoon"),
        },
    },
    "insect": {
        "beetle": {
            "humbug beetle": partial(beetle, skin="bands"),
            "polka beetle": partial(beetle, skin="spots"),
            "antler beetle": partial(beetle, antlers=True),
        },
        "flutterer": {
            "round flutterer": partial(flutterer, tails=False),
            "swallow flutterer": partial(flutterer, tails=True),
        },
    },
    "beast": {
        "grazer": {
            "lance grazer": partial(grazer, horns="lance"),
            "antler grazer": partial(grazer, horns="antler"),
            "sickle grazer": partial(grazer, horns="sickle"),
        },
        "prowler": {
            "humbug prowler": partial(prowler, skin="stripes"),
            "polka prowler": partial(prowler, skin="spots"),
            "mane prowler": partial(prowler, mane=True),
        },
    },
}
