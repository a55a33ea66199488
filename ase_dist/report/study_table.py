"""The table of a study: one row per variant, mean and spread over seeds, the best of each column marked."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ase_dist.evaluation.seeds import mean_and_spread
from ase_dist.report.study_files import Results, StudyFacts, VariantResult
from ase_dist.report.text import DASH, signed, significant
from ase_dist.training.record.records import Judged, TaskFacts, task_facts

Scores = Callable[[VariantResult], Sequence[float | None]]


@dataclass(frozen=True)
class StudyColumn(Judged):
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
    """A variant's row; ``note`` says which seeds are missing."""

    variant: VariantResult
    cells: list[Cell]
    note: str
    is_reference: bool


def study_columns(results: Results) -> list[StudyColumn]:
    """One per task, Delta_m, and what it costs; those that no variant has a value for are left out."""
    tasks = results.tasks or list(dict.fromkeys(task for variant in results.variants for task in variant.metrics))
    columns = []
    for facts in (study_task(results, name) for name in tasks):
        values = functools.partial(_scores, task=facts.name, metric=facts.metric)
        columns.append(StudyColumn(facts.title, facts.metric_title, facts.higher_is_better, values))
    columns += [
        StudyColumn(f"\u0394{results.delta[-1:]}", "%", True, lambda v: v.delta_m or [], is_signed=True),
        StudyColumn("Trained", "M", False, lambda v: _scaled([(v.parameters or {}).get("trained")], 1e-6)),
        StudyColumn("All parameters", "M", False, lambda v: _scaled([(v.parameters or {}).get("total")], 1e-6)),
        StudyColumn("Forward", "GFLOP", False, lambda v: _scaled([(v.flops or {}).get("forward")], 1e-9)),
        StudyColumn("Backward", "GFLOP", False, lambda v: _scaled([(v.flops or {}).get("backward")], 1e-9)),
        StudyColumn("Speed", "images/s", True, lambda v: v.images_per_second),
        StudyColumn("Memory", "GB", False, lambda v: _scaled(v.memory_bytes, 1e-9)),
    ]
    return [c for c in columns if any(math.isfinite(mean_and_spread(c.values(v))[0]) for v in results.variants)]


def study_rows(facts: StudyFacts, results: Results, columns: Sequence[StudyColumn]) -> list[Row]:
    """The rows in the study's order. The best is only marked among variants that have every seed."""
    variants, expected = results.variants, len(facts.seeds)
    cells: list[list[Cell]] = [[] for _ in variants]
    for column in columns:
        measured = [mean_and_spread(column.values(variant)) for variant in variants]
        known = [mean for mean, _ in measured if math.isfinite(mean)]
        # losses are small numbers; a column has one number of decimals, so that its points are aligned
        decimals = 4 if not column.is_signed and max(map(abs, known), default=1.0) < 1 else 2
        complete = [mean for v, (mean, _) in zip(variants, measured, strict=True) if v.done >= expected]
        candidates, best = {mean for mean in complete if math.isfinite(mean)}, math.nan
        if column.higher_is_better is not None and len(candidates) > 1:
            best = max(candidates) if column.higher_is_better else min(candidates)
        sign = "+" if column.is_signed else ""
        for row, (mean, spread) in zip(cells, measured, strict=True):
            text = signed(f"{mean:{sign},.{decimals}f}") if math.isfinite(mean) else DASH
            row.append(Cell(text, f"{spread:,.{decimals}f}" if math.isfinite(spread) else "", mean == best))
    references = {facts.reference, *facts.references.values(), *(v.reference for v in variants)} - {""}
    rows = []
    for variant, of_variant in zip(variants, cells, strict=True):
        note = f"{variant.done} of {expected} seeds" if variant.done < expected else ""
        note = note if variant.done else "no seed is done"
        rows.append(Row(variant, of_variant, note, variant.name in references))
    return rows


def study_task(results: Results, name: str) -> TaskFacts:
    """The task's facts, with a metric that the results hold."""
    measured = next((list(v.metrics[name]) for v in results.variants if v.metrics.get(name)), [])
    return task_facts(results.data, name, metrics=measured, recorded=results.task_facts)


def _scores(variant: VariantResult, *, task: str, metric: str) -> Sequence[float | None]:
    return variant.metrics.get(task, {}).get(metric, [])


def _scaled(values: Sequence[float | None], factor: float) -> list[float | None]:
    return [None if value is None else value * factor for value in values]


def spread_text(values: Sequence[float | None]) -> str:
    """Mean and spread of one metric, for the lists below the table."""
    mean, spread = mean_and_spread(values)
    return significant(mean) + (f" \u00b1 {significant(spread, 2)}" if math.isfinite(spread) else "")
