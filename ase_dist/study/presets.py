"""Data set, image size and length of a study's runs: small enough for two CPU cores, or the paper's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ase_dist.description import find_description, read_description
from ase_dist.errors import UserError, did_you_mean
from ase_dist.files import read_text
from ase_dist.read_config import load_settings
from ase_dist.typed_yaml import MOST_BYTES


@dataclass(frozen=True)
class Preset:
    """A config and its changes for a study.

    ``backbones`` are further changes for baselines on another one; ``pair`` is two tasks whose gradients conflict;
    ``sizes`` are the image sizes of the study of resolution, as ``data.size`` takes them; ``steps`` the optimiser steps
    of a run.
    """

    config: str
    title: str
    steps: int
    pair: tuple[str, ...]
    sizes: tuple[int | str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    backbones: Mapping[str, dict[str, Any]] = field(default_factory=dict)


FROM_HUB = {name: {"model.pretrained": "hub"} for name in ("resnet18", "swin_tiny_patch4_window7_224")}
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
        backbones=FROM_HUB,
    ),
    "pascal_swin_t": Preset(
        "pascal_swin_t",
        "PASCAL-Context as MTLoRA has it",
        steps=46800,  # 300 epochs of 4998 images in batches of 32
        pair=("semseg", "normals"),
        sizes=(224, 448),
        changes=QUIET,
        backbones=FROM_HUB,
    ),
    "nyuv2_13": Preset(
        "nyuv2_13_ase_16_3_1_4",
        "NYUv2 with 13 classes",
        steps=20000,  # LibMTL's 200 epochs of 795 images in batches of 8
        pair=("semseg", "normals"),
        sizes=("144x192", "288x384", "432x576"),
        changes=QUIET,
        backbones=FROM_HUB,
    ),
    "cityscapes": Preset(
        "cityscapes_ase_16_3_1_4",
        "Cityscapes with 7 classes",
        steps=9400,  # LibMTL's 200 epochs of 2975 images in batches of 64
        pair=("semseg", "depth"),
        sizes=("64x128", "128x256", "256x512"),
        changes=QUIET,
        backbones=FROM_HUB,
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of that name, or one for the data set that a dataset.yaml, or the folder with it, describes.

    A YAML file with a section ``data`` is a config of one's own, with several data sets for example: the runs have its
    settings. Raises UserError, with the nearest name, where there is neither.
    """
    if name in PRESETS:
        return PRESETS[name]
    place = find_description(name, None)
    if place is not None and re.search(r"^data\s*:", read_text(place, max_bytes=MOST_BYTES), re.MULTILINE):
        settings = load_settings(place)
        titles = [each.title for each in settings.data.sets] or [settings.data.name]
        return replace(
            PRESETS["scenes"],
            config=str(place),
            title="+".join(titles),
            steps=settings.train.max_steps or PRESETS["scenes"].steps,
            pair=tuple(task.name for task in settings.chosen_tasks())[:2],
            changes=QUIET,
        )
    if place is not None:
        description = read_description(place)
        tasks = tuple(description.tasks)
        changes = {**PRESETS["scenes"].changes, "data.name": str(place)}
        return replace(PRESETS["scenes"], title=description.name, pair=tasks[:2], changes=changes)
    raise UserError(f"--data: there is no {name!r}{did_you_mean(name, PRESETS)} (data: {', '.join(PRESETS)})")
