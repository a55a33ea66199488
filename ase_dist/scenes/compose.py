"""A scene's arrangement: one of five recipes, and which of its things are its subject."""

from __future__ import annotations

import numpy as np

from ase_dist.scenes.indoors import at_table, in_room
from ase_dist.scenes.open_air import at_lake, in_meadow, in_street
from ase_dist.scenes.staging import Scenery

RECIPES = (
    (0.34, in_room),
    (0.12, at_table),
    (0.24, in_street),
    (0.24, in_meadow),
    (0.06, at_lake),
)  # shares and recipes


def compose(rng: np.random.Generator) -> Scenery:
    """A scene of one of the five kinds, its subjects marked as salient."""
    shares = [share for share, _ in RECIPES]
    scenery = RECIPES[int(rng.choice(len(RECIPES), p=shares))][1](rng)
    mark_salient(scenery)
    return scenery


# Salience of a kind of thing relative to its size; 1 for the others.
APPEAL = {"person": 1.8, "bottle": 3.0, "diningtable": 0.4, "sofa": 0.5, "chair": 0.6}


def mark_salient(scenery: Scenery) -> None:
    """Mark the subjects: large and central things of VOC's classes; for people half the weight is enough.

    Computed from the arrangement and not from pixels, so a turned or mirrored camera changes nothing.
    """
    weights = []
    for thing in scenery.things:
        x, _, z = thing.position
        off = abs(x) / max(scenery.camera.tangent * z, 1e-3)
        size = max(thing.height, thing.radius) / max(z, 0.5)
        weights.append(size * max(0.0, 1.2 - off) * APPEAL.get(thing.name, 1.0) * (thing.voc > 0))
    top = max(weights, default=0.0)
    for thing, weight in zip(scenery.things, weights, strict=True):
        thing.salient = weight > 0 and weight >= top * (0.25 if thing.name == "person" else 0.5)
