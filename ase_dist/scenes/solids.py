"""The shapes that scenes are built of, each in a frame of its own, and the things that are made of them.

A solid is the points of its frame where a quadric ``a x^2 + b y^2 + c z^2 + d y + e <= 0`` and some half-spaces
``n.x + w <= 0`` hold together: that one form covers ellipsoids, boxes, cylinders, frustums and prisms. The other shape
is the round cone, the hull of two spheres, of which limbs are made. The frame's columns are the shape's axes in the
thing's coordinates, half-lengths included, so a sphere of radius 1 becomes any ellipsoid.

World and thing coordinates: metres, x right, y up, z away from the viewer; a thing faces -z and stands on y = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ase_dist.scenes.materials import Material, f32

Array = NDArray[np.float32]
Vector = tuple[float, float, float]

MAX_PLANES = 6
SPHERE = (1.0, 1.0, 1.0, 0.0, -1.0)
CYLINDER = (1.0, 0.0, 1.0, 0.0, -1.0)
FAR_PLANE = (0.0, 0.0, 0.0, -1.0)  # a half-space that holds everywhere: fills up the array of planes
BOX = tuple((*(sign * float(axis == i) for i in range(3)), -1.0) for axis in range(3) for sign in (1.0, -1.0))
CAPS = BOX[2:4]


class Primitive(NamedTuple):
    """One shape: a solid where ``cone`` is None, otherwise the round cone (length, radius at 0, radius at length)."""

    center: Vector
    frame: Array
    quadric: tuple[float, ...] | None
    planes: tuple[tuple[float, ...], ...]
    bounds: tuple[Vector, Vector]
    cone: tuple[float, float, float] | None
    hole: float
    material: Material
    part: str


@dataclass
class Thing:
    """One object of a scene: its shapes, what it is, and where it stands.

    ``voc`` is the id among the 21 classes, ``context`` the one among PASCAL-Context's 459; ``radius`` is that of the
    circle on the ground that no other thing may enter.
    """

    name: str
    voc: int
    context: int
    radius: float
    height: float
    shapes: list[Primitive] = field(default_factory=list)
    position: Vector = (0.0, 0.0, 0.0)
    yaw: float = 0.0
    salient: bool = False

    def add(self, *shapes: Primitive) -> None:
        """Append shapes."""
        self.shapes.extend(shapes)

    def at(self, x: float, z: float, *, y: float = 0.0, yaw: float = 0.0) -> Thing:
        """Stand the thing at (x, y, z), turned by ``yaw`` radians about the vertical; returns the thing."""
        self.position, self.yaw = (x, y, z), yaw
        return self


def yaw_matrix(angle: float) -> Array:
    """Rotation by ``angle`` radians about the vertical."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]], np.float32)


def turn(*, yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> Array:
    """Rotation matrix: first ``roll`` about z, then ``pitch`` about x, then ``yaw`` about y (radians)."""
    c, s = math.cos(pitch), math.sin(pitch)
    about_x = np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]], np.float32)
    c, s = math.cos(roll), math.sin(roll)
    about_z = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]], np.float32)
    return f32(yaw_matrix(yaw) @ about_x @ about_z)


def _frame(size: Vector, rotation: Array | None) -> Array:
    scale = np.array(size, np.float32)
    return f32(np.diag(scale) if rotation is None else rotation * scale)


def ellipsoid(
    center: Vector, size: Vector, material: Material, *, rotation: Array | None = None, part: str = "",
    cut: tuple[tuple[float, ...], ...] = (),
) -> Primitive:  # fmt: skip
    """Ellipsoid with half-axes ``size``; of it only what lies within the half-spaces ``cut`` of its unit frame."""
    bounds = ((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0))
    return Primitive(center, _frame(size, rotation), SPHERE, cut, bounds, None, 0.0, material, part)


def box(
    center: Vector, size: Vector, material: Material, *, rotation: Array | None = None, part: str = ""
) -> Primitive:
    """Box with half-lengths ``size``."""
    bounds = ((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0))
    return Primitive(center, _frame(size, rotation), None, BOX, bounds, None, 0.0, material, part)


def prism(
    center: Vector, size: Vector, material: Material, *, front: float = 0.0, back: float = 0.0, side: float = 0.0,
    rotation: Array | None = None, part: str = "",
) -> Primitive:  # fmt: skip
    """Box whose top is drawn in by shares of the half-length: ``front`` (-z), ``back`` (+z), ``side`` (both x)."""
    planes = (
        *CAPS,
        (0.0, front / 2, -1.0, front / 2 - 1.0),
        (0.0, back / 2, 1.0, back / 2 - 1.0),
        (1.0, side / 2, 0.0, side / 2 - 1.0),
        (-1.0, side / 2, 0.0, side / 2 - 1.0),
    )
    bounds = ((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0))
    return Primitive(center, _frame(size, rotation), None, planes, bounds, None, 0.0, material, part)


def frustum(
    center: Vector, size: Vector, material: Material, *, top: float = 1.0, hole: float = 0.0,
    rotation: Array | None = None, part: str = "",
) -> Primitive:  # fmt: skip
    """Upright frustum: radii ``size[0]`` and ``size[2]`` below, ``top`` times that above, half-height ``size[1]``.

    ``hole`` leaves out the caps within that share of the radius: rings and wheels.
    """
    mean, slope = (1.0 + top) / 2, (top - 1.0) / 2  # radius along y in -1..1
    quadric = (1.0, -slope * slope, 1.0, -2 * mean * slope, -mean * mean)
    wide = max(1.0, top)
    bounds = ((-wide, -1.0, -wide), (wide, 1.0, wide))
    return Primitive(center, _frame(size, rotation), quadric, CAPS, bounds, None, hole, material, part)


def round_cone(
    start: Vector, end: Vector, radii: tuple[float, float], material: Material, *, flat: float = 1.0,
    side: Vector = (1.0, 0.0, 0.0), part: str = "",
) -> Primitive:  # fmt: skip
    """Hull of two spheres; ``flat`` scales its thickness across the direction ``side`` and the axis."""
    a, b, c = (end[i] - start[i] for i in range(3))
    distance = math.sqrt(a * a + b * b + c * c) or 1e-6
    y = (a / distance, b / distance, c / distance)
    x = _across(y, side) or _across(y, (y[1], y[2], y[0])) or _across(y, (1.0, 0.0, 0.0))
    assert x is not None
    z = (x[1] * y[2] - x[2] * y[1], x[2] * y[0] - x[0] * y[2], x[0] * y[1] - x[1] * y[0])
    frame = np.array([[x[i], y[i], z[i] * flat] for i in range(3)], np.float32)
    length, wide = max(distance, abs(radii[0] - radii[1]) + 1e-3), max(radii)
    bounds = ((-wide, -radii[0], -wide), (wide, length + radii[1], wide))
    return Primitive(start, frame, None, (), bounds, (length, *radii), 0.0, material, part)


def _across(axis: Vector, side: Vector) -> Vector | None:
    """The unit vector across ``axis`` that is nearest to ``side``; None if that runs along the axis."""
    along = sum(axis[i] * side[i] for i in range(3))
    x, y, z = (side[i] - along * axis[i] for i in range(3))
    length = math.sqrt(x * x + y * y + z * z)
    return (x / length, y / length, z / length) if length > 1e-3 else None
