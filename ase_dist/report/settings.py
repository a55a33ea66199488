"""The settings of a run in sections, with defaults and meanings; settings that differ are marked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import yaml

from ase_dist.config import Section, Settings, flat, setting_keys, type_of
from ase_dist.errors import UserError
from ase_dist.read_config import upgrade_tree
from ase_dist.report.described_data import described_data
from ase_dist.training.record.records import reach
from ase_dist.typed_yaml import from_yaml

GENERAL = "general"


@dataclass(frozen=True)
class Setting:
    """One row; values as the command line takes them. ``is_known`` is false where this version has no such key."""

    key: str
    value: str
    default: str
    meaning: str
    is_known: bool

    @property
    def differs(self) -> bool:
        """Whether the run has another value than the default."""
        return self.is_known and self.value != self.default


@dataclass(frozen=True)
class SettingsSection:
    """A branch of the tree of settings, named by its keys."""

    name: str
    rows: list[Setting]

    @property
    def changed(self) -> int:
        """How many rows differ from their default."""
        return sum(row.differs for row in self.rows)


def read_settings(config: str) -> dict[str, Any]:
    """The plain tree in the text of a config.yaml, under today's names; UserError with one sentence if it is none."""
    try:
        tree = from_yaml(config, type_of)
    except UserError as error:
        raise UserError(f"config.yaml: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config.yaml is not plain YAML ({' '.join(str(error).split()):.200})") from None
    if not isinstance(tree, dict):
        raise UserError("config.yaml holds no settings")
    return upgrade_tree({str(key): value for key, value in tree.items()})


def settings_sections(tree: Mapping[str, Any]) -> list[SettingsSection]:
    """Every setting of a run, by section, in the tree's order; what a run does not name has its default."""
    known = tuple(setting_keys())
    defaults = Settings().model_dump(mode="json")
    rows = []
    for key in known:
        default = reach(defaults, *key.split("."))[1]
        is_there, value = reach(tree, *key.split("."))
        shown = as_text(value if is_there else default)
        if key == "data.description" and (data := described_data(tree)) is not None:
            shown = f"{data.name}: {', '.join(task.name for task in data.tasks)}; see the section Data set"
        rows.append(Setting(key, shown, as_text(default), _meaning(key), True))
    parents = tuple(f"{key}." for key in known)
    for key, value in flat(tree).items():
        if key not in known and not key.startswith(parents):  # a setting that this version does not have
            rows.append(Setting(key, as_text(value), "", "", False))
    names = list(dict.fromkeys(_section_of(row.key) for row in rows))
    return [SettingsSection(name, [row for row in rows if _section_of(row.key) == name]) for name in names]


def as_text(value: Any) -> str:
    """A value as the command line takes it: null, true, 0.001, [a, b]."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _section_of(key: str) -> str:
    return key.rpartition(".")[0] or GENERAL


def _meaning(key: str) -> str:
    """The description of the setting's field."""
    *path, name = key.split(".")
    section: type[Section] = Settings
    for part in path:
        section = cast("type[Section]", section.model_fields[part].annotation)
    return section.model_fields[name].description or ""
