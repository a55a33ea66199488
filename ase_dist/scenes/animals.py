"""Animals of VOC: four-legged ones from one adjustable body, and a bird. They stand with the nose to -x."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ase_dist.scenes.furniture import thing
from ase_dist.scenes.materials import Material, Rgb, pick
from ase_dist.scenes.solids import Primitive, Thing, Vector, ellipsoid, round_cone


class Build(NamedTuple):
    """Measures of a four-legged animal in metres: of the trunk, legs, neck, head, ears and tail."""

    shoulder: float  # height of the trunk's axis
    length: float
    girth: float
    leg: float  # radius at the hip
    neck: float
    neck_angle: float  # above the horizontal
    head: float
    muzzle: float
    ear: float
    tail: float
    tail_angle: float


BUILDS = {
    "dog": Build(0.46, 0.50, 0.13, 0.050, 0.22, 0.9, 0.085, 0.13, 0.10, 0.30, 0.7),
    "cat": Build(0.25, 0.32, 0.085, 0.032, 0.10, 0.8, 0.066, 0.045, 0.055, 0.32, 1.1),
    "horse": Build(1.18, 1.10, 0.31, 0.115, 0.72, 0.95, 0.15, 0.38, 0.14, 0.62, -1.1),
    "cow": Build(1.02, 1.15, 0.36, 0.105, 0.40, 0.35, 0.16, 0.27, 0.15, 0.75, -1.4),
    "sheep": Build(0.56, 0.60, 0.26, 0.050, 0.20, 0.55, 0.10, 0.14, 0.09, 0.14, -1.2),
}
COATS: dict[str, tuple[Rgb, ...]] = {
    "dog": ((0.62, 0.42, 0.22), (0.14, 0.11, 0.10), (0.88, 0.82, 0.72), (0.40, 0.25, 0.15)),
    "cat": ((0.80, 0.50, 0.24), (0.16, 0.15, 0.15), (0.55, 0.53, 0.50), (0.90, 0.87, 0.82)),
    "horse": ((0.42, 0.24, 0.13), (0.20, 0.14, 0.10), (0.80, 0.77, 0.72), (0.58, 0.36, 0.18)),
    "cow": ((0.93, 0.91, 0.88), (0.50, 0.28, 0.16), (0.18, 0.14, 0.12)),
    "sheep": ((0.92, 0.89, 0.82), (0.80, 0.76, 0.68)),
}


def _coat(rng: np.random.Generator, name: str) -> Material:
    color = pick(rng, COATS[name], 0.03)
    if name == "cow" or (name in {"dog", "cat", "horse"} and rng.random() < 0.3):
        dark = (0.10, 0.08, 0.08) if color[0] > 0.6 else (0.92, 0.9, 0.86)
        return Material(color, dark, "patches", 0.45 if name in {"cow", "horse"} else 1.0)
    if name == "cat" and rng.random() < 0.5:
        return Material(color, (color[0] * 0.6, color[1] * 0.55, color[2] * 0.5), "stripes", 0.07)
    shade = 0.86 if name == "sheep" else 0.75
    return Material(color, (color[0] * shade, color[1] * shade, color[2] * shade), "fur", 1.0)


def animal(rng: np.random.Generator, *, name: str) -> Thing:
    """A dog, cat, horse, cow or sheep, walking or grazing, of a size within 12 % of the usual."""
    build, coat = BUILDS[name], _coat(rng, name)
    size = float(rng.uniform(0.9, 1.12))
    result = thing(name, build.length * 0.85 * size, build.shoulder * 1.5 * size)
    grazing = name in {"cow", "horse", "sheep"} and rng.random() < 0.35
    shapes = [
        *_trunk(rng, name, build, coat),
        *_legs(rng, name, build, coat),
        *_head(rng, name, build, coat, grazing=grazing),
    ]
    result.add(*(_scaled(shape, size) for shape in shapes))
    return result


def _scaled(shape: Primitive, size: float) -> Primitive:
    x, y, z = shape.center
    return shape._replace(center=(x * size, y * size, z * size), frame=shape.frame * np.float32(size))


def _trunk(rng: np.random.Generator, name: str, build: Build, coat: Material) -> list[Primitive]:
    half, y, girth = build.length / 2, build.shoulder, build.girth
    shapes = [round_cone((-half * 0.75, y, 0), (half * 0.75, y, 0), (girth, girth * 0.92), coat, flat=0.82,
                         side=(0.0, 1.0, 0.0))]  # fmt: skip
    if name == "sheep":
        for _ in range(10):
            x, up, z = float(rng.uniform(-half, half)), float(rng.uniform(-0.1, 0.22)), float(rng.uniform(-0.17, 0.17))
            shapes.append(ellipsoid((x, y + up, z), (0.14, 0.11, 0.13), coat))
    hips, angle = (half * 0.75 + girth * 0.75, y + girth * 0.4, 0.0), build.tail_angle
    tip = (hips[0] + build.tail * math.cos(angle), hips[1] + build.tail * math.sin(angle), 0.0)
    thick = 0.075 if name == "horse" else 0.028
    hair = coat._replace(color=coat.second, pattern="plain") if name == "horse" else coat
    return [*shapes, round_cone(hips, tip, (0.03, thick), hair)]


def _legs(rng: np.random.Generator, name: str, build: Build, coat: Material) -> list[Primitive]:
    """Four legs of two bones each, in mid-step."""
    stride = float(rng.uniform(0.0, 0.45))
    dark = Material((0.16, 0.13, 0.11)) if name in {"horse", "cow", "sheep"} else coat
    shapes = []
    for x, z, phase in ((-1, -1, 1), (-1, 1, -1), (1, -1, -1), (1, 1, 1)):
        top: Vector = (x * build.length * 0.36, build.shoulder - build.girth * 0.35, z * build.girth * 0.5)
        reach = top[1] - build.leg * 0.45
        swing = stride * phase
        knee: Vector = (top[0] + math.sin(swing) * reach / 2 + 0.03 * x, top[1] - math.cos(swing) * reach / 2, top[2])
        foot: Vector = (top[0] + math.sin(swing) * reach, build.leg * 0.45, top[2])
        shapes.append(round_cone(top, knee, (build.leg * 1.35, build.leg * 0.75), coat))
        lower = dark if name == "sheep" else coat
        shapes.append(round_cone(knee, foot, (build.leg * 0.72, build.leg * 0.5), lower))
        toe: Vector = (foot[0] - build.leg * 0.5, build.leg * 0.4, foot[2])
        shapes.append(round_cone(foot, toe, (build.leg * 0.55, build.leg * 0.5), dark))
    return shapes


def _head(rng: np.random.Generator, name: str, build: Build, coat: Material, *, grazing: bool) -> list[Primitive]:
    angle = -0.75 if grazing else build.neck_angle
    base: Vector = (-build.length * 0.40, build.shoulder + build.girth * 0.3, 0.0)
    skull: Vector = (base[0] - build.neck * math.cos(angle), base[1] + build.neck * math.sin(angle), 0.0)
    side = float(rng.uniform(-0.5, 0.5))
    drop = -0.75 if grazing else -0.32
    reach = build.head * 0.6 + build.muzzle
    nose: Vector = (
        skull[0] - reach * math.cos(side) * math.cos(drop), skull[1] + reach * math.sin(drop), reach * math.sin(side)
    )  # fmt: skip
    face = Material((0.20, 0.17, 0.15)) if name == "sheep" and rng.random() < 0.5 else coat
    black = Material((0.05, 0.04, 0.04), gloss=0.4)
    h = build.head
    shapes = [
        round_cone(base, skull, (build.girth * 0.62, h * 0.85), coat),
        ellipsoid(skull, (h * 1.05, h, h * 0.9), face),
        round_cone(skull, nose, (h * 0.75, h * 0.45), face),
        ellipsoid(
            nose, (h * 0.36, h * 0.3, h * 0.3), black if name in {"dog", "cat"} else Material((0.45, 0.33, 0.30))
        ),
    ]
    for z in (-1.0, 1.0):
        ear: Vector = (skull[0] + h * 0.2, skull[1] + h * 0.65, z * h * 0.6)
        hanging = name in {"cow", "sheep"}
        tip: Vector = (
            ear[0] + 0.03, ear[1] + (-0.01 if hanging else build.ear), ear[2] + z * (build.ear if hanging else 0.02)
        )  # fmt: skip
        shapes.append(round_cone(ear, tip, (h * 0.28, h * 0.12), face, flat=0.6))
        shapes.append(ellipsoid((skull[0] - h * 0.7, skull[1] + h * 0.3, z * h * 0.58), (h * 0.16,) * 3, black))
        if name == "cow":
            horn: Vector = (ear[0], ear[1] + 0.16, z * h * 1.1)
            shapes.append(round_cone(ear, horn, (0.03, 0.012), Material((0.85, 0.80, 0.68))))
    if name == "horse":
        mane = Material((coat.color[0] * 0.35, coat.color[1] * 0.3, coat.color[2] * 0.3))
        start, end = (base[0] + 0.14, base[1] + 0.12, 0.0), (skull[0] + 0.08, skull[1] + 0.1, 0.0)
        shapes.append(round_cone(start, end, (0.09, 0.06), mane, flat=0.5, side=(1.0, 0.0, 0.0)))
    return shapes


def bird(rng: np.random.Generator) -> Thing:
    """A bird on two legs, 25 to 45 cm high."""
    result = thing("bird", 0.25, 0.4)
    coat = Material(pick(rng, ((0.85, 0.84, 0.82), (0.25, 0.28, 0.36), (0.55, 0.40, 0.28), (0.75, 0.25, 0.18))))
    wing = coat._replace(color=(coat.color[0] * 0.6, coat.color[1] * 0.6, coat.color[2] * 0.65))
    yellow = Material((0.90, 0.62, 0.15))
    size = float(rng.uniform(0.9, 1.6))
    shapes = [
        round_cone((-0.06, 0.19, 0), (0.10, 0.15, 0), (0.075, 0.045), coat),
        round_cone((0.10, 0.15, 0), (0.24, 0.11, 0), (0.035, 0.02), wing, flat=0.5, side=(0.0, 0.0, 1.0)),
        ellipsoid((-0.11, 0.28, 0), (0.052, 0.05, 0.046), coat),
        round_cone((-0.08, 0.21, 0), (-0.11, 0.27, 0), (0.055, 0.045), coat),
        round_cone((-0.15, 0.28, 0), (-0.21, 0.272, 0), (0.016, 0.004), yellow),
    ]
    for z in (-1.0, 1.0):
        shapes.append(ellipsoid((0.03, 0.18, z * 0.062), (0.11, 0.05, 0.02), wing))
        shapes.append(ellipsoid((-0.14, 0.29, z * 0.036), (0.011, 0.011, 0.011), Material((0.03, 0.03, 0.03))))
        shapes.append(round_cone((0.01, 0.11, z * 0.03), (0.0, 0.01, z * 0.035), (0.011, 0.009), yellow))
        shapes.append(round_cone((0.0, 0.01, z * 0.035), (-0.05, 0.008, z * 0.045), (0.010, 0.007), yellow))
    result.add(*(_scaled(shape, size) for shape in shapes))
    return result
