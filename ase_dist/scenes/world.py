"""What surrounds the things of a scene: a room, a street or a meadow, with its surfaces, sky and light.

A surface is an unbounded plane with a painter, which gives its colour and its Context id at world points [3, n].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ase_dist.scenes.classes import CONTEXT
from ase_dist.scenes.grounds import (
    Shade,
    bricks,
    carpet,
    dado,
    grass,
    gravel,
    plain,
    planks,
    ripples,
    tiles,
    wallpaper,
)  # fmt: skip
from ase_dist.scenes.materials import Array, Rgb, column, noise, pick, smooth_step

Labels = NDArray[np.uint16]
Painter = Callable[[Array, Array], tuple[Array, Labels]]


class Surface(NamedTuple):
    """The plane ``normal . x = offset``, seen from the side that the normal points to."""

    normal: tuple[float, float, float]
    offset: float
    paint: Painter


class Light(NamedTuple):
    """One far lamp and two ambient hemispheres; ``blur`` is the width of a shadow's edge in metres."""

    direction: tuple[float, float, float]
    sun: Rgb
    above: Rgb
    below: Rgb
    blur: float


@dataclass
class Surroundings:
    """A room or a landscape; ``sky`` paints directions, None in a room; ``fog`` is the haze's colour."""

    kind: str
    surfaces: list[Surface]
    light: Light
    sky: Painter | None = None
    fog: Rgb = (0.0, 0.0, 0.0)
    fog_length: float = math.inf
    walls: dict[str, float] = field(default_factory=dict)
    yaw: float = 0.0


def _labels(like: Array, name: str) -> Labels:
    return np.full(like.shape, CONTEXT[name], np.uint16)


# ---------------------------------------------------------------------------------------------------------------------
# Rooms

FLOORS: tuple[Rgb, ...] = ((0.62, 0.44, 0.28), (0.45, 0.29, 0.18), (0.74, 0.58, 0.42), (0.55, 0.52, 0.50))
CARPETS: tuple[Rgb, ...] = ((0.60, 0.54, 0.46), (0.40, 0.42, 0.48), (0.52, 0.34, 0.32), (0.36, 0.46, 0.42))
WALLS: tuple[Rgb, ...] = (
    (0.88, 0.85, 0.78), (0.78, 0.83, 0.86), (0.82, 0.86, 0.76), (0.90, 0.80, 0.72), (0.72, 0.70, 0.76),
    (0.93, 0.91, 0.88), (0.66, 0.76, 0.74), (0.86, 0.74, 0.56),
)  # fmt: skip


def _floor(rng: np.random.Generator) -> Shade:
    kind = rng.integers(3)
    if kind == 0:
        return planks(pick(rng, FLOORS), float(rng.uniform(0.09, 0.2)))
    if kind == 1:
        light = pick(rng, WALLS)
        return tiles(light, pick(rng, FLOORS + WALLS), float(rng.uniform(0.3, 0.6)))
    return carpet(pick(rng, CARPETS))


def _wall(rng: np.random.Generator) -> Shade:
    color = pick(rng, WALLS)
    kind = rng.integers(5)
    if kind == 0:
        return wallpaper(color, pick(rng, WALLS), float(rng.uniform(0.12, 0.4)))
    if kind == 1:
        return bricks(pick(rng, ((0.62, 0.33, 0.26), (0.70, 0.55, 0.45), (0.80, 0.78, 0.75))), (0.78, 0.75, 0.70))
    if kind == 2:
        return dado(plain(pick(rng, CARPETS)), plain(color), 0.95, (0.93, 0.92, 0.9))
    return dado(plain(color), plain(color), 0.1, (0.93, 0.92, 0.9))


def _painter(shade: Shade, name: str, across: tuple[float, float, float], along: tuple[float, float, float]) -> Painter:
    def paint(points: Array, footprint: Array) -> tuple[Array, Labels]:
        x, y = (np.float32(a) * points[0] + np.float32(b) * points[1] + np.float32(c) * points[2]
                for a, b, c in (across, along))  # fmt: skip
        return shade(x, y, footprint), _labels(points[0], name)

    return paint


def room(rng: np.random.Generator) -> Surroundings:
    """A room before the camera, seen a little askew: floor, ceiling and three walls."""
    yaw = float(rng.uniform(-0.5, 0.5))
    back, side, height = float(rng.uniform(4.5, 7.5)), float(rng.uniform(2.6, 4.2)), float(rng.uniform(2.5, 3.1))
    c, s = math.cos(yaw), math.sin(yaw)
    x_axis, y_axis, z_axis = (c, 0.0, -s), (0.0, 1.0, 0.0), (s, 0.0, c)
    wall, accent = _wall(rng), _wall(rng)
    ceiling = plain((0.93, 0.92, 0.9))
    surfaces = [
        Surface((0.0, 1.0, 0.0), 0.0, _painter(_floor(rng), "floor", x_axis, z_axis)),
        Surface((0.0, -1.0, 0.0), -height, _painter(ceiling, "ceiling", x_axis, z_axis)),
        Surface((-z_axis[0], 0.0, -z_axis[2]), -back, _painter(accent, "wall", x_axis, y_axis)),
        Surface((-x_axis[0], 0.0, -x_axis[2]), -side, _painter(wall, "wall", z_axis, y_axis)),
        Surface(x_axis, -side, _painter(wall, "wall", z_axis, y_axis)),
    ]
    warm = float(rng.uniform(0.0, 1.0))
    direction = (float(rng.uniform(-0.6, 0.6)), 1.0, float(rng.uniform(-0.9, -0.2)))
    light = Light(
        direction, (0.62, 0.60 - 0.05 * warm, 0.56 - 0.16 * warm), (0.50, 0.49, 0.48), (0.36, 0.34, 0.31),
        float(rng.uniform(0.06, 0.14)),
    )  # fmt: skip
    return Surroundings("room", surfaces, light, walls={"back": back, "side": side, "height": height}, yaw=yaw)


# ---------------------------------------------------------------------------------------------------------------------
# Outdoors

GREENS: tuple[Rgb, ...] = ((0.36, 0.50, 0.20), (0.42, 0.55, 0.26), (0.30, 0.44, 0.20), (0.52, 0.54, 0.28))
SKIES: tuple[tuple[Rgb, Rgb], ...] = (
    ((0.33, 0.55, 0.86), (0.78, 0.87, 0.95)),
    ((0.45, 0.62, 0.85), (0.90, 0.90, 0.88)),
    ((0.62, 0.68, 0.76), (0.85, 0.86, 0.87)),
    ((0.38, 0.46, 0.72), (0.98, 0.80, 0.62)),
)


def strips(parts: list[tuple[float, Shade, str]], yaw: float, line: tuple[float, float] | None = None) -> Painter:
    """Ground in parallel strips: each ``(edge, shade, name)`` reaches up to where the crossing coordinate is ``edge``.

    ``line`` is the (centre, width) of a dashed white line along the strips.
    """
    c, s = np.float32(math.cos(yaw)), np.float32(math.sin(yaw))

    def paint(points: Array, footprint: Array) -> tuple[Array, Labels]:
        along, across = c * points[0] - s * points[2], s * points[0] + c * points[2]
        colors, labels = np.empty_like(points), np.empty(along.shape, np.uint16)
        start = np.full_like(across, -np.inf)
        for edge, shade, name in parts:
            inside = (across >= start) & (across < np.float32(edge))
            colors[:, inside] = shade(along[inside], across[inside], footprint[inside])
            labels[inside] = CONTEXT[name]
            start = np.full_like(across, np.float32(edge))
        if line is not None:
            center, width = line
            dash = along / 3 - np.floor(along / 3) < np.float32(0.55)
            colors = np.where(
                dash & (np.abs(across - np.float32(center)) < np.float32(width)), column((0.9,) * 3), colors
            )
        return colors, labels

    return paint


def sky(zenith: Rgb, horizon: Rgb, *, clouds: float, hills: tuple[Rgb, float] | None, shift: float) -> Painter:
    """Painter of directions: a gradient, clouds, and hills above the horizon."""

    def paint(directions: Array, footprint: Array) -> tuple[Array, Labels]:
        x, up, z = directions / np.sqrt((directions * directions).sum(axis=0))
        height = np.sqrt(np.clip(up, 0, 1))
        colors = column(horizon) + (column(zenith) - column(horizon)) * height
        spread = np.float32(0.12) / np.maximum(up + np.float32(0.12), np.float32(0.05))
        cover = noise(x * spread + np.float32(shift), z * spread) + np.float32(clouds)
        share = smooth_step(0.0, 1.6, cover) * smooth_step(0.0, 0.12, up) * np.float32(0.9)
        colors = colors + (column((0.97, 0.97, 0.98)) - colors) * share
        labels = _labels(up, "sky")
        if hills is not None:
            azimuth = x / np.maximum(np.abs(z), np.float32(0.05))
            ridge = np.float32(hills[1]) * (
                1 + np.float32(0.45) * noise(azimuth / 7 + np.float32(shift), np.zeros_like(x))
            )
            below = up < ridge
            labels[below] = CONTEXT["mountain"]
            tone = np.float32(0.85) + np.float32(0.12) * noise(azimuth / 2, up * 2)
            colors = np.where(below, column(hills[0]) * tone, colors)
        return colors, labels

    return paint


def _outdoor_light(rng: np.random.Generator, zenith: Rgb) -> Light:
    azimuth, elevation = float(rng.uniform(-2.6, 2.6)), float(rng.uniform(0.5, 1.1))
    direction = (
        math.sin(azimuth) * math.cos(elevation), math.sin(elevation), -math.cos(azimuth) * math.cos(elevation)
    )  # fmt: skip
    bright = float(rng.uniform(0.55, 1.0))
    above = tuple(0.30 + 0.25 * c + 0.18 * (1 - bright) for c in zenith)
    return Light(
        direction,
        (0.98 * bright, 0.93 * bright, 0.82 * bright),
        (above[0], above[1], above[2]),
        (0.25, 0.24, 0.2),
        0.05,
    )


def meadow(rng: np.random.Generator) -> Surroundings:
    """Grass to the horizon, sometimes with a path, under the sky."""
    zenith, horizon = SKIES[int(rng.integers(len(SKIES)))]
    turf = grass(pick(rng, GREENS))
    parts: list[tuple[float, Shade, str]] = [(math.inf, turf, "grass")]
    if rng.random() < 0.5:
        edge = float(rng.uniform(1.5, 7.0))
        earth = gravel(pick(rng, ((0.58, 0.48, 0.36), (0.66, 0.60, 0.48))), 2.0)
        parts = [(edge, turf, "grass"), (edge + float(rng.uniform(1.0, 2.5)), earth, "ground"), parts[0]]
    ground = strips(parts, float(rng.uniform(-1.2, 1.2)))
    hills = (pick(rng, ((0.35, 0.45, 0.50), (0.30, 0.42, 0.28))), float(rng.uniform(0.03, 0.13)))
    return Surroundings(
        "meadow",
        [Surface((0.0, 1.0, 0.0), 0.0, ground)],
        _outdoor_light(rng, zenith),
        sky(zenith, horizon, clouds=float(rng.uniform(-0.9, 0.6)), hills=hills if rng.random() < 0.7 else None,
            shift=float(rng.random())),
        horizon,
        float(rng.uniform(80, 200)),
    )  # fmt: skip


def lakeside(rng: np.random.Generator) -> Surroundings:
    """A shore, water, and the far bank with hills."""
    zenith, horizon = SKIES[int(rng.integers(len(SKIES)))]
    shore, width = float(rng.uniform(2.5, 5.0)), float(rng.uniform(30.0, 60.0))
    sand = gravel(pick(rng, ((0.74, 0.66, 0.50), (0.62, 0.56, 0.46))), 2.0)
    water = ripples(pick(rng, ((0.24, 0.40, 0.50), (0.32, 0.48, 0.52), (0.20, 0.32, 0.46))))
    turf = grass(pick(rng, GREENS))
    parts: list[tuple[float, Shade, str]] = [
        (shore - 1.0, turf, "grass"), (shore, sand, "ground"), (shore + width, water, "water"),
        (math.inf, turf, "grass"),
    ]  # fmt: skip
    yaw = float(rng.uniform(-0.25, 0.25))
    hills = (pick(rng, ((0.35, 0.45, 0.50), (0.30, 0.42, 0.28))), float(rng.uniform(0.05, 0.15)))
    return Surroundings(
        "lake",
        [Surface((0.0, 1.0, 0.0), 0.0, strips(parts, yaw))],
        _outdoor_light(rng, zenith),
        sky(zenith, horizon, clouds=float(rng.uniform(-0.9, 0.6)), hills=hills, shift=float(rng.random())),
        horizon,
        float(rng.uniform(80, 200)),
        {"near": shore, "far": shore + width},
        yaw,
    )


def street(rng: np.random.Generator) -> Surroundings:
    """Pavement, a road with a dashed line, and pavement again, across the view or slanting away."""
    zenith, horizon = SKIES[int(rng.integers(len(SKIES)))]
    yaw = float(rng.uniform(-0.35, 0.35))
    near, width = float(rng.uniform(2.0, 5.0)), float(rng.uniform(5.0, 7.0))
    stone = pick(rng, ((0.66, 0.65, 0.63), (0.72, 0.66, 0.60), (0.60, 0.58, 0.56)), 0.02)
    paving = tiles(stone, (stone[0] * 0.94, stone[1] * 0.94, stone[2] * 0.94), float(rng.uniform(0.35, 0.7)))
    asphalt = gravel(pick(rng, ((0.36, 0.36, 0.38), (0.44, 0.43, 0.43))))
    kerb = plain((0.78, 0.77, 0.75))
    parts: list[tuple[float, Shade, str]] = [
        (near, paving, "sidewalk"), (near + 0.18, kerb, "sidewalk"), (near + width, asphalt, "road"),
        (near + width + 0.18, kerb, "sidewalk"), (near + width + 3.0, paving, "sidewalk"),
        (math.inf, grass(pick(rng, GREENS)), "grass"),
    ]  # fmt: skip
    ground = strips(parts, yaw, (near + width / 2, 0.09))
    return Surroundings(
        "street",
        [Surface((0.0, 1.0, 0.0), 0.0, ground)],
        _outdoor_light(rng, zenith),
        sky(zenith, horizon, clouds=float(rng.uniform(-0.9, 0.6)), hills=None, shift=float(rng.random())),
        horizon,
        float(rng.uniform(80, 200)),
        {"near": near, "far": near + width},
        yaw,
    )
