"""Where rays first meet the shapes of a scene: one shape at a time on its bounding box, with a depth buffer.

Letters: P shapes, K half-spaces of a shape, H rows and W columns of the picture. A ray is ``o + t d``. In a view all
rays share their origin (a camera) or their direction (a light), and the other of the two is affine in the picture's
coordinates, ``a u + b v + c``. A linear map into a shape's frame keeps that form, so that a shape's rays cost two sums.

Nothing here depends on the order of the pixels: every value is made by elementwise operations, no matrix product and
no reduction over pixels, so a mirrored view gives the mirrored picture to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ase_dist.scenes.materials import f32
from ase_dist.scenes.solids import BOX, FAR_PLANE, MAX_PLANES, Array, Primitive, Thing, yaw_matrix

Ints = NDArray[np.int16]
Indices = NDArray[np.int64]
NEAR = 0.05
FAR = 400.0
CURVED = -1  # the face of a hit on the quadric; planes are 0, 1, ...
MISS = np.float32(np.inf)


@dataclass(frozen=True)
class View:
    """Rays through a picture: ``right`` and ``down`` per unit of the plane coordinates ``u`` [W] and ``v`` [H].

    A camera's rays start in ``origin`` and point along ``right u + down v + forward``; with ``parallel`` they start at
    ``origin + right u + down v`` and all point along ``forward``.
    """

    origin: Array
    right: Array
    down: Array
    forward: Array
    u: Array
    v: Array
    parallel: bool = False

    def project(self, points: Array) -> tuple[Array, Array, Array]:
        """Plane coordinates u, v and the ray parameter t of world ``points`` [..., 3]; the axes are orthonormal."""
        offset = points - self.origin
        x, y, t = dot3(offset, self.right), dot3(offset, self.down), dot3(offset, self.forward)
        if self.parallel:
            return x, y, t
        depth = np.maximum(t, np.float32(NEAR))
        return x / depth, y / depth, t


class Shapes(NamedTuple):
    """All shapes of a scene as arrays in world coordinates."""

    inverse: Array  # [P, 3, 3] world to frame
    frame: Array  # [P, 3, 3] frame to world
    center: Array  # [P, 3]
    quadric: Array  # [P, 5]
    planes: Array  # [P, K, 4]
    cone: Array  # [P, 3]
    corners: Array  # [P, 8, 3] of the bounding box, world
    thing: NDArray[np.int64]  # [P] index of the thing
    sources: Sequence[Primitive]


class Hits(NamedTuple):
    """The nearest hit of each ray: its parameter, the shape (-1: none) and the face of the shape."""

    t: Array
    shape: Ints
    face: Ints


def dot3(a: Array, b: Array) -> Array:
    """Scalar product over the last axis, added in a fixed order."""
    product = a * b
    return f32(product[..., 0] + product[..., 1] + product[..., 2])


def pack(things: Sequence[Thing]) -> Shapes:
    """The shapes of ``things`` in world coordinates."""
    sources = [shape for thing in things for shape in thing.shapes]
    owner = np.array([i for i, thing in enumerate(things) for _ in thing.shapes], np.int64)
    rotation = np.stack([yaw_matrix(thing.yaw) for thing in things])[owner]
    position = np.array([thing.position for thing in things], np.float32)[owner]
    frames = np.stack([shape.frame for shape in sources])
    frame = f32((rotation[..., :, :, None] * frames[..., None, :, :]).sum(axis=-2))  # elementwise: no BLAS
    center = position + _apply(rotation, np.array([shape.center for shape in sources], np.float32))
    low_high = np.array([shape.bounds for shape in sources], np.float32)
    corners = np.stack([low_high[:, [i & 1, i >> 1 & 1, i >> 2 & 1], [0, 1, 2]] for i in range(8)], axis=1)
    return Shapes(
        inverse=np.linalg.inv(frame).astype(np.float32),
        frame=frame,
        center=center,
        quadric=np.array([shape.quadric or (0.0,) * 5 for shape in sources], np.float32),
        planes=np.array(
            [[*shape.planes, *[FAR_PLANE] * (MAX_PLANES - len(shape.planes))] for shape in sources], np.float32
        ),
        cone=np.array([shape.cone or (0.0,) * 3 for shape in sources], np.float32),
        corners=center[:, None] + _apply(frame[:, None], corners),
        thing=owner,
        sources=sources,
    )


def _apply(matrix: Array, vectors: Array) -> Array:
    return dot3(matrix, vectors[..., None, :])


@np.errstate(divide="ignore", invalid="ignore")  # a ray may run along a plane or a cone's side
def trace(
    shapes: Shapes, view: View, limit: Array, *, where: Indices | None = None, only: Indices | None = None
) -> Hits:
    """The nearest shape along each ray of ``view`` that lies nearer than its ``limit``, rays row by row.

    ``where`` names the rays by their sorted flat indices in the view's grid, ``only`` the shapes; None being all.
    """
    hits = Hits(limit.copy(), np.full(limit.shape, -1, np.int16), np.full(limit.shape, CURVED, np.int16))
    axes = [_apply(shapes.inverse, axis) for axis in (view.right, view.down, view.forward)]
    start = _apply(shapes.inverse, view.origin - shapes.center)
    boxes = _boxes(shapes, view)
    choose = _slices(view, hits) if where is None else _picks(view, hits, where)
    for index in range(len(boxes)) if only is None else only:
        if boxes[index, 0] >= boxes[index, 1] or boxes[index, 2] >= boxes[index, 3]:
            continue
        u, v, kept = choose(*boxes[index])
        if not u.size:
            continue
        still, fixed = (axes[2], start) if view.parallel else (start, axes[2])
        moving = affine(axes[0][index], axes[1][index], fixed[index], u, v)
        o, d = (moving, still[index]) if view.parallel else (still[index], moving)
        found, face = _meet(shapes, int(index), o, d)
        kept.keep_nearer(found, np.int16(index), face)
    return hits


class _Slices(NamedTuple):
    """The hits on a rectangle of the grid, as views."""

    t: Array
    shape: Ints
    face: Ints

    def keep_nearer(self, found: Array, index: np.int16, face: Ints | int) -> None:
        nearer = found < self.t
        np.copyto(self.t, found, where=nearer)
        np.copyto(self.shape, index, where=nearer)
        np.copyto(self.face, face, where=nearer, casting="same_kind")


class _Picks(NamedTuple):
    """The hits of some of the rays, by their places in the list."""

    hits: Hits
    places: Indices

    def keep_nearer(self, found: Array, index: np.int16, face: Ints | int) -> None:
        nearer = found < self.hits.t[self.places]
        places = self.places[nearer]
        self.hits.t[places] = found[nearer]
        self.hits.shape[places] = index
        self.hits.face[places] = face if isinstance(face, int) else face[nearer]


Chooser = Callable[[int, int, int, int], tuple[Array, Array, "_Slices | _Picks"]]


def _slices(view: View, hits: Hits) -> Chooser:
    grid = (len(view.v), len(view.u))
    t, shape, face = hits.t.reshape(grid), hits.shape.reshape(grid), hits.face.reshape(grid)

    def choose(top: int, bottom: int, left: int, right: int) -> tuple[Array, Array, _Slices]:
        rows, columns = slice(top, bottom), slice(left, right)
        kept = _Slices(t[rows, columns], shape[rows, columns], face[rows, columns])
        return view.u[None, columns], view.v[rows, None], kept

    return choose


def _picks(view: View, hits: Hits, where: Indices) -> Chooser:
    row, column = np.divmod(where, len(view.u))
    u, v, first = view.u[column], view.v[row], np.searchsorted(row, np.arange(len(view.v) + 1))

    def choose(top: int, bottom: int, left: int, right: int) -> tuple[Array, Array, _Picks]:
        begin, end = first[top], first[bottom]
        inside = (column[begin:end] >= left) & (column[begin:end] < right)
        places = np.flatnonzero(inside) + begin
        return u[places], v[places], _Picks(hits, places)

    return choose


def affine(right: Array, down: Array, constant: Array, u: Array, v: Array) -> Array:
    """``right u + down v + constant``, three components before the broadcast shape of ``u`` and ``v``.

    The first sum is symmetric, so that turning a view by 90 degrees changes no bit.
    """
    column = (3, *[1] * u.ndim)
    moving = right.reshape(column) * u + down.reshape(column) * v
    return np.add(moving, constant.reshape(column), out=moving)


def directions(view: View, where: Indices | None = None) -> Array:
    """Directions [3, n] of all rays of a camera's view row by row, or of those with flat indices ``where``."""
    if where is None:
        return affine(view.right, view.down, view.forward, view.u[None, :], view.v[:, None]).reshape(3, -1)
    row, column = np.divmod(where, len(view.u))
    return affine(view.right, view.down, view.forward, view.u[column], view.v[row])


def _boxes(shapes: Shapes, view: View) -> NDArray[np.int64]:
    """Rows [top, bottom) and columns [left, right) that each shape may cover [P, 4], a pixel wider than needed."""
    x, y, t = view.project(shapes.corners)
    behind = (t < NEAR).any(axis=1) & (not view.parallel)
    hidden = (t < NEAR).all(axis=1) & (not view.parallel)
    ranges = []
    for values, grid in ((y, view.v), (x, view.u)):
        step = grid[1] - grid[0]
        low = np.floor((values.min(axis=1) - grid[0]) / step) - 1
        high = np.ceil((values.max(axis=1) - grid[0]) / step) + 2
        ranges += [np.where(behind, 0, low), np.where(hidden, 0, np.where(behind, len(grid), high))]
    limits = np.array([len(view.v), len(view.v), len(view.u), len(view.u)])
    return np.clip(np.stack(ranges, axis=1), 0, limits).astype(np.int64)


def _meet(shapes: Shapes, index: int, o: Array, d: Array) -> tuple[Array, Ints | int]:
    shape = shapes.sources[index]
    if shape.cone is not None:
        return _meet_round_cone(o, d, *shape.cone), CURVED
    if shape.planes is BOX:
        enter, leave, face = _meet_box(o, d)
        return np.where((enter < leave) & (enter > NEAR), enter, MISS), face
    enter, leave, face = _meet_planes(shapes.planes[index, : len(shape.planes)], o, d)
    if shape.quadric is not None:
        curved_in, curved_out = _meet_quadric(shapes.quadric[index], o, d)
        face = np.where(curved_in > enter, np.int16(CURVED), face)
        enter, leave = np.maximum(enter, curved_in), np.minimum(leave, curved_out)
    found = np.where((enter < leave) & (enter > NEAR), enter, MISS)
    if shape.hole:
        x, z = o[0] + found * d[0], o[2] + found * d[2]
        found = np.where((face != CURVED) & (x * x + z * z < np.float32(shape.hole**2)), MISS, found)
    return found, face


def _meet_box(o: Array, d: Array) -> tuple[Array, Array, Ints]:
    """As ``_meet_planes`` for the six planes of BOX: of each pair, a ray enters by the one that faces it."""
    column = (3, *[1] * (max(o.ndim, d.ndim) - 1))
    o, d = (v.reshape(column) if v.ndim == 1 else v for v in (o, d))
    near, far = (-1 - o) / d, (1 - o) / d
    low, high = np.minimum(near, far), np.maximum(near, far)
    faces = (d > 0).astype(np.int16)
    enter, face = low[0], np.broadcast_to(faces[0], low[0].shape)
    for axis in (1, 2):
        later = low[axis] > enter
        enter = np.maximum(enter, low[axis])
        face = np.where(later, np.int16(2 * axis) + faces[axis], face)
    return enter, np.minimum(np.minimum(high[0], high[1]), high[2]), face


def _meet_planes(planes: Array, o: Array, d: Array) -> tuple[Array, Array, Ints]:
    """The stretch of each ray within all half-spaces, and the plane that it enters by."""
    enter = np.full(np.broadcast(o[0], d[0]).shape, -MISS, np.float32)
    leave = np.full_like(enter, MISS)
    face = np.full(enter.shape, CURVED, np.int16)
    for k, (*normal, w) in enumerate(planes):
        slope, start = _along(normal, d), _along(normal, o) + w
        slope = np.where(slope == 0, np.float32(1e-12), slope)  # along the plane: never enters, leaves at +-infinity
        t = -start / slope
        going_in = slope < 0
        later = going_in & (t > enter)
        enter = np.where(later, t, enter)
        face = np.where(later, np.int16(k), face)
        leave = np.where(going_in, leave, np.minimum(leave, t))
    return enter, leave, face


def _along(normal: list[np.float32], vectors: Array) -> Array:
    """Scalar product of a plane's normal with vectors [3, ...]; most normals are mostly zeros."""
    terms = [weight * vectors[axis] for axis, weight in enumerate(normal) if weight]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return f32(total)


def _meet_quadric(quadric: Array, o: Array, d: Array) -> tuple[Array, Array]:
    """The stretch of each ray within the quadric (of a double cone: the nappe that widens along +-y as built)."""
    qa, qb, qc, qd, qe = quadric
    a = qa * d[0] * d[0] + qb * d[1] * d[1] + qc * d[2] * d[2]
    b = qa * o[0] * d[0] + (qb * o[1] + qd / 2) * d[1] + qc * o[2] * d[2]
    c = qa * o[0] * o[0] + (qb * o[1] + qd) * o[1] + qc * o[2] * o[2] + qe
    inside = b * b - a * c
    root = np.sqrt(np.maximum(inside, 0))
    enter, leave = (-b - root) / a, (-b + root) / a
    if qb < 0:
        widening, steep = d[1] * qd < 0, a < 0
        enter = np.where(steep & ~widening, -MISS, enter)
        leave = np.where(steep & widening, MISS, leave)
    return np.where(inside > 0, enter, MISS), leave


def _meet_round_cone(o: Array, d: Array, length: float, low: float, high: float) -> Array:
    """First meeting with the hull of a sphere of radius ``low`` at 0 and one of radius ``high`` at ``length`` on y."""
    sine = (low - high) / length
    tangent = sine / (1 - sine * sine) ** 0.5
    apex = np.float32(low / (1 - sine * sine) ** 0.5)  # the cone's radius at y = 0
    k, span = np.float32(tangent), np.float32(length)
    flat_dd, flat_od, flat_oo = d[0] * d[0] + d[2] * d[2], o[0] * d[0] + o[2] * d[2], o[0] * o[0] + o[2] * o[2]
    dd, od, oo = flat_dd + d[1] * d[1], flat_od + o[1] * d[1], flat_oo + o[1] * o[1]
    found = np.minimum(
        _first_root(dd, od, oo - np.float32(low * low)),
        _first_root(dd, od - span * d[1], oo - 2 * span * o[1] + np.float32(length * length - high * high)),
    )
    radius = apex - k * o[1]
    a, b, c = flat_dd - k * k * d[1] * d[1], flat_od + k * radius * d[1], flat_oo - radius * radius
    # Where a < 0 the ray is steeper than the cone's side; the root is then still the one where it enters the nappe that
    # widens along the ray, and lies beyond the apex otherwise.
    t = _first_root(a, b, c)
    y = o[1] + np.where(t < MISS, t, 0) * d[1]
    side = (t > NEAR) & (y > np.float32(low * sine)) & (y < np.float32(length + high * sine))
    found = np.where(side, np.minimum(found, t), found)
    return f32(np.where(found > NEAR, found, MISS))


def _first_root(a: Array, b: Array, c: Array) -> Array:
    inside = b * b - a * c
    return f32(np.where(inside > 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, MISS))
