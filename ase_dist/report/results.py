"""A run's results: each task's first, latest and best metric, compared with a predictor that ignores the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ase_dist.evaluation.delta_m import delta_m
from ase_dist.evaluation.scores import CLASS_PREFIX, with_tolerance
from ase_dist.report.text import DASH, significant
from ase_dist.training.record.records import Records, Series, TaskFacts


@dataclass(frozen=True)
class ResultRow:
    """One task; NaN where there is no value."""

    facts: TaskFacts
    series: Series
    trivial: float

    @property
    def first(self) -> float:
        """The value of the first evaluation that has one."""
        return next((value for value in self.series.values if math.isfinite(value)), math.nan)

    @property
    def latest(self) -> float:
        """The value of the last evaluation that has one."""
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
        """Whether the latest value beats the trivial predictor's, in words."""
        if self.facts.higher_is_better is None or not math.isfinite(self.latest - self.trivial):
            return ""
        if self.latest == self.trivial:
            return "as trivial"
        return "beats trivial" if (self.latest > self.trivial) == self.facts.higher_is_better else "below trivial"


def result_rows(records: Records) -> list[ResultRow]:
    """A row for every task that was evaluated, in the model's order."""
    rows = []
    for name in records.evaluated_tasks():
        facts = records.facts_of(name, metrics=records.metric_names(name))
        series = records.series("eval", "metrics", name, facts.metric)
        rows.append(ResultRow(facts, series, records.series("eval", "trivial", name, facts.metric).last))
    return rows


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


def class_colors(records: Records) -> dict[str, dict[str, str]]:
    """By task title the colour, #rrggbb, of each metric that is the IoU of a class."""
    found = {}
    for task in records.evaluated_tasks():
        facts = records.facts_of(task)
        colors = {f"{CLASS_PREFIX}{name}": "#{:02x}{:02x}{:02x}".format(*color) for name, color in facts.classes}
        found[facts.title] = colors
    return found


def other_metrics(records: Records) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """By task the title and rows of every metric: name, trivial, first and latest value as text."""
    tables = []
    for task in records.evaluated_tasks():
        facts, rows = records.facts_of(task), []
        for metric in records.metric_names(task):
            values = records.series("eval", "metrics", task, metric)
            trivial = records.series("eval", "trivial", task, metric).last
            first = next((value for value in values.values if math.isfinite(value)), math.nan)
            name = with_tolerance(metric, facts.tolerance)
            rows.append((name, significant(trivial), significant(first), significant(values.last)))
        tables.append((facts.title, rows))
    return tables
