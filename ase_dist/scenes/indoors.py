"""Recipes of indoor scenes: a living room, and a table seen from close by."""

from __future__ import annotations

import math

import numpy as np

from ase_dist.scenes import animals, furniture
from ase_dist.scenes.solids import Thing
from ase_dist.scenes.staging import Camera, Maker, Scenery, aim, facing, from_street, random_person
from ase_dist.scenes.world import room


def in_room(rng: np.random.Generator) -> Scenery:
    """A living room: furniture along the walls and in the middle, people standing, walking or sitting."""
    world = room(rng)
    camera, distance = aim(rng, 1.7, fill=(0.5, 1.25), most=world.walls["back"] - 1.6)
    scene = Scenery(world, camera, rng)
    for _ in range(int(rng.choice([0, 1, 1, 1, 2, 2, 3]))):
        _seat_or_stand(scene, distance)
    chair = furniture.chair
    for maker, share in ((furniture.sofa, 0.45), (furniture.table, 0.4), (chair, 0.5), (chair, 0.3)):
        if scene.chance(share):
            item = maker(rng)
            if scene.put(item, near=distance * 0.8, far=distance * 1.8, yaw=world.yaw + float(rng.normal(0, 0.5))):
                _lay_table(scene, item)
    if scene.chance(0.4):
        _television(scene, distance)
    for maker, share in ((furniture.pottedplant, 0.5), (furniture.lamp, 0.25), (furniture.ball, 0.15)):
        if scene.chance(share):
            scene.put(maker(rng), near=distance * 0.7, far=distance * 1.8)
    if scene.chance(0.3):
        scene.put(animals.animal(rng, name=("dog", "cat")[int(rng.integers(2))]), near=distance * 0.6, far=distance)
    if scene.chance(0.35):
        scene.things.append(furniture.rug(rng).at(float(rng.uniform(-0.5, 0.5)), distance, yaw=world.yaw))
    _dress_walls(scene)
    return scene


def _seat_or_stand(scene: Scenery, distance: float) -> None:
    """A person on a chair or a sofa of their own, or on their feet."""
    if scene.chance(0.3):
        seat = furniture.sofa(scene.rng) if scene.chance(0.5) else furniture.chair(scene.rng)
        if scene.put(seat, near=distance * 0.75, far=distance * 1.3, yaw=float(scene.rng.normal(0, 0.45))):
            person = random_person(scene.rng, ("sitting",))
            x, _, z = seat.position
            person.radius = 0.0
            scene.things.append(person.at(x + 0.02 * math.sin(seat.yaw), z + 0.02 * math.cos(seat.yaw), yaw=seat.yaw))
        return
    person = random_person(scene.rng, ("standing", "standing", "walking", "crouching"))
    scene.put(person, near=distance * 0.8, far=distance * 1.35, spread=0.7, yaw=facing(scene.rng))


def _lay_table(scene: Scenery, item: Thing) -> None:
    """Put bottles, a monitor or a plant on a dining table."""
    if item.name != "diningtable":
        return
    makers: tuple[Maker, ...] = (furniture.bottle, furniture.bottle, furniture.monitor, furniture.pottedplant)
    for offset in (-0.3, 0.05, 0.32):
        if scene.chance(0.6):
            top = makers[int(scene.rng.integers(len(makers)))](scene.rng)
            x = item.position[0] + offset * math.cos(item.yaw)
            z = item.position[2] - offset * math.sin(item.yaw)
            scene.things.append(top.at(x, z, y=0.755, yaw=float(scene.rng.normal(0, 0.4))))


def _television(scene: Scenery, distance: float) -> None:
    stand = furniture.cabinet(scene.rng)
    if scene.put(stand, near=distance, far=distance * 1.9, yaw=scene.world.yaw + float(scene.rng.normal(0, 0.2))):
        x, _, z = stand.position
        scene.things.append(furniture.monitor(scene.rng).at(x, z, y=0.5, yaw=stand.yaw))


def _dress_walls(scene: Scenery) -> None:
    """Pictures, windows, a door or shelves on the walls."""
    back, side = scene.world.walls["back"], scene.world.walls["side"]
    walls = (
        (0.0, [(a, back - 0.02) for a in (-0.6 * side, 0.0, 0.6 * side)]),
        (math.pi / 2, [(side - 0.02, 0.7 * back), (side - 0.02, 0.4 * back)]),
        (-math.pi / 2, [(0.02 - side, 0.7 * back), (0.02 - side, 0.4 * back)]),
    )
    for turned, spots in walls:
        for along, across in spots:
            if scene.chance(0.5):
                _hang(scene, along, across, scene.world.yaw + turned)


def _hang(scene: Scenery, along: float, across: float, yaw: float) -> None:
    rng = scene.rng
    x, z = from_street(scene.world, along, across)
    kind = int(rng.integers(6))
    if kind == 0:
        scene.things.append(furniture.door(rng).at(x, z, yaw=yaw))
    elif kind == 1:
        inward = 0.18
        scene.things.append(furniture.bookcase(rng).at(x - inward * math.sin(yaw), z - inward * math.cos(yaw), yaw=yaw))
    elif kind == 2:
        scene.things.append(furniture.window(rng).at(x, z, y=1.5, yaw=yaw))
        if scene.chance(0.6):
            c, s = math.cos(yaw), math.sin(yaw)
            for sign in (-0.85, 0.85):
                cloth = furniture.curtain(rng).at(x + sign * c - 0.08 * s, z - sign * s - 0.08 * c, y=1.25, yaw=yaw)
                scene.things.append(cloth)
    else:
        scene.things.append(furniture.picture(rng).at(x, z, y=float(rng.uniform(1.45, 1.8)), yaw=yaw))


def at_table(rng: np.random.Generator) -> Scenery:
    """A table close by with bottles, plants or a monitor on it, often somebody behind it."""
    world = room(rng)
    camera = Camera(float(rng.uniform(1.0, 1.4)), float(rng.uniform(0.08, 0.3)), float(rng.uniform(0.75, 1.0)))
    scene = Scenery(world, camera, rng)
    table, z = furniture.table(rng), float(rng.uniform(1.15, 1.6))
    scene.things.append(table.at(float(rng.uniform(-0.2, 0.2)), z, yaw=float(rng.normal(0, 0.2))))
    makers: tuple[Maker, ...] = (*[furniture.bottle] * 3, furniture.monitor, furniture.pottedplant)
    for x in rng.permutation([-0.36, -0.16, 0.08, 0.3])[: int(rng.integers(1, 5))]:
        item = makers[int(rng.integers(len(makers)))](rng)
        depth, yaw = z + float(rng.uniform(-0.25, 0.2)), float(rng.normal(0, 0.5))
        scene.things.append(item.at(float(x), depth, y=0.755, yaw=yaw))
    if scene.chance(0.6):
        person = random_person(rng, ("sitting", "standing"))
        scene.things.append(person.at(float(rng.uniform(-0.35, 0.35)), z + 0.8, yaw=float(rng.normal(0, 0.3))))
    if scene.chance(0.4):
        scene.put(furniture.chair(rng), near=z + 0.6, far=z + 1.6)
    _dress_walls(scene)
    return scene
