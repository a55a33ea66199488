"""The data set of a run as its dataset.yaml describes it: tables of its files, tasks and classes for the run's page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ase_dist.description import DataSetDescription, TaskDescription
from ase_dist.training.record.records import reach


@dataclass(frozen=True)
class DescribedTask:
    """A task's row; ``further`` are the keys that only some tasks have, as text; ``classes`` are names with #rrggbb."""

    name: str
    title: str
    kind: str
    files: str
    metric: str
    loss_weight: str
    further: list[tuple[str, str]]
    classes: list[tuple[str, str]]


@dataclass(frozen=True)
class DescribedData:
    """A data set: its name, where pictures and splits are, its tasks."""

    name: str
    facts: list[tuple[str, str]]
    tasks: list[DescribedTask]


def described_data(settings: Mapping[str, Any]) -> DescribedData | None:
    """The table of ``data.description``; None for a data set without one, and for one of another version."""
    tree = reach(settings, "data", "description")[1]
    try:
        description = DataSetDescription.model_validate(tree)
    except ValidationError:
        return None
    plain = description.model_dump(mode="json", exclude_none=True)
    facts = [("images", _text(plain.pop("images"))), *((key, _text(v)) for key, v in plain.pop("splits").items())]
    facts += [(key, _text(value)) for key, value in plain.items() if key not in ("name", "tasks")]
    return DescribedData(description.name, facts, [_task(*item) for item in description.tasks.items()])


def _task(name: str, task: TaskDescription) -> DescribedTask:
    row, plain = task.task(name), task.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    own = ("kind", "files", "title", "loss_weight", "metric", "classes")
    return DescribedTask(
        name,
        row.title,
        task.kind,
        _text(plain["files"]),
        row.metric_title,
        f"{row.loss_weight:g}",
        [(key, _text(value)) for key, value in plain.items() if key not in own],
        [(each.name, "#{:02x}{:02x}{:02x}".format(*each.color)) for each in task.classes or ()],
    )


def _text(value: Any) -> str:
    """Lists with commas, mappings as "7: road, 8: sidewalk"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {'ignore' if each is None else each}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
