"""What is seen where rays end: colour, surface normal and labels of every sample.

Letters: n samples (rays), P shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ase_dist.scenes.classes import PARTS
from ase_dist.scenes.lighting import (
    ShadowMap,
    contact_shade,
    corner_shade,
    haze,
    highlight,
    lamp_share,
    light_up,
    tone,
    toward_light,
)
from ase_dist.scenes.materials import PATTERNS, Material, blend, f32, noise
from ase_dist.scenes.solids import Array, Thing
from ase_dist.scenes.tracing import CURVED, FAR, Shapes
from ase_dist.scenes.world import Surroundings


class Rays(NamedTuple):
    """Samples: origin [3, 1], directions [3, n], and what they hit, all [n] (``surface`` -1 is the sky)."""

    origin: Array
    direction: Array
    t: Array
    shape: NDArray[np.int16]
    face: NDArray[np.int16]
    surface: NDArray[np.int8]
    pixel: float  # the angle of a pixel in radians


class Seen(NamedTuple):
    """Colours in 0..1 [3, n], world normals [3, n] (zero in the sky) and Context ids [n]."""

    colors: Array
    normals: Array
    context: NDArray[np.uint16]


class Palette(NamedTuple):
    """Materials of all shapes as arrays."""

    first: Array  # [3, P]
    second: Array  # [3, P]
    pattern: NDArray[np.int64]  # [P] index into names
    names: Sequence[str]
    scale: Array
    gloss: Array
    glow: Array
    size: Array  # [3, P] metres per unit of the frame's axes
    context: NDArray[np.uint16]
    part: NDArray[np.uint8]
    look_alike: NDArray[np.int64]  # [P] the same number for shapes of one thing and one material


def palette(shapes: Shapes, things: Sequence[Thing]) -> Palette:
    """Look up the materials of all shapes."""
    materials = [shape.material for shape in shapes.sources]
    names = sorted({material.pattern for material in materials})
    kinds: dict[tuple[int, Material], int] = {}
    return Palette(
        first=np.array([m.color for m in materials], np.float32).T,
        second=np.array([m.second for m in materials], np.float32).T,
        pattern=np.array([names.index(m.pattern) for m in materials]),
        names=names,
        scale=np.array([m.scale for m in materials], np.float32),
        gloss=np.array([m.gloss for m in materials], np.float32),
        glow=np.array([m.glow for m in materials], np.float32),
        size=np.sqrt((shapes.frame * shapes.frame).sum(axis=1)).T,
        context=np.array([thing.context for thing in things], np.uint16)[shapes.thing],
        part=np.array([PARTS.get(shape.part, 0) for shape in shapes.sources], np.uint8),
        look_alike=np.array([kinds.setdefault(key, len(kinds)) for key in zip(shapes.thing, materials, strict=True)]),
    )


def shade(
    rays: Rays, world: Surroundings, shapes: Shapes, look: Palette, shadows: ShadowMap, things: Sequence[Thing]
) -> Seen:
    """1. Paint the sky. 2. Paint the surroundings. 3. Paint the shapes. 4. Light the last two and add haze."""
    n = len(rays.t)
    zeros = np.zeros(n, np.float32)
    paint = _Paint(
        colors=np.zeros((3, n), np.float32),
        normals=np.zeros((3, n), np.float32),
        context=np.zeros(n, np.uint16),
        gloss=zeros,
        glow=zeros.copy(),
        cover=np.ones(n, np.float32),
    )
    points = rays.origin + rays.t * rays.direction
    solid = _paint_sky(rays, world, paint)
    _paint_surfaces(rays, world, points, things, paint)
    found = np.flatnonzero(rays.shape >= 0)
    if len(found):
        _paint_shapes(rays, shapes, look, points.take(found, axis=1), found, paint)
    _light(rays, world, shadows, points, solid, paint)
    return Seen(paint.colors, paint.normals, paint.context)


def _light(
    rays: Rays, world: Surroundings, shadows: ShadowMap, points: Array, solid: NDArray[np.int64] | slice, paint: _Paint
) -> None:
    """Light the ``solid`` samples, add their shine, then haze."""
    light, normals, gloss = world.light, paint.normals[:, solid], paint.gloss[solid]
    lit = lamp_share(shadows, toward_light(light), points[:, solid], normals)
    colors = light_up(light, paint.colors[:, solid], normals, lit=lit, shade=paint.cover[solid], glow=paint.glow[solid])
    shiny = np.flatnonzero(gloss > 0)
    if len(shiny):
        direction = rays.direction[:, solid].take(shiny, axis=1)
        shine = highlight(light, normals.take(shiny, axis=1), direction, lit[shiny]) * gloss[shiny]
        _put(colors, shiny, colors.take(shiny, axis=1) + shine)
    _put(paint.colors, solid, tone(haze(world, colors, rays.t[solid])))


class _Paint(NamedTuple):
    """What is known of every sample before it is lit; ``cover`` is the share of the sky that lights it."""

    colors: Array
    normals: Array
    context: NDArray[np.uint16]
    gloss: Array
    glow: Array
    cover: Array


def _put(target: Array, where: NDArray[np.int64] | slice, values: Array) -> None:
    """``target[:, where] = values``, row by row, which is faster."""
    for row, value in zip(target, values, strict=True):
        row[where] = value


def _paint_sky(rays: Rays, world: Surroundings, paint: _Paint) -> NDArray[np.int64] | slice:
    """Paint the samples that reach the sky, and return the indices of the others."""
    in_sky = (rays.shape < 0) & (rays.surface < 0)
    sky = np.flatnonzero(in_sky)
    if world.sky is None or not len(sky):
        return slice(None)
    colors, paint.context[sky] = world.sky(rays.direction.take(sky, axis=1), rays.t[sky])
    _put(paint.colors, sky, colors)
    return np.flatnonzero(~in_sky)


def _paint_surfaces(rays: Rays, world: Surroundings, points: Array, things: Sequence[Thing], paint: _Paint) -> None:
    """Paint the samples that reach the ground or a wall."""
    behind = np.where(rays.shape < 0, rays.surface, np.int8(-1))
    for index, surface in enumerate(world.surfaces):
        here = np.flatnonzero(behind == index)
        if not len(here):
            continue
        place, direction, t = points.take(here, axis=1), rays.direction.take(here, axis=1), rays.t[here]
        # metres that a pixel covers at t along the direction, in the surface's steeper direction
        slope = sum(np.float32(weight) * direction[axis] for axis, weight in enumerate(surface.normal) if weight)
        speed = np.sqrt((direction * direction).sum(axis=0))
        footprint = f32(t * speed / np.maximum(np.abs(slope), np.float32(0.02))) * np.float32(rays.pixel)
        colors, paint.context[here] = surface.paint(place, footprint)
        _put(paint.colors, here, colors)
        for row, value in zip(paint.normals, surface.normal, strict=True):
            row[here] = np.float32(value)
        if world.sky is None:
            paint.cover[here] = corner_shade(place, world, index)
        if surface.normal[1] > 0.5:
            paint.cover[here] *= contact_shade(place, things)


def _paint_shapes(
    rays: Rays, shapes: Shapes, look: Palette, points: Array, found: NDArray[np.int64], paint: _Paint
) -> None:
    """Paint the samples with indices ``found``, which hit shapes at ``points``."""
    index = rays.shape[found]
    offset = points - shapes.center.T.take(index, axis=1)
    inverse = shapes.inverse.transpose(1, 2, 0).take(index, axis=2)
    p = inverse[:, 0] * offset[0] + inverse[:, 1] * offset[1] + inverse[:, 2] * offset[2]
    local = _local_normals(shapes, index, rays.face[found], p)
    normals = inverse[0] * local[0] + inverse[1] * local[1] + inverse[2] * local[2]
    length = np.sqrt((normals * normals).sum(axis=0))
    _put(paint.normals, found, normals / np.maximum(length, np.float32(1e-9)))
    q = p * look.size.take(index, axis=1)
    colors = look.first.take(index, axis=1)
    pattern = look.pattern[index]
    for number, name in enumerate(look.names):
        here = np.flatnonzero(pattern == number)
        if name != "plain" and len(here):
            one = index[here]
            share = PATTERNS[name](q.take(here, axis=1), p.take(here, axis=1), look.scale[one])
            _put(colors, here, blend(look.first.take(one, axis=1), look.second.take(one, axis=1), share))
    colors *= 1 + np.float32(0.025) * noise(q[0] * 2 + q[2] * 2, q[1] * 2 + q[2])
    _put(paint.colors, found, np.clip(colors, 0, 1))
    paint.context[found] = look.context[index]
    paint.gloss[found], paint.glow[found] = look.gloss[index], look.glow[index]


def _local_normals(shapes: Shapes, index: NDArray[np.int16], face: NDArray[np.int16], p: Array) -> Array:
    """Outward normals [3, n] in the shapes' frames, of any length."""
    normals = np.empty_like(p)
    flat = face != CURVED
    is_cone = shapes.cone[:, 0] > 0
    round_ = ~flat & is_cone[index]
    here = np.flatnonzero(flat)
    _put(normals, here, f32(shapes.planes[index[here], face[here], :3].T))
    here = np.flatnonzero(round_)
    _put(normals, here, _cone_normals(shapes.cone.T.take(index[here], axis=1), p.take(here, axis=1)))
    here = np.flatnonzero(~flat & ~round_)
    quadric, on_quadric = shapes.quadric.T.take(index[here], axis=1), p.take(here, axis=1)
    slope = quadric[1] * on_quadric[1] + quadric[3] / 2
    _put(normals, here, np.stack([quadric[0] * on_quadric[0], slope, quadric[2] * on_quadric[2]]))
    return normals


def _cone_normals(cone: Array, p: Array) -> Array:
    """Normals at ``p`` [3, n] of round ``cone`` [3, n]: on its spheres from their centres, between them slanted."""
    length, low, high = cone
    sine = (low - high) / length
    on_low, on_high = p[1] < low * sine, p[1] > length + high * sine
    cosine = np.sqrt(1 - sine * sine) / np.maximum(np.sqrt(p[0] * p[0] + p[2] * p[2]), np.float32(1e-9))
    outward = np.where(on_low | on_high, np.float32(1), cosine)
    along = np.where(on_low, p[1], np.where(on_high, p[1] - length, sine))
    return np.stack([p[0] * outward, along, p[2] * outward])


def surroundings(world: Surroundings, origin: Array, direction: Array) -> tuple[Array, NDArray[np.int8]]:
    """Ray parameter at which each ray [3, n] meets the surroundings, and the surface; -1 and FAR where there is sky."""
    nearest = np.full(direction.shape[1:], FAR, np.float32)
    which = np.full(nearest.shape, -1, np.int8)
    for index, surface in enumerate(world.surfaces):
        a, b, c = (np.float32(value) for value in surface.normal)
        slope = a * direction[0] + b * direction[1] + c * direction[2]
        height = np.float32(surface.offset) - (a * origin[0] + b * origin[1] + c * origin[2])
        t = np.where(slope < 0, height / np.minimum(slope, np.float32(-1e-9)), FAR)
        nearer = t < nearest
        np.copyto(nearest, t, where=nearer)
        np.copyto(which, np.int8(index), where=nearer)
    return nearest, which
