"""Data set, image size and length of a study's runs: small enough for two CPU cores, or the paper's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ase_dist.description import find_description, read_description
from ase_dist.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Preset:
    """A config and its changes for a study.

    ``convolutional`` are further changes for the baselines on ResNets; ``pair`` is two tasks whose gradients conflict;
    ``sizes`` are the image sides of the study of resolution; ``steps`` the optimiser steps of a run.
    """

    config: str
    title: str
    steps: int
    pair: tuple[str, ...]
    sizes: tuple[int, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    convolutional: dict[str, Any] = field(default_factory=dict)


QUIET = {"eval.at_start": False, "monitor.tensorboard": False, "checkpoint.keep": 1}

PRESETS: dict[str, Preset] = {
    "scenes": Preset(
        "scenes",
        "generated scenes",
        steps=100,
        pair=("semseg", "normals"),
        sizes=(64, 96, 128, 160),
        changes={**QUIET, "checkpoint.every": 50},
    ),
    "ccp": Preset(
        "ccp",
        "photographs of clothed people (ccp_mt)",
        steps=75,
        pair=("human_parts", "edge"),
        sizes=(84, 112, 140, 168),
        changes={**QUIET, "checkpoint.every": 25},
    ),
    "rgbd": Preset(
        "rgbd",
        "RGB-D photographs (nyud)",
        steps=75,
        pair=("semseg", "normals"),
        sizes=(84, 112, 140, 168),
        changes={**QUIET, "checkpoint.every": 25},
    ),
    "pascal": Preset(
        "pascal_ase_16_3_1_4",
        "PASCAL-Context",
        steps=25000,  # 40 epochs of 4998 images in batches of 8
        pair=("semseg", "normals"),
        sizes=(224, 384, 512),
        changes=QUIET,
        convolutional={"model.pretrained": "hub"},
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of that name, or one for the data set that a dataset.yaml, or the folder with it, describes.

    Raises UserError, with the nearest name, where there is neither.
    """
    if name not in PRESETS and (place := find_description(name, None)) is not None:
        description = read_description(place)
        tasks = tuple(description.tasks)
        changes = {**PRESETS["scenes"].changes, "data.name": str(place)}
        return replace(PRESETS["scenes"], title=description.name, pair=tasks[:2], changes=changes)
    if name not in PRESETS:
        raise UserError(f"--data: there is no {name!r}{did_you_mean(name, PRESETS)} (data: {', '.join(PRESETS)})")
    return PRESETS[name]
