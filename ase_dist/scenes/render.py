"""One generated scene: the picture and its exact labels.

The picture is shaded once at every pixel's centre, where the labels are taken; pixels at the outline of something are
averaged with their four corners, which smooths the picture alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ase_dist.errors import UserError
from ase_dist.image_size import ImageSize
from ase_dist.scenes.classes import normals_table
from ase_dist.scenes.compose import compose
from ase_dist.scenes.lighting import ShadowMap, shadow_map
from ase_dist.scenes.materials import f32
from ase_dist.scenes.shading import Palette, Rays, palette, shade, surroundings
from ase_dist.scenes.solids import Array
from ase_dist.scenes.staging import Camera, Scenery
from ase_dist.scenes.tracing import Indices, Shapes, View, directions, pack, trace

RENDERER_VERSION = 3  # raise whenever the pictures or labels of a seed change: cached data sets are named after it
DEPTH_RANGE = 10.0  # metres; what is farther has no depth, as with the sensor of NYUD-v2
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Instance:
    """A visible object of a VOC class: its mask [H, W], and a person's visible parts under PASCAL-Part's names."""

    name: str
    voc: int
    mask: Mask
    parts: dict[str, Mask]


@dataclass(frozen=True)
class Scene:
    """A picture and its labels, H x W pixels.

    ``image`` uint8 [H, W, 3] sRGB; ``semseg`` uint8 [H, W] VOC ids 0..20; ``label_map`` uint16 [H, W] ids of
    PASCAL-Context's 459 classes; ``parts`` uint8 [H, W] 0..6, all zero without a person; ``saliency`` uint8 [H, W], 0
    or 255; ``normals`` float32 [H, W, 3], unit vectors with x to the right, y down and z towards the viewer, zero on
    the classes whose normals PASCAL-Context does not have.
    """

    image: Bytes
    semseg: Bytes
    label_map: NDArray[np.uint16]
    parts: Bytes
    saliency: Bytes
    normals: Array
    has_person: bool
    instances: tuple[Instance, ...]


def render_scene(*, seed: int, index: int, size: ImageSize | int = 224, flip: bool = False, roll: float = 0.0) -> Scene:
    """Scene number ``index`` of the data set ``seed``, of ``size`` pixels.

    The longer side sees the camera's whole field of view: a rectangle is what the square of that side shows in its
    middle, so that whatever lies in it is where it was composed.
    ``flip`` looks at the same scene through a mirror (left and right change places); ``roll`` then turns the camera
    about its axis, so that the picture turns by so many degrees counter-clockwise about its centre. The light and the
    textures stay with the world. A scene depends on nothing but the arguments (on another processor or with other
    libraries a value may round the other way); flips and rolls by multiples of 90 degrees give exactly the flipped and
    turned picture and labels.
    """
    size = ImageSize.read(size)
    if min(size) < 8:
        raise UserError(f"size: got {size}, wanted sides of at least 8 pixels")
    if seed < 0 or index < 0:
        raise UserError(f"seed and index: got {seed} and {index}, wanted numbers from 0 on")
    scenery = compose(np.random.default_rng([seed, index]))
    return _Renderer(scenery, size, flip=flip, roll=roll).render()


def render_depth(*, seed: int, index: int, size: ImageSize | int = 224) -> Array:
    """The depth of ``render_scene``'s picture: metres along the camera's axis, float32 [H, W].

    0 in the sky and beyond ``DEPTH_RANGE``. The focal length in pixels is ``max(size) / (2 * camera.tangent)``.
    """
    size = ImageSize.read(size)
    scenery = compose(np.random.default_rng([seed, index]))
    view = camera_view(scenery.camera, size, corners=False, flip=False, roll=0.0)
    limit, _ = surroundings(scenery.world, view.origin, directions(view))
    depth = trace(pack(scenery.things), view, limit).t.reshape(size)  # rays advance by 1 along the axis
    return f32(np.where(depth <= DEPTH_RANGE, depth, 0))


class _Renderer:
    """1. Trace the pixels' centres. 2. Shade them. 3. Trace and shade corners at outlines. 4. Collect the labels."""

    def __init__(self, scenery: Scenery, size: ImageSize, *, flip: bool, roll: float) -> None:
        self.size, self.world, self.things = size, scenery.world, scenery.things
        self.camera, self.flip, self.roll = scenery.camera, flip, roll
        self.shapes: Shapes = pack(self.things)
        self.look: Palette = palette(self.shapes, self.things)
        near = [thing.position for thing in self.things if math.hypot(thing.position[0], thing.position[2]) < 14]
        middle = np.array(near or [(0.0, 0.0, 4.0)], np.float32).mean(axis=0)  # shadows are computed round it
        self.shadows: ShadowMap = shadow_map(self.shapes, self.world.light, f32(middle))

    def render(self) -> Scene:
        view, rays = self._cast()
        seen = shade(rays, self.world, self.shapes, self.look, self.shadows, self.things)
        outline = self._outline(rays)
        colors = self._smooth(seen.colors.reshape(3, *self.size), outline, np.unique(rays.shape[rays.shape >= 0]))
        image = (np.clip(colors, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8).transpose(1, 2, 0)
        normals = self._picture_normals(view, seen.normals, seen.context)
        return self._label(np.ascontiguousarray(image), rays, seen.context, normals)

    def _cast(
        self, *, corners: bool = False, where: Indices | None = None, only: Indices | None = None
    ) -> tuple[View, Rays]:
        """Rays through the pixels' centres or through their (H + 1) (W + 1) corners; see ``trace`` for the rest."""
        view = camera_view(self.camera, self.size, corners=corners, flip=self.flip, roll=self.roll)
        direction = directions(view, where)
        limit, surface = surroundings(self.world, view.origin, direction)
        hits = trace(self.shapes, view, limit, where=where, only=only)
        pixel = 2 * self.camera.tangent / max(self.size)
        return view, Rays(view.origin[:, None], direction, *hits, surface, pixel)

    def _outline(self, rays: Rays) -> Mask:
        """The pixels [H, W] with a corner that touches a pixel of another thing, material or surface."""
        ids = np.where(rays.shape >= 0, self.look.look_alike[rays.shape], -1 - rays.surface.astype(np.int64))
        ids = np.pad(ids.reshape(self.size), 1, mode="edge")
        a, b, c, d = ids[:-1, :-1], ids[:-1, 1:], ids[1:, :-1], ids[1:, 1:]
        corner = (a != b) | (a != c) | (a != d)
        outline: Mask = corner[:-1, :-1] | corner[:-1, 1:] | corner[1:, :-1] | corner[1:, 1:]
        return outline

    def _smooth(self, colors: Array, outline: Mask, visible: NDArray[np.int16]) -> Array:
        """Replace pixels of the outline by half their centre and an eighth of each corner."""
        height, width = self.size
        wanted = np.zeros((height + 1, width + 1), np.bool_)
        for i in (0, 1):
            for j in (0, 1):
                wanted[i : height + i, j : width + j] |= outline
        if not wanted.any():
            return colors
        _, rays = self._cast(corners=True, where=np.flatnonzero(wanted), only=visible.astype(np.int64))
        grid = np.zeros((3, *wanted.shape), np.float32)
        grid[:, wanted] = shade(rays, self.world, self.shapes, self.look, self.shadows, self.things).colors
        diagonal, other = grid[:, :-1, :-1] + grid[:, 1:, 1:], grid[:, :-1, 1:] + grid[:, 1:, :-1]
        return np.where(outline, np.float32(0.5) * colors + np.float32(0.125) * (diagonal + other), colors)

    def _picture_normals(self, view: View, normals: Array, context: NDArray[np.uint16]) -> Array:
        """Surroundings normals [3, n] in the picture's axes [H, W, 3], zero where PASCAL-Context has none."""
        axes = (view.right, view.down, -view.forward)
        turned = np.stack([a[0] * normals[0] + a[1] * normals[1] + a[2] * normals[2] for a in axes], axis=-1)
        turned *= normals_table()[context][:, None]
        return turned.reshape(*self.size, 3)

    def _label(self, image: Bytes, rays: Rays, context: NDArray[np.uint16], normals: Array) -> Scene:
        owner = np.append(self.shapes.thing, len(self.things))[rays.shape]  # shape -1: the last one, no thing
        voc = np.array([thing.voc for thing in self.things] + [0], np.uint8)[owner].reshape(self.size)
        salient = np.array([thing.salient for thing in self.things] + [False], np.bool_)[owner].reshape(self.size)
        part = np.append(self.look.part, np.uint8(0))[rays.shape].reshape(self.size)
        return Scene(
            image=image,
            semseg=voc,
            label_map=context.reshape(self.size),
            parts=part,
            saliency=salient.astype(np.uint8) * np.uint8(255),
            normals=normals,
            has_person=bool((part > 0).any()),
            instances=self._instances(rays.shape.reshape(self.size), owner.reshape(self.size)),
        )

    def _instances(self, shape: NDArray[np.int16], owner: NDArray[np.int64]) -> tuple[Instance, ...]:
        """The visible objects; their masks are stored in MATLAB's column order, in which they will be written."""
        names = [source.part for source in self.shapes.sources]
        shape, owner = np.ascontiguousarray(shape.T), np.ascontiguousarray(owner.T)
        visible = [int(index) for index in np.unique(shape) if index >= 0]
        instances = []
        for number, thing in enumerate(self.things):
            mine = [index for index in visible if self.shapes.thing[index] == number]
            if not thing.voc or not mine:
                continue
            parts: dict[str, Mask] = {}
            for index in mine:
                if names[index]:
                    parts[names[index]] = parts.get(names[index], False) | (shape == index)
            turned = {name: mask.T for name, mask in parts.items()}
            instances.append(Instance(thing.name, thing.voc, (owner == number).T, turned))
        return tuple(instances)


def camera_view(camera: Camera, size: ImageSize, *, corners: bool, flip: bool, roll: float) -> View:
    """The camera's rays through the pixels' centres, or through their corners; see ``render_scene`` for the rest."""
    c, s = math.cos(camera.pitch), math.sin(camera.pitch)
    forward, down = np.array([0.0, -s, c], np.float32), np.array([0.0, -c, -s], np.float32)
    right = np.array([-1.0 if flip else 1.0, 0.0, 0.0], np.float32)
    quarter, rest = divmod(roll, 90.0)
    for _ in range(int(quarter) % 4):
        right, down = down, -right
    if rest:
        c, s = np.float32(math.cos(math.radians(rest))), np.float32(math.sin(math.radians(rest)))
        right, down = c * right + s * down, c * down - s * right
    more, shift = (1, 0.0) if corners else (0, 0.5)
    step = np.float32(2 * camera.tangent / max(size))
    v, u = ((np.arange(n + more, dtype=np.float32) + np.float32(shift - n / 2)) * step for n in size)
    return View(np.array([0.0, camera.height, 0.0], np.float32), right, down, forward, u, v)
