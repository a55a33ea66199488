"""The table of a study: a row per variant, mean and spread over seeds, the best of each column marked."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ase_dist.evaluation.seeds import mean_and_spread
from ase_dist.report.study_files import Facts, Results, Variant
from ase_dist.report.text import DASH, signed, significant
from ase_dist.training.record.records import Judged, TaskFacts, task_facts

Scores = Callable[[Variant], Sequence[float | None]]


@dataclass(frozen=True)
class Column(Judged):
    """A column: heading, unit, which way is better (None: nothing is marked), a variant's value for every seed."""

    title: str
    unit: str
    higher_is_better: bool | None
    values: Scores
    is_signed: bool = False


@dataclass(frozen=True)
class Cell:
    """A value as text; ``spread`` is empty with fewer than two seeds."""

    mean: str
    spread: str
    is_best: bool


@dataclass(frozen=True)
class Row:
    """A variant's line; ``note`` says what is missing, and which line is the reference."""

    variant: Variant
    cells: list[Cell]
    note: str
    is_reference: bool


def study_columns(results: Results) -> list[Column]:
    """One per task, Delta_m, and what it costs; those that no variant has a value for are left out."""
    tasks = results.tasks or list(dict.fromkeys(task for variant in results.variants for task in variant.metrics))
    columns = []
    for facts in (study_task(results, name) for name in tasks):
        values = functools.partial(_scores, task=facts.name, metric=facts.metric)
        columns.append(Column(facts.title, facts.metric_title, facts.higher_is_better, values))
    columns += [
        Column("\u0394m", "%", True, lambda v: v.delta_m or [], is_signed=True),
        Column("Trained", "M", False, lambda v: _scaled([(v.parameters or {}).get("trained")], 1e-6)),
        Column("All parameters", "M", False, lambda v: _scaled([(v.parameters or {}).get("total")], 1e-6)),
        Column("Forward", "GFLOP", False, lambda v: _scaled([(v.flops or {}).get("forward")], 1e-9)),
        Column("Backward", "GFLOP", False, lambda v: _scaled([(v.flops or {}).get("backward")], 1e-9)),
        Column("Speed", "images/s", True, lambda v: v.images_per_second),
        Column("Memory", "GB", False, lambda v: _scaled(v.memory_bytes, 1e-9)),
    ]
    return [c for c in columns if any(math.isfinite(_mean(c, variant)) for variant in results.variants)]


def study_rows(facts: Facts, results: Results, columns: Sequence[Column]) -> list[Row]:
    """The lines in the study's order. Best is only looked for among variants that have every seed."""
    expected = len(facts.seeds)
    whole = [variant for variant in results.variants if variant.done >= expected]
    style = [(_best(column, whole), _decimals(column, results.variants)) for column in columns]
    references = {facts.reference, *facts.references.values(), *(v.reference for v in results.variants)} - {""}
    return [
        Row(
            variant,
            [_cell(column, variant, *each) for column, each in zip(columns, style, strict=True)],
            _note(variant, expected),
            variant.name in references,
        )
        for variant in results.variants
    ]


def study_task(results: Results, name: str) -> TaskFacts:
    """The task's facts, with a metric that the results hold."""
    measured = next((list(v.metrics[name]) for v in results.variants if v.metrics.get(name)), [])
    return task_facts(results.data, name, metrics=measured)


def _scores(variant: Variant, *, task: str, metric: str) -> Sequence[float | None]:
    return variant.metrics.get(task, {}).get(metric, [])


def _cell(column: Column, variant: Variant, best: float, decimals: int) -> Cell:
    mean, spread = mean_and_spread(column.values(variant))
    sign = "+" if column.is_signed else ""
    text = signed(f"{mean:{sign},.{decimals}f}") if math.isfinite(mean) else DASH
    return Cell(text, f"{spread:,.{decimals}f}" if math.isfinite(spread) else "", mean == best)


def _decimals(column: Column, variants: Sequence[Variant]) -> int:
    """Of a whole column, so that its points stand below one another: losses are small numbers."""
    means = [abs(mean) for variant in variants if math.isfinite(mean := _mean(column, variant))]
    return 4 if not column.is_signed and max(means, default=1.0) < 1 else 2


def _best(column: Column, variants: Sequence[Variant]) -> float:
    """The best mean; NaN where there is nothing to compare."""
    means = [mean for variant in variants if math.isfinite(mean := _mean(column, variant))]
    if column.higher_is_better is None or len(set(means)) < 2:
        return math.nan
    return max(means) if column.higher_is_better else min(means)


def _note(variant: Variant, expected: int) -> str:
    if variant.done == 0:
        return "no seed is done"
    return f"{variant.done} of {expected} seeds" if variant.done < expected else ""


def _mean(column: Column, variant: Variant) -> float:
    return mean_and_spread(column.values(variant))[0]


def _scaled(values: Sequence[float | None], factor: float) -> list[float | None]:
    return [None if value is None else value * factor for value in values]


def spread_text(values: Sequence[float | None]) -> str:
    """Mean and spread of one metric, for the lists below the table."""
    mean, spread = mean_and_spread(values)
    return significant(mean) + (f" \u00b1 {significant(spread, 2)}" if math.isfinite(spread) else "")
