"""Light on a scene: a shadow map seen from the lamp, contact shade on the ground, highlights and haze.

Letters: n samples. Colours come in as sRGB and are squared, lit, and brought back by a square root (a gamma of 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ase_dist.scenes.materials import column, f32
from ase_dist.scenes.solids import Array, Thing
from ase_dist.scenes.tracing import FAR, Shapes, View, trace
from ase_dist.scenes.world import Light, Surroundings

SHADOW_REACH = 12.0  # metres round the middle of the scene within which shadows are cast


@dataclass(frozen=True)
class ShadowMap:
    """The distance from the lamp to the first shape, on a grid of rays that are ``texel`` metres apart."""

    view: View
    distance: Array
    texel: float

    def visible(self, points: Array, normals: Array) -> Array:
        """The share [n] of the lamp that points [3, n] on a surface with ``normals`` [3, n] see; 1 off the map."""
        lifted = points + normals * np.float32(1.3 * self.texel) - self.view.origin[:, None]
        x, y, t = (axis[0] * lifted[0] + axis[1] * lifted[1] + axis[2] * lifted[2]
                   for axis in (self.view.right, self.view.down, self.view.forward))  # fmt: skip
        i = (y - self.view.v[0]) / np.float32(self.texel)
        j = (x - self.view.u[0]) / np.float32(self.texel)
        rows, columns = self.distance.shape
        inside = (i >= 0) & (i < rows - 1) & (j >= 0) & (j < columns - 1)
        i, j = np.where(inside, i, 0), np.where(inside, j, 0)
        i0, j0 = i.astype(np.int32), j.astype(np.int32)
        fi, fj = i - i0, j - j0
        flat, start = self.distance.ravel(), i0 * columns + j0
        t = t - np.float32(0.7 * self.texel)
        a, b = (flat[start] > t), (flat[start + 1] > t)
        c, d = (flat[start + columns] > t), (flat[start + columns + 1] > t)
        upper, lower = a * (1 - fj) + b * fj, c * (1 - fj) + d * fj
        return f32(np.where(inside, upper * (1 - fi) + lower * fi, 1))


def toward_light(light: Light) -> Array:
    """Unit vector to the lamp."""
    vector = np.array(light.direction, np.float64)
    return f32(vector / np.linalg.norm(vector))


def shadow_map(shapes: Shapes, light: Light, middle: Array) -> ShadowMap:
    """Trace the shapes from the lamp, with rays at the width of the lamp's blurred edges."""
    toward = toward_light(light)
    helper = np.array([1.0, 0.0, 0.0] if abs(toward[0]) < 0.8 else [0.0, 0.0, 1.0], np.float32)
    right = np.cross(helper, toward)
    right = (right / np.linalg.norm(right)).astype(np.float32)
    down = np.cross(toward, right).astype(np.float32)
    origin = (middle + toward * np.float32(60)).astype(np.float32)
    near = np.abs(shapes.corners - middle).max(axis=(1, 2)) < SHADOW_REACH
    corners = shapes.corners[near] if near.any() else shapes.corners[:0]
    x, y = ((corners - origin) @ axis for axis in (right, down))
    low = np.array([v.min() if v.size else 0.0 for v in (x, y)]) - 0.1
    size = np.array([v.max() if v.size else 0.1 for v in (x, y)]) + 0.1 - low
    texel = max(light.blur * 0.6, float(size.max()) / 176)
    u, v = (np.float32(start) + np.arange(int(extent / texel) + 2, dtype=np.float32) * np.float32(texel)
            for start, extent in zip(low, size, strict=True))  # fmt: skip
    view = View(origin, right, down, -toward, u, v, parallel=True)
    limit = np.full(len(v) * len(u), FAR, np.float32)
    return ShadowMap(view, trace(shapes, view, limit).t.reshape(len(v), len(u)), texel)


def contact_shade(points: Array, things: Sequence[Thing]) -> Array:
    """How much of the sky ground points [3, n] see past the things that stand on it, roughly."""
    shade = np.ones_like(points[0])
    for thing in things:
        x, y, z = thing.position
        if thing.radius <= 0 or y > 0.05:
            continue
        reach = np.float32(1 / (0.55 * thing.radius) ** 2)
        square = ((points[0] - np.float32(x)) ** 2 + (points[2] - np.float32(z)) ** 2) * reach
        shade *= 1 - np.float32(0.5) / (1 + square) ** 2
    return f32(shade)


def corner_shade(points: Array, world: Surroundings, index: int) -> Array:
    """Darkening of points [3, n] on a room's plane ``index`` towards the nearest of the other planes."""
    nearest = np.full_like(points[0], np.inf)
    for other, surface in enumerate(world.surfaces):
        if other != index:
            terms = [np.float32(n) * points[axis] for axis, n in enumerate(surface.normal) if n]
            np.minimum(nearest, sum(terms[1:], terms[0]) - np.float32(surface.offset), out=nearest)
    return f32(1 - np.float32(0.3) / (1 + (nearest * np.float32(1 / 0.3)) ** 2))


def lamp_share(shadows: ShadowMap, lamp: Array, points: Array, normals: Array) -> Array:
    """The share [n] of the lamp that falls on surfaces: the cosine where they face it, none in the shadow."""
    share = normals[0] * lamp[0] + normals[1] * lamp[1] + normals[2] * lamp[2]
    facing = np.flatnonzero(share > 0)
    lit = shadows.visible(points.take(facing, axis=1), normals.take(facing, axis=1)) * share[facing]
    share = np.zeros_like(share)
    share[facing] = lit
    return f32(share)


def light_up(light: Light, albedo: Array, normals: Array, *, lit: Array, shade: Array, glow: Array) -> Array:
    """Colours [3, n] without their shine, squared; ``lit`` is the lamp's share, ``shade`` that of the sky seen, [n]."""
    up = (np.float32(0.5) + np.float32(0.5) * normals[1]) * shade
    ambient = column(light.below) * (shade - up)
    ambient += column(light.above) * up
    ambient += column(light.sun) * lit
    glowing = np.flatnonzero(glow > 0)
    if len(glowing):
        ambient[:, glowing] += (1 - ambient[:, glowing]) * glow[glowing]
    return f32(ambient * albedo * albedo)


def highlight(light: Light, normals: Array, direction: Array, lit: Array) -> Array:
    """Blinn's highlight of the lamp and a faint mirror image of the sky [3, n], seen along ``direction``."""
    eye = direction / -np.sqrt((direction * direction).sum(axis=0))
    half = eye + toward_light(light)[:, None]
    power = np.maximum((half * normals).sum(axis=0) / np.sqrt((half * half).sum(axis=0)), 0)
    for _ in range(5):
        power = power * power
    straight = (eye * normals).sum(axis=0)
    mirrored_up = np.clip(2 * straight * normals[1] - eye[1], 0, 1)
    rim = (1 - np.clip(straight, 0, 1)) ** 2 * np.float32(0.35) + np.float32(0.12)
    return f32(column(light.sun) * (power * np.minimum(lit * 4, 1)) + column(light.above) * (mirrored_up * rim))


def haze(world: Surroundings, colors: Array, t: Array) -> Array:
    """Colours blended with the fog's over the distance; the same where there is none."""
    if world.fog_length == np.inf:
        return colors
    share = 1 - np.exp(t * np.float32(-1 / world.fog_length))
    fog = column(world.fog)
    return f32(colors + (fog * fog - colors) * share)


def tone(colors: Array) -> Array:
    """Squared sRGB to sRGB, the brightest parts rolled off."""
    return f32(np.sqrt(colors / (1 + colors * np.float32(0.13))))
