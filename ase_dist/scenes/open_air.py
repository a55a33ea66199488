"""Recipes of outdoor scenes: a street, a meadow and a lake."""

from __future__ import annotations

import math

import numpy as np

from ase_dist.scenes import animals, furniture, outdoors
from ase_dist.scenes.staging import Maker, Scenery, aim, facing, from_street, random_person
from ase_dist.scenes.world import lakeside, meadow, street

VEHICLES: dict[str, Maker] = {"aeroplane": outdoors.aeroplane, "car": outdoors.car, "motorbike": outdoors.motorbike}
# Metres of height that the picture is framed for, by the kind of subject; people's elsewhere.
HEIGHTS = {
    "cow": 1.5,
    "sheep": 0.9,
    "horse": 2.0,
    "dog": 0.75,
    "aeroplane": 4.5,
    "car": 2.2,
    "train": 4.0,
    "motorbike": 1.3,
}


def in_street(rng: np.random.Generator) -> Scenery:
    """A street: people on the pavement, traffic behind them, houses on the far side."""
    world = street(rng)
    camera, distance = aim(rng, 1.75, fill=(0.4, 1.1), most=6.0)
    scene = Scenery(world, camera, rng)
    for _ in range(int(rng.choice([0, 1, 1, 2, 2, 3]))):
        scene.put(random_person(rng), near=distance * 0.85, far=distance * 1.7, spread=0.75, yaw=facing(rng))
    if scene.chance(0.45):
        maker = outdoors.bicycle if scene.chance(0.6) else outdoors.motorbike
        scene.put(maker(rng), near=distance * 0.8, far=distance * 1.4, yaw=_sideways(rng))
    if scene.chance(0.2):
        scene.put(animals.animal(rng, name="dog"), near=distance * 0.7, far=distance * 1.2)
    if scene.chance(0.15):
        scene.put(animals.bird(rng), near=distance * 0.5, far=distance)
    _traffic(scene)
    _houses(scene)
    return scene


def at_lake(rng: np.random.Generator) -> Scenery:
    """A lake with boats, somebody on the shore, trees on the far bank."""
    world = lakeside(rng)
    camera, distance = aim(rng, 2.4, fill=(0.45, 0.9), most=6.0)
    scene = Scenery(world, camera, rng)
    near, far = world.walls["near"], world.walls["far"]
    for _ in range(int(rng.integers(1, 4))):
        scene.put(outdoors.boat(rng), near=near + 3.0, far=near + 12.0, spread=0.75, yaw=_sideways(rng))
    for _ in range(int(rng.choice([0, 1, 1, 2]))):
        if distance < near:
            scene.put(random_person(rng), near=distance * 0.8, far=near, spread=0.7, yaw=facing(rng))
    if scene.chance(0.4):
        scene.put(animals.bird(rng), near=min(1.2, near * 0.6), far=near * 0.9)
    for _ in range(int(rng.integers(2, 7))):
        scene.put(outdoors.tree(rng), near=far + 3.0, far=far + 9.0, spread=1.0)
    return scene


def _traffic(scene: Scenery) -> None:
    rng, world = scene.rng, scene.world
    near, far = world.walls["near"], world.walls["far"]
    for lane, share in ((near + 1.6, 0.6), (far - 1.6, 0.6)):
        if not scene.chance(share):
            continue
        item = outdoors.bus(rng) if scene.chance(0.22) else outdoors.car(rng)
        half = scene.camera.tangent * lane
        x, z = from_street(world, float(rng.uniform(-half, half)) * 0.9, lane)
        yaw = world.yaw + (math.pi if lane > (near + far) / 2 else 0.0)
        if math.hypot(x, z) > item.radius + 0.6:
            scene.things.append(item.at(x, z, yaw=yaw + float(rng.normal(0, 0.04))))


def _houses(scene: Scenery) -> None:
    rng, world = scene.rng, scene.world
    along, edge = -16.0, world.walls["far"] + 4.0
    while along < 18.0:
        house = outdoors.building(rng)
        half = house.shapes[0].frame[0, 0]
        if scene.chance(0.8):
            x, z = from_street(world, along + float(half), edge + 4.5)
            scene.things.append(house.at(x, z, yaw=world.yaw))
        along += 2 * float(half) + float(rng.uniform(0.0, 2.5))
    for spot in (-7.0, -2.5, 2.5, 7.0):
        if scene.chance(0.4):
            x, z = from_street(world, spot + float(rng.normal(0, 0.8)), world.walls["far"] + 1.8)
            scene.things.append(outdoors.tree(rng).at(x, z, yaw=float(rng.uniform(0, 6))))


def in_meadow(rng: np.random.Generator) -> Scenery:
    """A meadow: a herd or a pet, people, trees behind, now and then an aeroplane or a parked car."""
    world = meadow(rng)
    kinds = ("cow", "sheep", "horse", "person", "person", "dog", "aeroplane", "car", "train", "motorbike")
    kind = kinds[int(rng.integers(len(kinds)))]
    height = HEIGHTS.get(kind, 1.75)
    camera, distance = aim(rng, height, fill=(0.4, 0.9), most=12.0)
    scene = Scenery(world, camera, rng)
    if kind in animals.BUILDS:
        for _ in range(int(rng.integers(1, 4))):
            scene.put(animals.animal(rng, name=kind), near=distance * 0.9, far=distance * 2, yaw=_sideways(rng))
    elif kind in VEHICLES:
        scene.put(
            VEHICLES[kind](rng), near=max(distance, height * 1.6), far=distance * 1.5, spread=0.4, yaw=_sideways(rng)
        )
    elif kind == "train":
        _railway(scene, distance)
    for _ in range(int(rng.choice([0, 0, 1, 1, 2])) + 2 * (kind == "person") - (kind == "person")):
        scene.put(random_person(rng), near=distance * 0.85, far=distance * 1.8, spread=0.75, yaw=facing(rng))
    extras: tuple[tuple[Maker, float], ...] = (
        (outdoors.bicycle, 0.12), (furniture.ball, 0.15), (animals.bird, 0.2), (furniture.chair, 0.06)
    )  # fmt: skip
    for maker, share in extras:
        if scene.chance(share):
            scene.put(maker(rng), near=distance * 0.7, far=distance * 1.4)
    if scene.chance(0.12):
        plane = outdoors.aeroplane(rng)
        x, z = float(rng.uniform(-8, 8)), float(rng.uniform(28, 45))
        scene.things.append(plane.at(x, z, y=float(rng.uniform(6, 12)), yaw=_sideways(rng)))
    _wood(scene, distance)
    return scene


def _railway(scene: Scenery, distance: float) -> None:
    """A train on its track, across the view at a slant."""
    rng = scene.rng
    z, yaw = max(distance * 1.2, 7.0), float(rng.uniform(-0.45, 0.45))
    scene.things.append(outdoors.rails(rng).at(0.0, z, yaw=yaw))
    along = float(rng.uniform(-2.0, 6.0)) if yaw > 0 else float(rng.uniform(-6.0, 2.0))
    turned = yaw + (math.pi if scene.chance(0.5) else 0.0)
    scene.things.append(outdoors.train(rng).at(along * math.cos(yaw), z - along * math.sin(yaw), y=0.1, yaw=turned))


def _sideways(rng: np.random.Generator) -> float:
    """An angle for what is longest along x: mostly seen from the side, either way round."""
    return float(rng.normal(0, 0.6)) + (math.pi if rng.random() < 0.5 else 0.0)


def _wood(scene: Scenery, distance: float) -> None:
    """Trees, bushes and a fence behind; one bush at least."""
    rng = scene.rng
    scene.things.append(outdoors.bush(rng).at(float(rng.uniform(-3, 3)), distance * 2 + 4))
    for _ in range(int(rng.integers(0, 6))):
        maker = outdoors.tree if scene.chance(0.65) else outdoors.bush
        scene.put(maker(rng), near=distance * 1.8 + 3, far=distance * 3 + 14, spread=1.0)
    if scene.chance(0.3):
        z = distance * 1.6 + 2.5
        for i in range(-2, 3):
            scene.things.append(outdoors.fence(rng).at(6.0 * i, z))
    if scene.chance(0.2):
        house, z = outdoors.building(rng), distance * 2 + float(rng.uniform(14, 25))
        scene.things.append(house.at(float(rng.uniform(-0.5, 0.5)) * z, z, yaw=float(rng.normal(0, 0.4))))
