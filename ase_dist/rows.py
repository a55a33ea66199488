"""The rows of the paper's comparison by name: what each changes in a config. The table itself is rows.yaml."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from ase_dist.tasks import nearest

TABLE = Path(__file__).with_name("rows.yaml")


class Row(BaseModel):
    """One row: ``model`` replaces those settings of a config; see the table's head for the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    label: str
    model: dict[str, Any]
    lr_factor: float = 1.0
    backbone_lr_factor: float = 1.0
    separate: bool = False


@functools.cache
def rows() -> Mapping[str, Row]:
    """Every row by name, in the order of the table."""
    return {name: Row.model_validate(row) for name, row in yaml.safe_load(TABLE.read_text(encoding="utf-8")).items()}


def find_row(name: str) -> Row:
    """The row of that name; ValueError with the nearest one if there is none."""
    if name not in rows():
        raise ValueError(f"--row: there is no row {name!r}{nearest(name, rows())} (rows: {', '.join(rows())})")
    return rows()[name]


def apply_row(tree: dict[str, Any], name: str, *, lr: float) -> None:
    """Change a plain tree of settings, whose learning rate is ``lr``, into the row's."""
    row = find_row(name)
    _merge(tree.setdefault("model", {}), row.model)
    tree.setdefault("train", {}).update(lr=lr * row.lr_factor, backbone_lr_factor=row.backbone_lr_factor)
    tree["output"] = f"{tree.get('output', 'runs')}_{name}"


def _merge(model: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Settings of ``model`` replaced by those of the row; of its branch ``moe`` only those that the row names."""
    model |= {key: value for key, value in changes.items() if key != "moe"}
    model["moe"] = {**model.get("moe", {}), **changes.get("moe", {})}
