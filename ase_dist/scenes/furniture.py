"""Things of a room: chairs, sofas, tables, televisions, plants, bottles and what hangs on its walls."""

from __future__ import annotations

import math

import numpy as np

from ase_dist.scenes.classes import CONTEXT, VOC
from ase_dist.scenes.materials import Material, Rgb, pick
from ase_dist.scenes.solids import Primitive, Thing, Vector, box, ellipsoid, frustum, prism, round_cone, turn

WOODS: tuple[Rgb, ...] = ((0.55, 0.36, 0.20), (0.38, 0.23, 0.13), (0.72, 0.54, 0.34), (0.86, 0.84, 0.80))
FABRICS: tuple[Rgb, ...] = (
    (0.55, 0.20, 0.18), (0.25, 0.34, 0.46), (0.46, 0.44, 0.42), (0.72, 0.66, 0.56), (0.28, 0.42, 0.32),
    (0.30, 0.20, 0.15), (0.82, 0.60, 0.26), (0.55, 0.40, 0.55),
)  # fmt: skip
GLASSES: tuple[Rgb, ...] = ((0.12, 0.32, 0.16), (0.42, 0.22, 0.08), (0.60, 0.74, 0.78), (0.20, 0.30, 0.55))
LEAVES: tuple[Rgb, ...] = ((0.22, 0.42, 0.16), (0.30, 0.50, 0.20), (0.16, 0.34, 0.18))


def thing(name: str, radius: float, height: float, *, context: str | None = None) -> Thing:
    """An empty thing named after its VOC class, or background where VOC has no such class."""
    return Thing(name, VOC.get(name, 0), CONTEXT[context or name], radius, height)


def wood(rng: np.random.Generator) -> Material:
    """Wood with grain."""
    color = pick(rng, WOODS)
    return Material(color, (color[0] * 0.7, color[1] * 0.65, color[2] * 0.6), "wood", 0.3, 0.08)


def fabric(rng: np.random.Generator) -> Material:
    """Upholstery."""
    color = pick(rng, FABRICS)
    return Material(color, (color[0] * 0.78, color[1] * 0.78, color[2] * 0.78), "fabric", 2.0)


def _legs(half_x: float, half_z: float, top: float, thick: float, material: Material) -> list[Primitive]:
    size = (thick, top / 2, thick)
    return [box((x, top / 2, z), size, material) for x in (-half_x, half_x) for z in (-half_z, half_z)]


def chair(rng: np.random.Generator) -> Thing:
    """A chair with four legs; the back of slats, padded, or whole."""
    result, frame = thing("chair", 0.36, 0.95), wood(rng)
    seat = fabric(rng) if rng.random() < 0.5 else frame
    result.add(*_legs(0.20, 0.20, 0.44, 0.022, frame), box((0, 0.455, 0), (0.235, 0.028, 0.235), seat))
    kind = rng.integers(3)
    if kind == 0:
        result.add(*(box((x, 0.72, 0.215), (0.024, 0.25, 0.016), frame) for x in (-0.2, -0.1, 0.0, 0.1, 0.2)))
        result.add(box((0, 0.95, 0.215), (0.235, 0.045, 0.02), frame))
    elif kind == 1:
        result.add(*(box((x, 0.68, 0.215), (0.022, 0.24, 0.02), frame) for x in (-0.2, 0.2)))
        result.add(box((0, 0.80, 0.21), (0.22, 0.14, 0.03), seat))
    else:
        result.add(box((0, 0.72, 0.22), (0.225, 0.26, 0.025), frame, rotation=turn(pitch=-0.08)))
    return result


def sofa(rng: np.random.Generator) -> Thing:
    """A sofa or an armchair, with arms and loose cushions."""
    seats = int(rng.integers(1, 4))
    half, cloth = 0.34 * seats + 0.05, fabric(rng)
    result = thing("sofa", half + 0.25, 0.85)
    feet = Material((0.15, 0.1, 0.08))
    result.add(box((0, 0.22, 0), (half + 0.14, 0.14, 0.40), cloth), box((0, 0.04, 0), (half + 0.08, 0.04, 0.34), feet))
    result.add(prism((0, 0.58, 0.32), (half + 0.12, 0.28, 0.13), cloth, front=0.5, side=0.03))
    for i in range(seats):
        x = 0.68 * (i - (seats - 1) / 2)
        result.add(round_cone((x - 0.21, 0.42, -0.06), (x + 0.21, 0.42, -0.06), (0.125, 0.125), cloth, flat=2.6,
                              side=(0.0, 1.0, 0.0)))  # fmt: skip
        result.add(ellipsoid((x, 0.66, 0.19), (0.32, 0.20, 0.10), cloth, rotation=turn(pitch=-0.15)))
    for sign in (-1, 1):
        x = sign * (half + 0.09)
        result.add(box((x, 0.36, -0.02), (0.09, 0.22, 0.38), cloth))
        result.add(round_cone((x, 0.58, -0.36), (x, 0.58, 0.30), (0.10, 0.10), cloth))
    if rng.random() < 0.6:
        cushion = fabric(rng)._replace(pattern=("plain", "stripes", "plaid")[int(rng.integers(3))], scale=0.08)
        side = half - 0.18 if rng.random() < 0.5 else 0.18 - half
        result.add(ellipsoid((side, 0.64, 0.05), (0.19, 0.19, 0.075), cushion, rotation=turn(roll=0.5, pitch=-0.3)))
    return result


def table(rng: np.random.Generator) -> Thing:
    """A dining table, rectangular with four legs or round on a column; sometimes with a cloth."""
    top = wood(rng)
    if rng.random() < 0.35:
        radius = float(rng.uniform(0.45, 0.65))
        result = thing("diningtable", radius + 0.1, 0.75)
        result.add(frustum((0, 0.735, 0), (radius, 0.02, radius), top), frustum((0, 0.37, 0), (0.05, 0.36, 0.05), top))
        result.add(frustum((0, 0.03, 0), (0.3, 0.03, 0.3), top, top=0.3))
        return result
    x, z = float(rng.uniform(0.5, 0.9)), float(rng.uniform(0.35, 0.5))
    result = thing("diningtable", math.hypot(x, z), 0.75)
    result.add(*_legs(x - 0.06, z - 0.06, 0.70, 0.032, top), box((0, 0.735, 0), (x, 0.02, z), top))
    result.add(box((0, 0.67, 0), (x - 0.08, 0.045, z - 0.08), top))
    if rng.random() < 0.35:
        cloth = Material(pick(rng, ((0.9, 0.88, 0.84),)), pick(rng, FABRICS), "plaid", 0.16)
        result.add(box((0, 0.69, 0), (x + 0.012, 0.072, z + 0.012), cloth))
    return result


def bottle(rng: np.random.Generator) -> Thing:
    """A bottle of glass with a label and a cap, about 30 cm high."""
    glass = Material(pick(rng, GLASSES), gloss=0.6)
    label = Material(pick(rng, FABRICS + WOODS), (0.93, 0.92, 0.88), "stripes", 0.035)
    cap = Material(pick(rng, FABRICS), gloss=0.3)
    r, body, neck = float(rng.uniform(0.034, 0.044)), float(rng.uniform(0.08, 0.1)), float(rng.uniform(0.04, 0.06))
    shoulder = 2 * body + 0.035
    result = thing("bottle", 0.06, shoulder + 2 * neck + 0.03)
    result.add(frustum((0, body, 0), (r, body, r), glass))
    result.add(frustum((0, body * 0.95, 0), (r * 1.03, body * 0.5, r * 1.03), label))
    result.add(frustum((0, 2 * body + 0.0175, 0), (r, 0.0175, r), glass, top=0.42))
    result.add(frustum((0, shoulder + neck, 0), (r * 0.42, neck, r * 0.42), glass, top=0.85))
    result.add(frustum((0, shoulder + 2 * neck + 0.01, 0), (r * 0.46, 0.014, r * 0.46), cap))
    return result


def monitor(rng: np.random.Generator) -> Thing:
    """A television or a computer's monitor on its foot."""
    half = float(rng.uniform(0.24, 0.42))
    tall = half * float(rng.uniform(0.56, 0.68))
    case = Material(pick(rng, ((0.08, 0.08, 0.09), (0.25, 0.25, 0.26), (0.75, 0.75, 0.76))), gloss=0.2)
    dark, bright = pick(rng, ((0.08, 0.18, 0.35), (0.10, 0.25, 0.16), (0.30, 0.10, 0.22))), (0.55, 0.75, 0.92)
    screen = Material(dark, bright, "screen", float(rng.random()), 0.1, 0.75)
    result = thing("tvmonitor", half + 0.05, 2 * tall + 0.16)
    middle = tall + 0.13
    result.add(box((0, middle, 0), (half, tall, 0.025), case))
    result.add(box((0, middle + 0.01, -0.024), (half * 0.93, tall * 0.87, 0.006), screen))
    result.add(box((0, 0.07, 0.02), (0.04, 0.07, 0.02), case), frustum((0, 0.012, 0.01), (0.16, 0.012, 0.1), case))
    return result


def cabinet(rng: np.random.Generator) -> Thing:
    """A low cabinet to put a television on; background in VOC."""
    result, body = thing("cabinet", 0.5, 0.5, context="shelves"), wood(rng)
    result.add(box((0, 0.25, 0), (0.55, 0.25, 0.22), body))
    panel = body._replace(color=body.second)
    result.add(*(box((x, 0.25, -0.222), (0.25, 0.19, 0.006), panel) for x in (-0.27, 0.27)))
    return result


def bookcase(rng: np.random.Generator) -> Thing:
    """Shelves full of books."""
    result, body = thing("shelves", 0.5, 1.9), wood(rng)
    dark = body._replace(color=(0.16, 0.11, 0.08), pattern="plain")
    result.add(box((0, 0.95, 0.14), (0.48, 0.95, 0.02), dark), *(box((x, 0.95, 0), (0.02, 0.95, 0.15), body)
                                                                 for x in (-0.47, 0.47)))  # fmt: skip
    for level in range(6):
        y = 0.02 + 0.37 * level
        result.add(box((0, y, 0), (0.46, 0.018, 0.15), body))
        if level < 5:
            books = Material(pick(rng, FABRICS), pick(rng, WOODS + FABRICS), "books", 0.035)
            half = float(rng.uniform(0.25, 0.44))
            result.add(box((half - 0.44, y + 0.15, 0.02), (half, 0.13, 0.11), books))
    return result


def pottedplant(rng: np.random.Generator) -> Thing:
    """A pot with a bush, with long leaves, or with a small tree."""
    clay = Material(pick(rng, ((0.68, 0.36, 0.24), (0.85, 0.84, 0.80), (0.35, 0.40, 0.46))), gloss=0.08)
    color = pick(rng, LEAVES)
    green = Material(color, (color[0] * 1.6, color[1] * 1.5, color[2] * 1.3), "leaves", 1.2, 0.05)
    r = float(rng.uniform(0.12, 0.2))
    result = thing("pottedplant", r + 0.15, 1.0)
    result.add(frustum((0, r, 0), (r * 0.75, r, r * 0.75), clay, top=1.35))
    result.add(frustum((0, 2 * r - 0.02, 0), (r * 1.08, 0.03, r * 1.08), clay))
    kind = rng.integers(3)
    if kind == 0:
        result.add(*blobs(rng, (0.0, 2 * r + 0.24, 0.0), 0.24, 0.15, 8, green))
    elif kind == 1:
        result.add(*(_leaf(rng, i * 2 * math.pi / 13, 2 * r, green) for i in range(13)))
    else:
        trunk = Material((0.36, 0.26, 0.16))
        result.add(round_cone((0, 2 * r - 0.05, 0), (0.03, 2 * r + 0.45, 0), (0.03, 0.02), trunk))
        result.add(*blobs(rng, (0.03, 2 * r + 0.6, 0.0), 0.25, 0.17, 8, green))
    return result


def _leaf(rng: np.random.Generator, angle: float, base: float, green: Material) -> Primitive:
    out, up = float(rng.uniform(0.12, 0.38)), float(rng.uniform(0.25, 0.6))
    tip = (math.sin(angle) * out, base + up, math.cos(angle) * out)
    return round_cone(
        (0.0, base, 0.0), tip, (0.022, 0.045), green, flat=0.3, side=(math.cos(angle), 0.0, -math.sin(angle))
    )


def blobs(
    rng: np.random.Generator, center: Vector, spread: float, size: float, count: int, material: Material
) -> list[Primitive]:
    """Foliage: overlapping ellipsoids round a centre."""
    result = [ellipsoid(center, (spread, spread, spread), material)]
    for _ in range(count):
        x, y, z = rng.normal(0, 1, 3)
        scale = spread * 0.85 / max(math.sqrt(x * x + y * y + z * z), 1e-3)
        r = size * float(rng.uniform(0.7, 1.1))
        where = (center[0] + float(x) * scale, center[1] + float(y) * scale, center[2] + float(z) * scale)
        result.append(ellipsoid(where, (r, r * 0.85, r), material))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# On the walls; built in the plane z = 0, facing -z


def picture(rng: np.random.Generator) -> Thing:
    """A framed picture."""
    x, y = float(rng.uniform(0.2, 0.5)), float(rng.uniform(0.2, 0.4))
    result = thing("picture", 0.1, 0.5)
    result.add(box((0, 0, 0), (x, y, 0.02), Material(pick(rng, WOODS), gloss=0.1)))
    art = Material(pick(rng, FABRICS), pick(rng, WOODS + FABRICS), "screen", float(rng.random()))
    result.add(box((0, 0, -0.016), (x - 0.04, y - 0.04, 0.008), art))
    return result


def window(rng: np.random.Generator) -> Thing:
    """A window on the sky, in a white frame."""
    x, y = float(rng.uniform(0.45, 0.8)), float(rng.uniform(0.45, 0.65))
    result = thing("window", 0.1, 1.0)
    white = Material((0.92, 0.92, 0.90))
    sky = Material((0.45, 0.58, 0.40), (0.72, 0.85, 0.96), "screen", float(rng.random()), 0.0, 0.9)
    result.add(box((0, 0, 0), (x, y, 0.02), white), box((0, 0, -0.016), (x - 0.05, y - 0.05, 0.008), sky))
    result.add(box((0, 0, -0.02), (0.02, y, 0.012), white), box((0, -y - 0.02, -0.04), (x + 0.05, 0.02, 0.06), white))
    return result


def curtain(rng: np.random.Generator, *, height: float = 1.1) -> Thing:
    """One curtain in folds, hanging from ``height`` metres above its middle down to as far below."""
    result, cloth = thing("curtain", 0.1, 2 * height), fabric(rng)._replace(pattern="plain")
    result.add(*(frustum((0.09 * i - 0.18, 0, 0), (0.055, height, 0.045), cloth) for i in range(5)))
    return result


def door(rng: np.random.Generator) -> Thing:
    """A door with a handle, standing on the floor."""
    result, leaf = thing("door", 0.1, 2.05), wood(rng)
    frame = Material((0.9, 0.89, 0.86))
    result.add(box((0, 1.04, 0), (0.50, 1.04, 0.02), frame), box((0, 1.0, -0.012), (0.43, 1.0, 0.02), leaf))
    panel = leaf._replace(color=leaf.second)
    result.add(*(box((0, y, -0.03), (0.3, 0.35, 0.006), panel) for y in (0.55, 1.45)))
    result.add(ellipsoid((0.36, 1.0, -0.06), (0.03, 0.03, 0.03), Material((0.8, 0.7, 0.4), gloss=0.6)))
    return result


def lamp(rng: np.random.Generator) -> Thing:
    """A standing lamp with a glowing shade."""
    result = thing("lamp", 0.2, 1.6, context="light")
    metal = Material((0.25, 0.24, 0.23), gloss=0.4)
    shade = Material(pick(rng, ((0.95, 0.88, 0.70), (0.95, 0.94, 0.9))), glow=0.7)
    result.add(frustum((0, 0.015, 0), (0.14, 0.015, 0.14), metal), frustum((0, 0.7, 0), (0.014, 0.7, 0.014), metal))
    result.add(frustum((0, 1.48, 0), (0.2, 0.13, 0.2), shade, top=0.6))
    return result


def rug(rng: np.random.Generator) -> Thing:
    """A flat rug; things may stand on it."""
    result = thing("rug", 0.0, 0.02)
    cloth = Material(
        pick(rng, FABRICS), pick(rng, FABRICS + WOODS), ("stripes", "plaid", "marble")[int(rng.integers(3))], 0.4
    )
    x, z = float(rng.uniform(0.7, 1.1)), float(rng.uniform(0.6, 0.9))
    if rng.random() < 0.4:
        result.add(frustum((0, 0.006, 0), (x, 0.006, x), cloth._replace(pattern="pinstripes", scale=0.3)))
    else:
        result.add(box((0, 0.006, 0), (x, 0.006, z), cloth._replace(pattern="pinstripes", scale=0.3)))
        result.add(box((0, 0.007, 0), (x * 0.85, 0.006, z * 0.8), cloth))
    return result


def ball(rng: np.random.Generator) -> Thing:
    """A ball in two colours."""
    r = float(rng.uniform(0.1, 0.16))
    result = thing("ball", r, 2 * r)
    skin = Material(
        pick(rng, FABRICS), (0.93, 0.92, 0.9), ("pinstripes", "plaid", "dots")[int(rng.integers(3))], r, 0.25
    )
    result.add(ellipsoid((0, r, 0), (r, r, r), skin))
    return result
