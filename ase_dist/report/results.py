"""What a run achieved: each task's metric at first, now and at best, beside a predictor that looks at no image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ase_dist.evaluation.delta_m import delta_m
from ase_dist.report.records import Records, Series, TaskFacts, reach, task_facts
from ase_dist.report.text import DASH, significant


@dataclass(frozen=True)
class ResultRow:
    """One task; NaN where there is no value."""

    facts: TaskFacts
    series: Series
    trivial: float

    @property
    def first(self) -> float:
        """Of the first evaluation that has one."""
        return next((value for value in self.series.values if math.isfinite(value)), math.nan)

    @property
    def latest(self) -> float:
        """Of the last evaluation that has one."""
        return self.series.last

    @property
    def best(self) -> tuple[float, float]:
        """The best value and its step; NaN where the direction is not known."""
        known = [(v, s) for s, v in zip(self.series.steps, self.series.values, strict=True) if math.isfinite(v)]
        if not known or self.facts.higher_is_better is None:
            return math.nan, math.nan
        choose = max if self.facts.higher_is_better else min
        return choose(known, key=lambda pair: pair[0])

    @property
    def best_step(self) -> str:
        """The step of the best value as text."""
        return f"{self.best[1]:,.0f}" if math.isfinite(self.best[1]) else DASH

    @property
    def verdict(self) -> str:
        """In words where the latest value stands beside the trivial predictor's."""
        if self.facts.higher_is_better is None or not math.isfinite(self.latest - self.trivial):
            return ""
        if self.latest == self.trivial:
            return "as trivial"
        return "beats trivial" if (self.latest > self.trivial) == self.facts.higher_is_better else "below trivial"


def result_rows(records: Records) -> list[ResultRow]:
    """A row for every task that was evaluated, in the model's order."""
    return [_row(records, name) for name in evaluated_tasks(records)]


def evaluated_tasks(records: Records) -> list[str]:
    """The tasks with metrics: the model's own first."""
    found = dict.fromkeys(str(name) for record in records.of_kind("eval") for name in _keys(record.get("metrics")))
    return [name for name in dict.fromkeys([*records.tasks, *found]) if name in found]


def gains(rows: Sequence[ResultRow]) -> Series:
    """Delta_m over the trivial predictor, percent, at every evaluation that has a value for all of ``rows``."""
    usable = [
        row for row in rows if row.facts.higher_is_better is not None and row.trivial and math.isfinite(row.trivial)
    ]
    by_task = {row.facts.name: dict(zip(row.series.steps, row.series.values, strict=True)) for row in usable}
    reference = {row.facts.name: row.trivial for row in usable}
    directions = {row.facts.name: bool(row.facts.higher_is_better) for row in usable}
    common = set.intersection(*(set(values) for values in by_task.values())) if by_task else set()
    steps = [step for step in sorted(common) if all(math.isfinite(values[step]) for values in by_task.values())]
    values = [
        delta_m({name: scores[step] for name, scores in by_task.items()}, reference, higher_is_better=directions)
        for step in steps
    ]
    return Series(steps, values)


def other_metrics(records: Records) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """By task the title and rows of every metric: name, trivial, first and latest value as text."""
    return [(task_facts(records.data, name).title, _all_metrics(records, name)) for name in evaluated_tasks(records)]


def _all_metrics(records: Records, task: str) -> list[tuple[str, str, str, str]]:
    rows = []
    for metric in _metric_names(records, task):
        values = records.series("eval", "metrics", task, metric)
        trivial = records.series("eval", "trivial", task, metric).last
        first = next((value for value in values.values if math.isfinite(value)), math.nan)
        rows.append((metric, significant(trivial), significant(first), significant(values.last)))
    return rows


def _row(records: Records, name: str) -> ResultRow:
    facts = task_facts(records.data, name, metrics=_metric_names(records, name))
    series = records.series("eval", "metrics", name, facts.metric)
    return ResultRow(facts, series, records.series("eval", "trivial", name, facts.metric).last)


def _metric_names(records: Records, task: str) -> list[str]:
    """What the task's last evaluation measured."""
    for record in reversed(records.of_kind("eval")):
        names = _keys(reach(record, "metrics", task)[1])
        if names:
            return names
    return []


def _keys(value: Any) -> list[str]:
    return [str(key) for key in value] if isinstance(value, Mapping) else []
