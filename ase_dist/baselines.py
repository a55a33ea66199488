"""The rows of the paper's comparison by name: what each changes in a config. The table itself is baselines.yaml."""

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
    """One row: ``model`` replaces those settings of a config; see the table's head for the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    label: str
    model: dict[str, Any]
    lr_factor: float = 1.0
    backbone_lr_factor: float = 1.0
    separate: bool = False


@functools.cache
def baselines() -> Mapping[str, Baseline]:
    """Every row by name, in the order of the table."""
    return {
        name: Baseline.model_validate(row) for name, row in yaml.safe_load(TABLE.read_text(encoding="utf-8")).items()
    }


def find_baseline(name: str) -> Baseline:
    """The row of that name; UserError with the nearest one if there is none."""
    if name not in baselines():
        raise UserError(
            f"--row: there is no row {name!r}{did_you_mean(name, baselines())} (rows: {', '.join(baselines())})"
        )
    return baselines()[name]


def apply_baseline(tree: dict[str, Any], name: str, *, lr: float) -> None:
    """Change a plain tree of settings, whose learning rate is ``lr``, into the row's."""
    row = find_baseline(name)
    _merge(tree.setdefault("model", {}), row.model)
    tree.setdefault("train", {}).update(lr=lr * row.lr_factor, backbone_lr_factor=row.backbone_lr_factor)
    tree["output"] = f"{tree.get('output', 'runs')}_{name}"


def _merge(model: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Settings of ``model`` replaced by those of the row; of its branch ``moe`` only those that the row names."""
    model |= {key: value for key, value in changes.items() if key != "moe"}
    model["moe"] = {**model.get("moe", {}), **changes.get("moe", {})}
