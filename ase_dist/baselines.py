"""The baselines of the paper's comparison by name: what each changes in a config. The table is baselines.yaml."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from ase_dist.errors import UserError, did_you_mean

TABLE = Path(__file__).with_name("baselines.yaml")


class Baseline(BaseModel):
    """One baseline: ``model`` replaces those settings of a config; see the table's head for the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    label: str
    model: dict[str, Any]
    lr_factor: float = 1.0
    backbone_lr_factor: float = 1.0
    separate: bool = False


@functools.cache
def baselines() -> Mapping[str, Baseline]:
    """Every baseline by name, in the order of the table."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {name: Baseline.model_validate(entry) for name, entry in table.items()}


def find_baseline(name: str) -> Baseline:
    """The baseline of that name; UserError with the nearest one if there is none."""
    if name not in baselines():
        known = ", ".join(baselines())
        raise UserError(f"--baseline: there is no {name!r}{did_you_mean(name, baselines())} (baselines: {known})")
    return baselines()[name]


def apply_baseline(tree: dict[str, Any], name: str, *, lr: float, output: Path) -> None:
    """Change a plain tree of settings, whose learning rate is ``lr`` and output folder ``output``, into the baseline's.

    Of the branch ``model.moe`` only the settings that the baseline names are replaced.
    """
    baseline = find_baseline(name)
    model = tree.setdefault("model", {})
    moe = {**model.get("moe", {}), **baseline.model.get("moe", {})}
    model |= {**baseline.model, "moe": moe}
    tree.setdefault("train", {}).update(lr=lr * baseline.lr_factor, backbone_lr_factor=baseline.backbone_lr_factor)
    tree["output"] = str(output.with_name(f"{output.name}_{name}"))
