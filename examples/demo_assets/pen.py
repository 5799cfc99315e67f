"""A small drawing pen: outlined shapes in a turned, scaled and mirrored frame, over Pillow."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """RGB bytes of a hue (wrapped to [0, 1)), saturation and value."""
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(255 * r), round(255 * g), round(255 * b)


def mix(a: Colour, b: Colour, share_of_b: float) -> Colour:
    """The colour `share_of_b` of the way from a to b."""
    r, g, bl = (round(x + (y - x) * share_of_b) for x, y in zip(a, b))
    return r, g, bl


def contrast(a: Colour, b: Colour) -> float:
    """How far two colours lie apart, luminance counting most; 0 to about 255."""
    d = np.subtract(a, b, dtype=float)
    return float(abs(d @ (0.3, 0.59, 0.11)) + 0.25 * np.abs(d).mean())


def random_colour(
    rng: np.random.Generator,
    unlike: Sequence[Colour] = (),
    apart: float = 55,
    *,
    soft: bool = False,
) -> Colour:
    """A colour (saturated, or pale as a wall or the sky) that contrasts with those in `unlike`: the best of
    eight tries."""
    low, high = (0.08, 0.5) if soft else (0.25, 0.85)
    best, best_gap = (0, 0, 0), -1.0
    for _ in range(8):
        colour = hsv(rng.random(), rng.uniform(low, high), rng.uniform(0.45, 0.98))
        gap = min((contrast(colour, other) for other in unlike), default=256.0)
        if gap > best_gap:
            best, best_gap = colour, gap
        if gap >= apart:
            break
    return best


@dataclass(frozen=True)
class Look:
    """The colours of one picture's subject. Drawn at random: they never depend on the class."""

    main: Colour
    second: Colour
    accent: Colour
    pale: Colour
    ink: Colour

    @classmethod
    def random(cls, rng: np.random.Generator) -> Look:
        main = random_colour(rng)
        second = random_colour(rng, [main])
        return cls(
            main=main,
            second=second,
            accent=random_colour(rng, [main, second], apart=35),
            pale=mix(random_colour(rng), (255, 255, 255), 0.72),
            ink=mix(main, (18, 16, 30), 0.86),
        )


class Pen:
    """Draws in a frame where the subject fills about [-1, 1] x [-1, 1], x right and y down."""

    def __init__(
        self,
        canvas: Image.Image,
        look: Look,
        rng: np.random.Generator,
        *,
        centre: Point,
        scale: float,
        angle: float,
        mirrored: bool,
        stretch: float = 1.0,
        lean: float = 0.0,
    ) -> None:
        self.canvas, self.look, self.rng = canvas, look, rng
        self.draw = ImageDraw.Draw(canvas)
        self.centre, self.scale = np.asarray(centre, dtype=float), scale
        cos, sin = np.cos(angle), np.sin(angle)
        flip = -1.0 if mirrored else 1.0
        turned = np.array([[cos * flip, -sin], [sin * flip, cos]])
        self.frame = scale * turned @ np.array([[stretch, lean], [0.0, 1 / stretch]])
        self.outline = max(1, round(0.042 * scale))

    def jitter(self, value: float, share: float = 0.12) -> float:
        """The value, up to `share` larger or smaller: individuals of a species differ."""
        return value * (1 + self.rng.uniform(-share, share))

    def to_canvas(self, points: Sequence[Point] | np.ndarray) -> list[tuple[float, float]]:
        moved = np.asarray(points, dtype=float) @ self.frame.T + self.centre
        return [(float(x), float(y)) for x, y in moved]

    def poly(
        self,
        points: Sequence[Point] | np.ndarray,
        fill: Colour,
        *,
        skin: str = "plain",
        skin_colour: Colour | None = None,
        period: float = 0.3,
        outlined: bool = True,
    ) -> None:
        """A filled polygon with an outline; `skin` is a pattern laid over its inside."""
        corners = self.to_canvas(points)
        self.draw.polygon(corners, fill=fill)
        if skin != "plain":
            self._lay_skin(corners, skin, skin_colour or self.look.second, period)
        if outlined:
            closed = [*corners, corners[0], corners[1]]
            self.draw.line(closed, fill=self.look.ink, width=self.outline, joint="curve")

    def blob(self, points: Sequence[Point], fill: Colour, **kwargs) -> None:
        """A smooth closed outline through the points (Catmull-Rom)."""
        self.poly(smooth(points), fill, **kwargs)

    def oval(
        self, x: float, y: float, rx: float, ry: float, fill: Colour, *, tilt: float = 0.0, **kwargs
    ) -> None:
        self.poly(ring(x, y, rx, ry, tilt), fill, **kwargs)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, **kwargs) -> None:
        self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, **kwargs)

    def stroke(self, points: Sequence[Point] | np.ndarray, width: float, fill: Colour) -> None:
        """A thick outlined line with round ends."""
        path = self.to_canvas(points)
        inner = max(1, round(width * self.scale))
        for colour, w in ((self.look.ink, inner + 2 * self.outline), (fill, inner)):
            self.draw.line(path, fill=colour, width=w, joint="curve")
            for x, y in (path[0], path[-1]):
                self.draw.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill=colour)

    def hair(self, points: Sequence[Point] | np.ndarray, width: float = 0.05) -> None:
        """A thin line of ink."""
        width_px = max(2, round(width * self.scale))
        self.draw.line(self.to_canvas(points), fill=self.look.ink, width=width_px, joint="curve")

    def eye(self, x: float, y: float, r: float) -> None:
        self.oval(x, y, r, r, (250, 250, 245))
        self.oval(x - 0.2 * r, y, 0.5 * r, 0.5 * r, self.look.ink, outlined=False)

    def wheel(self, x: float, y: float, r: float) -> None:
        self.oval(x, y, r, r, mix(self.look.ink, (70, 70, 80), 0.4))
        self.oval(x, y, 0.45 * r, 0.45 * r, self.look.pale)

    def _lay_skin(
        self, corners: list[tuple[float, float]], skin: str, colour: Colour, period: float
    ) -> None:
        inside = Image.new("L", self.canvas.size)
        ImageDraw.Draw(inside).polygon(corners, fill=255)
        marks = Image.new("L", self.canvas.size)
        pencil = ImageDraw.Draw(marks)
        phase = self.rng.uniform(0, period)
        for mark in SKINS[skin](period, phase):
            pencil.polygon(self.to_canvas(mark), fill=255)
        self.canvas.paste(colour, mask=ImageChops.multiply(inside, marks))


def ring(x: float, y: float, rx: float, ry: float, tilt: float = 0.0, n: int = 28) -> np.ndarray:
    """The n points of an ellipse, turned by `tilt` radians."""
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    u, v = rx * np.cos(t), ry * np.sin(t)
    c, s = np.cos(tilt), np.sin(tilt)
    return np.stack([x + c * u - s * v, y + s * u + c * v], axis=1)


def smooth(points: Sequence[Point], steps: int = 6) -> np.ndarray:
    """A closed Catmull-Rom curve through the points."""
    p = np.asarray(points, dtype=float)
    before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = (np.arange(steps) / steps)[None, :, None]
    p0, p1, p2, p3 = (a[:, None, :] for a in (before, p, after, beyond))
    curve = 0.5 * (
        2 * p1
        + (p2 - p0) * t
        + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2
        + (3 * p1 - p0 - 3 * p2 + p3) * t**3
    )
    return curve.reshape(-1, 2)


def arc(
    x: float, y: float, rx: float, ry: float, start: float, end: float, n: int = 14
) -> np.ndarray:
    """Points along an ellipse from angle `start` to `end` (radians, clockwise from right)."""
    t = np.linspace(start, end, n)
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], axis=1)


def _stripes(period: float, phase: float) -> list[np.ndarray]:
    """Upright bands."""
    starts = np.arange(-1.5, 1.5, period) + phase
    return [
        np.array([(x, -1.5), (x + period / 2, -1.5), (x + period / 2, 1.5), (x, 1.5)])
        for x in starts
    ]


def _bands(period: float, phase: float) -> list[np.ndarray]:
    """Level bands."""
    return [band[:, ::-1] for band in _stripes(period, phase)]


def _slants(period: float, phase: float) -> list[np.ndarray]:
    """Bands leaning to one side, as on a barber's pole."""
    shear = np.array([[0.6, 0.8], [-0.8, 0.6]])
    return [band @ shear for band in _stripes(period, phase)]


def _spots(period: float, phase: float) -> list[np.ndarray]:
    """Round spots in staggered rows."""
    rows = np.arange(-1.5, 1.5, 0.87 * period)
    return [
        ring(x + phase + (row % 2) * period / 2, y + phase, 0.3 * period, 0.3 * period, n=12)
        for row, y in enumerate(rows)
        for x in np.arange(-1.5, 1.5, period)
    ]


SKINS = {"stripes": _stripes, "bands": _bands, "slants": _slants, "spots": _spots}
