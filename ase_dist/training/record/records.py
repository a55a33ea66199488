"""The numbers of a run for its plots and its page: what is missing, null or of another form counts as not recorded.

Both are also made for a run that was killed, edited or written by another version, so nothing here relies on the form
of a record. ``ase_dist.training.record.metrics`` lists the keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from ase_dist.tasks import TOLERANCE, Color, Task, find_task
from ase_dist.training.record.metrics import STARTS_AND_ENDS

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Values over steps; NaN where a value was not finite."""

    steps: list[float]
    values: list[float]

    def __bool__(self) -> bool:
        return any(math.isfinite(value) for value in self.values)

    @property
    def last(self) -> float:
        """The last finite value, NaN where there is none."""
        return next((value for value in reversed(self.values) if math.isfinite(value)), math.nan)

    def scaled(self, factor: float) -> Series:
        """The values in another unit."""
        return Series(self.steps, [value * factor for value in self.values])

    def smoothed(self) -> Series:
        """The mean over a window of a twentieth of the series, shorter at the ends; NaN counts for nothing."""
        half = len(self.values) // 40
        values = np.array(self.values, dtype=np.float64)
        known = np.isfinite(values)
        sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known, values, 0.0), known))
        low = np.maximum(np.arange(len(values)) - half, 0)
        high = np.minimum(np.arange(len(values)) + half + 1, len(values))
        count = counts[high] - counts[low]
        means = np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), math.nan)
        return Series(self.steps, means.tolist())

    def thinned(self, limit: int) -> Series:
        """At most ``limit`` points: the least and the greatest of every stretch, so that no spike is lost."""
        if len(self.values) <= limit:
            return self
        values = np.array(self.values, dtype=np.float64)
        kept = {0, len(values) - 1}
        for part in np.array_split(np.arange(len(values)), max(1, (limit - 2) // 3)):
            known = part[np.isfinite(values[part])]
            if len(known):
                kept |= {int(known[values[known].argmin()]), int(known[values[known].argmax()])}
            if len(known) < len(part):
                kept.add(int(part[~np.isfinite(values[part])][0]))  # the gap
        return Series([self.steps[i] for i in sorted(kept)], [self.values[i] for i in sorted(kept)])


class Records:
    """The records of one metrics.jsonl by kind, what its newest "run" line says, and how that start ended.

    ``worlds`` are the numbers of ranks of the starts; ``started`` is the time of the last one, ``exit`` and ``why`` its
    end, empty where none is recorded. ``has_ends`` is false of a run of version 0.1, which recorded no ends.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._records = records
        last = max((i for i, record in enumerate(records) if record["kind"] == "run"), default=len(records))
        run: Mapping[str, Any] = records[last] if records[last:] else {}
        end: Mapping[str, Any] = next((record for record in reversed(records[last:]) if record["kind"] == "end"), {})
        self.worlds = [r["world"] for r in self.of_kind("run") if isinstance(r.get("world"), int)]
        self.has_ends, self.started = "attempt" in run, str(run.get("time", ""))
        self.exit, self.why = str(end.get("exit", "")), str(end.get("why", ""))
        self.data = str(run.get("data", ""))
        self._task_facts = branch(run, "task_facts")
        self.tasks = list(dict.fromkeys(str(name) for name in _list(run.get("tasks"))))
        self.shared = sorted(value for value in _list(run.get("shared_experts")) if isinstance(value, int))

    def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
        """The records of a kind, in order."""
        return [record for record in self._records if record["kind"] == kind]

    @property
    def last_step(self) -> int:
        """The last step with a recorded number; -1 where there is none."""
        return max((int(r["step"]) for r in self._records if r["kind"] not in STARTS_AND_ENDS), default=-1)

    def series(self, kind: str, *keys: str) -> Series:
        """The numbers at the path ``keys`` of the records that have something there."""
        found = [(record["step"], reach(record, *keys)) for record in self.of_kind(kind)]
        pairs = [(float(step), value) for step, (is_there, value) in found if is_there]
        return Series([step for step, _ in pairs], [number(value) for _, value in pairs])

    def arrays(self, kind: str, key: str, *, ndim: int) -> dict[int, Array]:
        """The arrays of ``ndim`` dimensions under ``key`` by step; all of the last one's shape, others are left out."""
        found = {int(record["step"]): array(record.get(key), ndim=ndim) for record in self.of_kind(kind)}
        whole = {step: value for step, value in found.items() if value is not None and value.size}
        shape = whole[max(whole)].shape if whole else ()
        return {step: value for step, value in whole.items() if value.shape == shape}

    def tasks_with_loss(self) -> list[str]:
        """The tasks whose losses were recorded, in the order of the records."""
        return list(dict.fromkeys(name for record in self.of_kind("train") for name in _keys(record.get("losses"))))

    def task_weights(self) -> dict[str, Series]:
        """The weights that balancing gave the losses, by task; empty of a run with fixed weights."""
        found = {name: self.series("train", "task_weights", name) for name in self.tasks_with_loss()}
        return {name: series for name, series in found.items() if series}

    def evaluated_tasks(self) -> list[str]:
        """The tasks with metrics: the model's own first."""
        found = dict.fromkeys(name for record in self.of_kind("eval") for name in _keys(record.get("metrics")))
        return [name for name in dict.fromkeys([*self.tasks, *found]) if name in found]

    def metric_names(self, task: str) -> list[str]:
        """What the task's last evaluation measured."""
        found = (_keys(reach(record, "metrics", task)[1]) for record in reversed(self.of_kind("eval")))
        return next((names for names in found if names), [])

    def facts_of(self, task: str, *, metrics: Sequence[str] = ()) -> TaskFacts:
        """What the run line says about a task; see ``task_facts``."""
        return task_facts(self.data, task, metrics=metrics, recorded=self._task_facts)

    def task_names(self, count: int) -> list[str]:
        """The tasks of an array with ``count`` of them, by number where the run line names others."""
        return self.tasks if len(self.tasks) == count else [f"task {i + 1}" for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Values of any form


def number(value: Any) -> float:
    """A finite number as a float, anything else as NaN."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    return float(value) if is_number and abs(value) < 1e300 else math.nan


def array(value: Any, *, ndim: int) -> Array | None:
    """Nested lists as an array, null as NaN; None where they are ragged, hold text or have other dimensions."""
    try:
        found = np.array(value, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    return found if found.ndim == ndim else None


def reach(value: Any, *keys: str) -> tuple[bool, Any]:
    """Whether there is something at the path ``keys``, and what."""
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return False, None
        value = value[key]
    return True, value


def branch(value: Any, *keys: str) -> Mapping[str, Any]:
    """The mapping at the path ``keys``; an empty one where there is none."""
    found = reach(value, *keys)[1]
    return found if isinstance(found, Mapping) else {}


def texts(value: Any) -> list[str]:
    """The texts of a list; an empty one for anything else."""
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _keys(value: Any) -> list[str]:
    return [str(key) for key in value] if isinstance(value, Mapping) else []


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


class Judged:
    """A metric with a direction; ``higher_is_better`` is None where that is not known."""

    higher_is_better: bool | None

    @property
    def arrow(self) -> str:
        """An arrow in the better direction."""
        return {True: "\u2191", False: "\u2193", None: ""}[self.higher_is_better]

    @property
    def direction(self) -> str:
        """The better direction in words."""
        return {True: "higher is better", False: "lower is better", None: ""}[self.higher_is_better]


@dataclass(frozen=True)
class TaskFacts(Judged):
    """What the page says about a task, which may be in no data set's table."""

    name: str
    title: str
    metric: str
    metric_title: str
    higher_is_better: bool | None
    classes: tuple[tuple[str, Color], ...] = ()  # name and colour, of a task with classes
    tolerance: float | None = None  # of odsF, of a task of edges


def task_facts(
    data: str, name: str, *, metrics: Sequence[str] = (), recorded: Mapping[str, Any] | None = None
) -> TaskFacts:
    """The task's row as it was ``recorded``; else that of the data set's table, or of any data set that has it.

    ``metrics`` are those that were recorded: where the row's own is not among them, or there is no row, the first
    stands for the task and its direction is not known.
    """
    own = _recorded_task(name, branch(recorded, name))
    task = own or find_task(data, name)
    classes = tuple(zip(task.class_names, task.palette, strict=False)) if task and task.kind == "classes" else ()
    # a run whose records have no tolerance, or no facts at all, is of a version that had this one alone
    tolerance = own.tolerance if own else TOLERANCE if task and task.kind == "edges" else None
    if task is not None and (task.metric in metrics or not metrics):
        return TaskFacts(name, task.title, task.metric, task.metric_title, task.higher_is_better, classes, tolerance)
    metric = metrics[0] if metrics else ""
    return TaskFacts(name, task.title if task else name, metric, metric, None, classes, tolerance)


def _recorded_task(name: str, facts: Mapping[str, Any]) -> Task | None:
    """The row in the JSON of a run or a study; None where it has another form."""
    try:
        task = TypeAdapter(Task).validate_python(dict(facts))
    except ValidationError:
        return None
    return task if task.name == name else None
