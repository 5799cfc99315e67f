"""The drawn world: its tree of classes, and one picture of one class for one seed.

The tree is true by construction: a leaf's path (realm, family, genus, species) chooses what is drawn.
Everything else (colours, place, size, turn, mirror image, background, clutter, occluder, light, blur,
noise) is drawn independently of the class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from animals import ANIMALS
from buildings import BUILDINGS
from growing import GROWING_THINGS
from pen import Colour, Look, Pen, contrast, mix, random_colour, ring
from PIL import Image, ImageDraw, ImageFilter
from vehicles import VEHICLES

ROOT = "thing"
LEVELS = ("realm", "family", "genus", "species")
WORLD = {
    "animal": ANIMALS,
    "growing thing": GROWING_THINGS,
    "vehicle": VEHICLES,
    "building": BUILDINGS,
}
SIZE = 64
OVERSAMPLING = 4  # drawn four times as large and averaged down: smooth edges
SPLITS = {"train": 0, "validation": 1, "plain": 2}


@dataclass(frozen=True)
class Leaf:
    """One class: its name, the names above it from realm to genus, and how to draw it."""

    name: str
    path: tuple[str, str, str]
    draw: Callable[[Pen], None]


LEAVES: list[Leaf] = [
    Leaf(species, (realm, family, genus), draw)
    for realm, families in WORLD.items()
    for family, genera in families.items()
    for genus, all_species in genera.items()
    for species, draw in all_species.items()
]
CLASS_NAMES = [leaf.name for leaf in LEAVES]


def edges() -> list[tuple[str, str]]:
    """Every (parent, child) of the tree, parents first."""
    found: dict[tuple[str, str], None] = {}
    for leaf in LEAVES:
        chain = (ROOT, *leaf.path, leaf.name)
        found.update(dict.fromkeys(pairwise(chain)))
    return list(found)


def level_labels() -> np.ndarray:
    """(n_classes, 4) int64: for each class, the number of its realm, family, genus and species."""
    chains = [(*leaf.path, leaf.name) for leaf in LEAVES]
    columns = []
    for level in range(len(LEVELS)):
        numbers = {name: i for i, name in enumerate(dict.fromkeys(c[level] for c in chains))}
        columns.append([numbers[c[level]] for c in chains])
    return np.array(columns, dtype=np.int64).T


def draw_picture(label: int, index: int, split: str) -> Image.Image:
    """Picture number `index` of class `label`: RGB, 64 x 64, the same pixels at every call."""
    rng = np.random.default_rng([SPLITS[split], label, index])
    side = SIZE * OVERSAMPLING
    look = Look.random(rng)
    if split == "plain":
        return _plain_picture(rng, side, look, label)
    scene = _background(rng, side, look)
    _clutter(rng, scene)
    scale = rng.uniform(0.24, 0.44)
    slack = 0.5 - 0.9 * scale
    pen = Pen(
        scene,
        look,
        rng,
        centre=(
            side * (0.5 + rng.uniform(-slack, slack)),
            side * (0.5 + rng.uniform(-slack, slack)),
        ),
        scale=side * scale,
        angle=float(np.clip(rng.normal(0, 0.22), -0.5, 0.5)),
        mirrored=bool(rng.random() < 0.5),
        stretch=rng.uniform(0.87, 1.15),
        lean=rng.uniform(-0.15, 0.15),
    )
    LEAVES[label].draw(pen)
    for _ in range(rng.choice([0, 1, 2], p=[0.5, 0.35, 0.15])):
        _occluder(rng, scene)
    return _camera(rng, scene.reduce(OVERSAMPLING))


def _plain_picture(rng: np.random.Generator, side: int, look: Look, label: int) -> Image.Image:
    """The subject alone, large, upright and centred on white: the first training stage."""
    scene = Image.new("RGB", (side, side), (255, 255, 255))
    scale = rng.uniform(0.38, 0.44)
    pen = Pen(
        scene,
        look,
        rng,
        centre=(side / 2, side / 2),
        scale=side * scale,
        angle=float(rng.normal(0, 0.05)),
        mirrored=bool(rng.random() < 0.5),
        stretch=1.0,
        lean=0.0,
    )
    LEAVES[label].draw(pen)
    return scene.reduce(OVERSAMPLING)


def _background(rng: np.random.Generator, side: int, look: Look) -> Image.Image:
    near = [look.main, look.second]
    base = random_colour(rng, near, apart=45, soft=True)
    other = mix(base, random_colour(rng, soft=True), rng.uniform(0.25, 0.6))
    if min(contrast(other, colour) for colour in near) < 20:
        other = mix(base, other, 0.4)
    kind = rng.choice(["plain", "horizon", "wallpaper", "clouds", "tiles"])
    scene = Image.new("RGB", (side, side), base)
    pencil = ImageDraw.Draw(scene)
    if kind == "horizon":
        y = side * rng.uniform(0.45, 0.85)
        tilt = side * rng.uniform(-0.12, 0.12)
        pencil.polygon([(0, y - tilt), (side, y + tilt), (side, side), (0, side)], fill=other)
    elif kind == "wallpaper":
        angle, step = rng.uniform(0, np.pi), side * rng.uniform(0.08, 0.2)
        along = np.array([np.cos(angle), np.sin(angle)])
        across = np.array([-along[1], along[0]])
        for k in np.arange(-side, side, step):
            middle = np.array([side / 2, side / 2]) + k * across
            ends = middle - side * along, middle + side * along
            pencil.line(
                [tuple(map(float, end)) for end in ends], fill=other, width=max(2, int(step * 0.4))
            )
    elif kind == "tiles":
        step = side * rng.uniform(0.1, 0.22)
        for i, x in enumerate(np.arange(0, side, step)):
            for j, y in enumerate(np.arange(0, side, step)):
                if (i + j) % 2:
                    pencil.rectangle((x, y, x + step, y + step), fill=other)
    elif kind == "clouds":
        coarse = Image.fromarray(rng.integers(0, 256, (7, 7), dtype=np.uint8))
        mask = coarse.resize((side, side), Image.Resampling.BICUBIC)
        scene.paste(other, mask=mask)
    return scene


def _random_shape(
    rng: np.random.Generator, side: int, radius: float, where: tuple[float, float]
) -> list[tuple[float, float]]:
    corners = int(rng.choice([3, 4, 5, 24]))
    points = ring(*where, radius, radius * rng.uniform(0.35, 1.0), rng.uniform(0, np.pi), n=corners)
    return [(float(x), float(y)) for x, y in points]


def _clutter(rng: np.random.Generator, scene: Image.Image) -> None:
    """Small shapes and lines at random places behind the subject, in colours close to the background's."""
    side, pencil = scene.width, ImageDraw.Draw(scene)
    for _ in range(rng.integers(0, 8)):
        where = (float(rng.uniform(0, side)), float(rng.uniform(0, side)))
        under = _pixel(scene, where)
        colour = mix(under, random_colour(rng), rng.uniform(0.25, 0.6))
        if rng.random() < 0.7:
            pencil.polygon(
                _random_shape(rng, side, side * rng.uniform(0.03, 0.11), where), fill=colour
            )
        else:
            end = (
                where[0] + rng.uniform(-0.4, 0.4) * side,
                where[1] + rng.uniform(-0.4, 0.4) * side,
            )
            pencil.line([where, end], fill=colour, width=int(side * rng.uniform(0.012, 0.04)))


def _pixel(scene: Image.Image, where: tuple[float, float]) -> Colour:
    r, g, b = np.asarray(scene)[int(where[1]), int(where[0])]
    return int(r), int(g), int(b)


def _occluder(rng: np.random.Generator, scene: Image.Image) -> None:
    """One shape or post in front of the subject."""
    side, pencil = scene.width, ImageDraw.Draw(scene)
    colour = random_colour(rng)
    if rng.random() < 0.5:
        where = (float(side * rng.uniform(0.15, 0.85)), float(side * rng.uniform(0.15, 0.85)))
        pencil.polygon(_random_shape(rng, side, side * rng.uniform(0.07, 0.13), where), fill=colour)
    else:
        start, end = rng.uniform(0.1, 0.9, 2) * side
        ends = [(float(start), 0.0), (float(end), float(side))]
        if rng.random() < 0.5:
            ends = [(y, x) for x, y in ends]
        pencil.line(ends, fill=colour, width=int(side * rng.uniform(0.03, 0.06)))


def _camera(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Haze, light from one side, a colour cast, exposure, a little blur and noise."""
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    pixels = np.asarray(picture, dtype=np.float32) / 255
    if rng.random() < 0.3:
        haze = rng.uniform(0.15, 0.6)
        pixels = pixels * (1 - haze) + haze * pixels.mean(axis=(0, 1))
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j].astype(np.float32)
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.3)
    light = 1 + depth * (np.cos(angle) * x + np.sin(angle) * y)
    cast = rng.uniform(0.9, 1.08, 3)
    pixels = np.clip(pixels * light[..., None] * cast, 0, 1) ** rng.uniform(0.8, 1.25)
    pixels = pixels + rng.normal(0, rng.uniform(0, 0.025), pixels.shape)
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))
