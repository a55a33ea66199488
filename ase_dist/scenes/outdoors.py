"""Things of a street and a meadow: cars, buses, bicycles, aeroplanes, trees, buildings and fences."""

from __future__ import annotations

import math

import numpy as np

from ase_dist.scenes.furniture import FABRICS, LEAVES, blobs, thing
from ase_dist.scenes.materials import Material, Rgb, pick
from ase_dist.scenes.solids import Primitive, Thing, box, ellipsoid, frustum, prism, round_cone, turn

PAINTS: tuple[Rgb, ...] = (
    (0.75, 0.12, 0.12), (0.12, 0.22, 0.50), (0.88, 0.88, 0.87), (0.10, 0.10, 0.11), (0.55, 0.57, 0.60),
    (0.15, 0.38, 0.28), (0.90, 0.68, 0.15), (0.60, 0.35, 0.15),
)  # fmt: skip
FACADES: tuple[Rgb, ...] = (
    (0.72, 0.60, 0.48), (0.62, 0.38, 0.30), (0.80, 0.78, 0.72), (0.58, 0.58, 0.60), (0.84, 0.72, 0.52)
)  # fmt: skip
RUBBER = Material((0.06, 0.06, 0.065))
STEEL = Material((0.62, 0.63, 0.65), gloss=0.5)
PANE = Material((0.16, 0.20, 0.25), gloss=0.7)
HEADLIGHT = Material((0.95, 0.94, 0.85), gloss=0.5, glow=0.3)
TAIL_LIGHT = Material((0.70, 0.08, 0.06), gloss=0.3, glow=0.2)


def _wheel(x: float, z: float, radius: float, width: float) -> list[Primitive]:
    """A wheel with its axle along z."""
    lying = turn(pitch=math.pi / 2)
    return [
        frustum((x, radius, z), (radius, width, radius), RUBBER, rotation=lying),
        frustum((x, radius, z), (radius * 0.62, width * 1.06, radius * 0.62), STEEL, rotation=lying),
    ]


def car(rng: np.random.Generator) -> Thing:
    """A car, its length along x: saloon, hatchback or van."""
    result = thing("car", 1.9, 1.5)
    paint = Material(pick(rng, PAINTS), gloss=0.5)
    kind = int(rng.integers(3))
    back, roof = ((0.45, 1.42), (0.16, 1.46), (0.05, 1.75))[kind]
    result.add(prism((0, 0.56, 0), (2.05, 0.27, 0.84), paint, side=0.05, front=0.06, back=0.06))
    result.add(box((0, 0.33, 0), (1.95, 0.1, 0.80), Material((0.12, 0.12, 0.13))))
    middle, half = ((0.15, 1.22), (0.35, 1.42), (0.45, 1.50))[kind]
    low = 0.82
    result.add(_cabin(middle, half, low, roof, back, paint))
    for side in (-1, 1):
        glass = _cabin_glass(middle, half, low, roof, back, side)
        result.add(*glass)
    result.add(*_windscreens(middle, half, low, roof, back))
    for x in (-1.25, 1.3):
        result.add(*_wheel(x, -0.76, 0.32, 0.1), *_wheel(x, 0.76, 0.32, 0.1))
    for z in (-0.6, 0.6):
        result.add(ellipsoid((-2.0, 0.6, z), (0.08, 0.09, 0.16), HEADLIGHT))
        result.add(box((2.0, 0.62, z), (0.05, 0.07, 0.14), TAIL_LIGHT))
    result.add(box((-2.03, 0.38, 0), (0.05, 0.06, 0.8), STEEL), box((2.03, 0.38, 0), (0.05, 0.06, 0.8), STEEL))
    return result


def _cabin(middle: float, half: float, low: float, roof: float, back: float, paint: Material) -> Primitive:
    """A prism whose front (-x) and back (+x) are drawn in; the frame is turned so that its z runs along the car."""
    tall = (roof - low) / 2
    return prism((middle, low + tall, 0), (0.76, tall, half), paint, front=0.75, back=back * 1.3, side=0.28,
                 rotation=turn(yaw=math.pi / 2))  # fmt: skip


def _cabin_glass(middle: float, half: float, low: float, roof: float, back: float, side: int) -> list[Primitive]:
    """Two side windows, thin prisms that stand a little out of the cabin's slanting side."""
    tall = (roof - low) / 2 * 0.72
    lean = turn(pitch=side * math.atan2(0.76 * 0.28, roof - low) * -1)
    z = side * (0.76 * (1 - 0.14) + 0.008)
    panes = []
    for x, share, front, rear in ((-0.42, 0.36, 1.0, 0.0), (0.36, 0.34, 0.0, back)):
        yaw = turn(yaw=math.pi / 2)
        panes.append(prism((middle + x * half, (low + roof) / 2 - 0.02, z), (0.012, tall, share * half), PANE,
                           front=front, back=rear, rotation=lean @ yaw))  # fmt: skip
    return panes


def _windscreens(middle: float, half: float, low: float, roof: float, back: float) -> list[Primitive]:
    """The panes before and behind, lying on the slanting ends of the cabin."""
    tall = roof - low
    panes = []
    for sign, drawn in ((-1.0, 0.75), (1.0, back * 1.3)):
        run = drawn * half
        slope = math.atan2(run, tall)
        rotation = turn(roll=sign * slope)
        x = middle + sign * (half - run / 2 + 0.004)
        length = math.hypot(run, tall) / 2 * 0.82
        panes.append(box((x, low + tall / 2, 0), (0.012, length, 0.60), PANE, rotation=rotation))
    return panes


def bus(rng: np.random.Generator) -> Thing:
    """A bus, its length along x."""
    result = thing("bus", 4.0, 3.0)
    paint = Material(pick(rng, PAINTS), gloss=0.3)
    result.add(box((0, 1.65, 0), (4.2, 1.3, 1.2), paint), box((0, 0.38, 0), (4.1, 0.1, 1.1), RUBBER))
    band = Material(pick(rng, PAINTS), gloss=0.3)
    result.add(box((0, 1.1, 0), (4.22, 0.12, 1.22), band))
    for i in range(6):
        result.add(box((-3.2 + 1.25 * i, 2.05, 0), (0.54, 0.45, 1.215), PANE))
    result.add(box((-4.2, 2.0, 0), (0.02, 0.62, 1.05), PANE), box((4.2, 2.2, 0), (0.02, 0.42, 1.0), PANE))
    for x in (-2.7, 2.5):
        result.add(*_wheel(x, -1.1, 0.48, 0.14), *_wheel(x, 1.1, 0.48, 0.14))
    for z in (-0.85, 0.85):
        result.add(box((-4.21, 0.85, z), (0.02, 0.1, 0.16), HEADLIGHT))
    return result


def _tube(start: tuple[float, float], end: tuple[float, float], radius: float, material: Material) -> Primitive:
    return round_cone((start[0], start[1], 0.0), (end[0], end[1], 0.0), (radius, radius), material)


def bicycle(rng: np.random.Generator) -> Thing:
    """A bicycle, its length along x."""
    result = thing("bicycle", 0.85, 1.0)
    paint, black = Material(pick(rng, PAINTS), gloss=0.4), Material((0.08, 0.08, 0.09))
    lying = turn(pitch=math.pi / 2)
    for x in (-0.52, 0.52):
        result.add(frustum((x, 0.34, 0), (0.34, 0.022, 0.34), RUBBER, hole=0.86, rotation=lying))
        result.add(frustum((x, 0.34, 0), (0.045, 0.04, 0.045), STEEL, rotation=lying))
        for k in range(3):
            dx, dy = 0.3 * math.cos(k * math.pi / 3 + x), 0.3 * math.sin(k * math.pi / 3 + x)
            result.add(_tube((x - dx, 0.34 - dy), (x + dx, 0.34 + dy), 0.005, STEEL))
    pedal, saddle, head = (0.08, 0.30), (0.2, 0.82), (-0.34, 0.80)
    for start, end in ((pedal, saddle), (saddle, head), (head, pedal), (pedal, (0.52, 0.34)), (saddle, (0.52, 0.34))):
        result.add(_tube(start, end, 0.018, paint))
    result.add(_tube((-0.36, 0.95), (-0.52, 0.34), 0.018, paint), _tube(saddle, (0.22, 0.94), 0.014, STEEL))
    result.add(round_cone((0.12, 0.96, 0), (0.32, 0.97, 0), (0.03, 0.06), black, flat=1.4))
    result.add(round_cone((-0.36, 0.97, -0.26), (-0.36, 0.97, 0.26), (0.016, 0.016), black))
    result.add(frustum((pedal[0], pedal[1], 0), (0.09, 0.02, 0.09), STEEL, rotation=lying))
    return result


def motorbike(rng: np.random.Generator) -> Thing:
    """A motorbike, its length along x."""
    result = thing("motorbike", 1.0, 1.1)
    paint, black = Material(pick(rng, PAINTS), gloss=0.5), Material((0.09, 0.09, 0.10), gloss=0.1)
    for x in (-0.70, 0.68):
        result.add(*_wheel(x, 0.0, 0.31, 0.065))
    result.add(round_cone((-0.28, 0.80, 0), (0.12, 0.76, 0), (0.15, 0.10), paint, flat=0.8))
    result.add(round_cone((0.10, 0.76, 0), (0.72, 0.84, 0), (0.08, 0.07), black, flat=1.5))
    result.add(ellipsoid((-0.06, 0.42, 0), (0.24, 0.20, 0.15), STEEL), box((-0.06, 0.58, 0), (0.28, 0.07, 0.09), black))
    result.add(_tube((-0.70, 0.31), (-0.42, 0.98), 0.035, STEEL), _tube((0.68, 0.31), (0.05, 0.45), 0.03, black))
    result.add(round_cone((-0.40, 1.02, -0.34), (-0.40, 1.02, 0.34), (0.02, 0.02), black))
    result.add(ellipsoid((-0.52, 0.86, 0), (0.09, 0.10, 0.10), HEADLIGHT))
    result.add(
        prism((-0.70, 0.61, 0), (0.24, 0.04, 0.07), paint, side=0.5),
        prism((0.70, 0.64, 0), (0.26, 0.05, 0.08), paint, side=0.5),
    )
    result.add(round_cone((0.0, 0.25, -0.16), (0.75, 0.34, -0.16), (0.04, 0.06), STEEL))
    return result


def train(rng: np.random.Generator) -> Thing:
    """A railway coach or an engine with a slanting front, 14 m long, its nose to -x, on a stretch of track."""
    result = thing("train", 7.0, 3.6)
    paint, band = Material(pick(rng, PAINTS), gloss=0.3), Material(pick(rng, PAINTS + FACADES), gloss=0.3)
    result.add(prism((0, 2.05, 0), (7.0, 1.35, 1.4), paint, side=0.16), box((0, 1.25, 0), (6.9, 0.16, 1.42), band))
    result.add(prism((0, 3.45, 0), (6.2, 0.12, 1.2), Material((0.45, 0.45, 0.47)), side=0.1, front=0.4, back=0.4))
    for i in range(7):
        result.add(box((-4.6 + 1.7 * i, 2.35, 0), (0.55, 0.42, 1.415), PANE))
    result.add(box((-6.55, 2.5, 0), (0.06, 0.5, 1.05), PANE, rotation=turn(roll=-0.4)))
    for x in (-4.8, -3.6, 3.6, 4.8):
        for z in (-1.1, 1.1):
            result.add(frustum((x, 0.45, z), (0.42, 0.08, 0.42), RUBBER, rotation=turn(pitch=math.pi / 2)))
    result.add(box((0, 0.62, 0), (6.4, 0.12, 1.0), RUBBER))
    result.add(*(ellipsoid((-6.98, 1.25, z), (0.1, 0.16, 0.16), HEADLIGHT) for z in (-0.9, 0.9)))
    return result


def rails(rng: np.random.Generator) -> Thing:
    """Ballast and two rails, 80 m along x; a track is ground to VOC."""
    result = thing("track", 0.0, 0.1, context="ground")
    stones = Material((0.50, 0.47, 0.44), (0.34, 0.32, 0.30), "fur", 1.0)
    result.add(box((0, 0.02, 0), (40.0, 0.02, 1.8), stones))
    result.add(*(box((0, 0.08, z), (40.0, 0.05, 0.04), STEEL) for z in (-0.75, 0.75)))
    return result


def boat(rng: np.random.Generator) -> Thing:
    """A sailing boat or a rowing boat on the water, its bow to -x."""
    result = thing("boat", 2.2, 2.5)
    hull = Material(pick(rng, PAINTS), gloss=0.3)
    wide = Material(pick(rng, ((0.85, 0.80, 0.68), (0.50, 0.34, 0.2))), gloss=0.1)
    keel = turn(roll=math.pi)  # a prism upside down is drawn in below
    result.add(prism((0.2, 0.30, 0), (1.9, 0.42, 0.62), hull, side=0.35, front=0.5, back=0.5, rotation=keel))
    result.add(ellipsoid((-1.45, 0.34, 0), (0.75, 0.38, 0.55), hull, cut=((0.0, 1.0, 0.0, -0.98),)))
    result.add(box((0.2, 0.72, 0), (1.92, 0.03, 0.64), wide))
    if rng.random() < 0.65:
        sail = Material(pick(rng, ((0.94, 0.93, 0.9), (0.80, 0.25, 0.2), (0.25, 0.4, 0.6))))
        result.height = 5.0
        result.add(round_cone((-0.2, 0.7, 0), (-0.2, 5.0, 0), (0.05, 0.03), STEEL))
        result.add(prism((0.85, 2.85, 0.02), (0.98, 1.85, 0.025), sail, side=1.9, rotation=turn(roll=0.0)))
        result.add(round_cone((-0.2, 0.95, 0), (1.9, 0.95, 0), (0.04, 0.03), wide))
    else:
        result.add(prism((0.4, 1.05, 0), (0.75, 0.32, 0.45), wide, side=0.25, front=0.2, back=0.2))
        result.add(box((0.4, 1.1, 0), (0.5, 0.14, 0.46), PANE))
    return result


def aeroplane(rng: np.random.Generator) -> Thing:
    """An airliner, 12 m long, its nose to -x; it flies or stands on its wheels."""
    result = thing("aeroplane", 6.0, 4.0)
    white = Material(pick(rng, ((0.92, 0.92, 0.93), (0.80, 0.82, 0.86))), gloss=0.3)
    tint = Material(pick(rng, PAINTS), gloss=0.3)
    result.add(round_cone((-4.6, 1.6, 0), (2.6, 1.6, 0), (0.7, 0.7), white))
    result.add(round_cone((2.4, 1.6, 0), (5.6, 1.95, 0), (0.7, 0.2), white))
    result.add(box((-0.8, 1.72, 0), (3.4, 0.09, 0.705), Material((0.2, 0.25, 0.32), white.color, "pinstripes", 0.45)))
    for side in (-1.0, 1.0):
        wing = turn(yaw=side * 0.45)
        result.add(prism((0.6, 1.4, side * 2.9), (0.75, 0.07, 3.0), white, rotation=wing))
        result.add(prism((5.0, 2.0, side * 1.0), (0.4, 0.05, 1.1), white, rotation=wing))
        result.add(round_cone((-0.5, 1.05, side * 2.0), (0.6, 1.05, side * 2.0), (0.28, 0.22), tint))
    result.add(prism((5.1, 2.9, 0), (0.7, 1.0, 0.06), tint, side=0.9, rotation=turn(roll=-0.35)))
    result.add(*(ellipsoid((x, 0.3, z), (0.3, 0.3, 0.12), RUBBER) for x, z in ((-3.8, 0.0), (0.8, -0.8), (0.8, 0.8))))
    return result


def tree(rng: np.random.Generator) -> Thing:
    """A broad-leaved tree or a fir; background in VOC."""
    result = thing("tree", 0.9, 5.0)
    bark = Material((0.34, 0.25, 0.17), (0.24, 0.17, 0.12), "wood", 0.6)
    color = pick(rng, LEAVES)
    green = Material(color, (color[0] * 1.7, color[1] * 1.5, color[2] * 1.3), "leaves", 0.2)
    if rng.random() < 0.3:
        result.add(frustum((0, 0.5, 0), (0.13, 0.5, 0.13), bark))
        for i in range(4):
            wide = 1.25 - 0.25 * i
            result.add(frustum((0, 1.3 + 0.95 * i, 0), (wide, 0.75, wide), green, top=0.05))
        return result
    trunk = float(rng.uniform(1.3, 2.2))
    result.add(round_cone((0, 0, 0), (0.1, trunk + 0.8, 0), (0.2, 0.11), bark))
    result.add(*blobs(rng, (0.1, trunk + 1.5, 0.0), 1.15, 0.75, 9, green))
    return result


def bush(rng: np.random.Generator) -> Thing:
    """A bush, labelled as a tree."""
    result = thing("bush", 0.8, 1.0, context="tree")
    color = pick(rng, LEAVES)
    green = Material(color, (color[0] * 1.7, color[1] * 1.5, color[2] * 1.3), "leaves", 0.3)
    result.add(*blobs(rng, (0.0, 0.35, 0.0), 0.5, 0.35, 5, green))
    return result


def building(rng: np.random.Generator) -> Thing:
    """A block with rows of windows and a flat or pitched roof; background in VOC."""
    x, y, z = float(rng.uniform(3.0, 6.0)), float(rng.uniform(2.5, 7.0)), float(rng.uniform(2.5, 4.0))
    result = thing("building", math.hypot(x, z), 2 * y)
    wall = Material(pick(rng, FACADES), pick(rng, ((0.22, 0.26, 0.32), (0.45, 0.52, 0.58))), "windows",
                    float(rng.uniform(1.3, 2.0)), 0.1)  # fmt: skip
    result.add(box((0, y, 0), (x, y, z), wall))
    roof = Material(pick(rng, ((0.50, 0.24, 0.18), (0.30, 0.30, 0.33))))
    if y < 4.5:
        result.add(prism((0, 2 * y + 0.8, 0), (x + 0.3, 0.8, z + 0.3), roof, front=0.98, back=0.98))
    else:
        result.add(box((0, 2 * y + 0.15, 0), (x + 0.15, 0.15, z + 0.15), roof))
    result.add(box((float(rng.uniform(-0.5, 0.5)) * x, 1.05, -z), (0.55, 1.05, 0.05), Material(pick(rng, FABRICS))))
    return result


def fence(rng: np.random.Generator) -> Thing:
    """A stretch of fence, 6 m along x."""
    result = thing("fence", 0.0, 1.1)
    color = pick(rng, ((0.55, 0.42, 0.28), (0.90, 0.90, 0.88), (0.36, 0.30, 0.26)))
    plank = Material(color, (color[0] * 0.7, color[1] * 0.7, color[2] * 0.7), "wood", 0.4)
    result.add(*(box((i - 3.0, 0.55, 0), (0.06, 0.55, 0.05), plank) for i in range(7)))
    result.add(*(box((0, y, -0.05), (3.0, 0.06, 0.02), plank) for y in (0.45, 0.85)))
    return result
