"""A scene in the making: the camera, free spots in view, and people to put there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ase_dist.scenes import people
from ase_dist.scenes.solids import Thing
from ase_dist.scenes.world import Surroundings

Maker = Callable[[np.random.Generator], Thing]


@dataclass
class Camera:
    """Over the world's origin at ``height`` metres, looking along z and ``pitch`` radians down; ``fov`` in radians."""

    height: float
    pitch: float
    fov: float

    @property
    def tangent(self) -> float:
        """Half the picture's width at distance 1."""
        return math.tan(self.fov / 2)


@dataclass
class Scenery:
    """A world, what stands in it, and the camera."""

    world: Surroundings
    camera: Camera
    rng: np.random.Generator
    things: list[Thing] = field(default_factory=list)

    def put(self, thing: Thing, *, near: float, far: float, spread: float = 0.8, yaw: float | None = None) -> bool:
        """Stand ``thing`` at a random free spot in view between the two depths; False where none was found.

        ``spread`` is the share of the picture's width that its middle may lie in; ``yaw`` is random by default.
        """
        for _ in range(12):
            z = float(self.rng.uniform(near, max(near, far)))
            half = self.camera.tangent * z * spread
            x = float(self.rng.uniform(-half, half))
            if self.free(x, z, thing.radius):
                turned = float(self.rng.uniform(-math.pi, math.pi)) if yaw is None else yaw
                self.things.append(thing.at(x, z, yaw=turned))
                return True
        return False

    def free(self, x: float, z: float, radius: float) -> bool:
        """Whether a circle on the ground touches neither another thing nor a wall, and is not round the camera."""
        if math.hypot(x, z) < radius + 0.45:
            return False
        if self.world.kind == "room":
            along, across = to_street(self.world, x, z)
            if across > self.world.walls["back"] - radius or abs(along) > self.world.walls["side"] - radius:
                return False
        return all(
            math.hypot(x - other.position[0], z - other.position[2]) > radius + other.radius
            for other in self.things
            if other.radius > 0 and other.position[1] < 0.05
        )

    def chance(self, share: float) -> bool:
        """True in this share of scenes."""
        return bool(self.rng.random() < share)


def to_street(world: Surroundings, x: float, z: float) -> tuple[float, float]:
    """Coordinates along and across the world's own direction, of a world point on the ground."""
    c, s = math.cos(world.yaw), math.sin(world.yaw)
    return c * x - s * z, s * x + c * z


def from_street(world: Surroundings, along: float, across: float) -> tuple[float, float]:
    """The inverse of ``to_street``."""
    c, s = math.cos(world.yaw), math.sin(world.yaw)
    return c * along + s * across, -s * along + c * across


def aim(rng: np.random.Generator, height: float, *, fill: tuple[float, float], most: float) -> tuple[Camera, float]:
    """A camera and the distance at which something of ``height`` metres fills a share of the picture.

    The distance is at most ``most`` metres.
    """
    fov = float(rng.uniform(0.75, 1.08))
    distance = min(height / (2 * math.tan(fov / 2) * float(rng.uniform(*fill))), most)
    eye = float(rng.uniform(0.55, 1.25)) * (0.35 + 0.65 * height)
    target = height * float(rng.uniform(0.45, 0.62))
    return Camera(max(eye, 0.3), math.atan2(eye - target, distance), fov), distance


def random_person(rng: np.random.Generator, poses: tuple[str, ...] = ("standing", "standing", "walking")) -> Thing:
    """A person of any age; the pose is one of ``poses``."""
    height = float(rng.uniform(1.05, 1.45)) if rng.random() < 0.2 else float(rng.normal(1.72, 0.08))
    return people.person(rng, pose=poses[int(rng.integers(len(poses)))], height=height)


def facing(rng: np.random.Generator) -> float:
    """An angle at which a person stands: mostly towards the viewer."""
    return float(rng.normal(0, 0.55)) if rng.random() < 0.75 else float(rng.uniform(-math.pi, math.pi))
