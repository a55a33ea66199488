"""Results compared with a reference: the relative gain of each task, and Delta_m."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ase_dist.errors import UserError
from ase_dist.evaluation.delta_m import PAPER_METRICS, PAPER_REFERENCE, delta_m, delta_p
from ase_dist.evaluation.scores import BOUNDARY_PREFIXES, Results, headline, score_of
from ase_dist.tasks import LIBMTL_SCORES, TOLERANCE, Delta, Task


@dataclass(frozen=True)
class Reference:
    """Scores to compare with: of the model ``name``, measured on the data set ``data`` (empty: unknown).

    ``tolerances`` are those of its odsF by task, where they are known; see ``Task.tolerance``.
    """

    name: str
    data: str
    scores: Results
    tolerances: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Gain:
    """One score of a task: both values, and the gain in percent of the reference, above 0 where better."""

    task: Task
    key: str
    value: float
    reference: float
    percent: float


@dataclass(frozen=True)
class Comparison:
    """``value`` is Delta_m in percent over ``gains``, one a task; or LibMTL's Delta_p, for which a task has several.

    ``left_out`` names tasks that only the reference has.
    """

    reference: Reference
    gains: tuple[Gain, ...]
    value: float
    left_out: tuple[str, ...]
    delta: Delta = "delta_m"


def paper_reference() -> Reference:
    """The paper's single-task baseline, the reference of its own Delta_m."""
    scores = {task: {PAPER_METRICS[task]: value} for task, value in PAPER_REFERENCE.scores.items()}
    name = f"{PAPER_REFERENCE.method}, {PAPER_REFERENCE.backbone} (arXiv 2510.00570)"
    return Reference(name, "PASCAL-Context", scores, {"edge": TOLERANCE})


def compare(tasks: Sequence[Task], results: Results, reference: Reference, *, delta: Delta = "delta_m") -> Comparison:
    """Compare every one of ``tasks``; edges by odsF where both sides have it, else by their cross-entropy.

    With ``delta_p`` a task is compared by all the scores of ``tasks.LIBMTL_SCORES``. Raises UserError where the
    reference lacks a task or a score, and where its odsF has another tolerance.
    """
    gains: list[Gain] = []
    for task in tasks:
        keys = LIBMTL_SCORES.get(task.kind, ()) if delta == "delta_p" else ()
        for wanted in keys or (None,):
            key = _common_score(task, results[task.name], reference, wanted=wanted)
            value, base = results[task.name][key], reference.scores[task.name][key]
            is_higher = bool(score_of(task, key).higher_is_better)
            percent = delta_m({task.name: value}, {task.name: base}, higher_is_better={task.name: is_higher})
            gains.append(Gain(task, key, value, base, percent))
    values, bases, directions = ({task.name: dict[str, Any]() for task in tasks} for _ in range(3))
    for gain in gains:
        values[gain.task.name][gain.key], bases[gain.task.name][gain.key] = gain.value, gain.reference
        directions[gain.task.name][gain.key] = bool(score_of(gain.task, gain.key).higher_is_better)
    total = delta_p(values, bases, higher_is_better=directions)  # with one score a task it is Delta_m
    left_out = tuple(sorted(reference.scores.keys() - values.keys()))
    return Comparison(reference, tuple(gains), total, left_out, delta)


def _common_score(task: Task, values: Mapping[str, float], reference: Reference, *, wanted: str | None) -> str:
    """The score ``wanted``, or the first of those that may stand for the task, which both sides have."""
    if task.name not in reference.scores:
        raise UserError(
            f"--reference: {reference.name} has no task {task.name!r}, it has {', '.join(reference.scores)}; name "
            "another, or evaluate fewer tasks with --tasks"
        )
    theirs = reference.scores[task.name]
    for key in (headline(task, values), task.metric) if wanted is None else (wanted,):
        if math.isfinite(theirs.get(key, math.nan)):
            tolerance = reference.tolerances.get(task.name, task.tolerance)
            if key.startswith(BOUNDARY_PREFIXES) and tolerance != task.tolerance:
                raise UserError(
                    f"--reference: odsF of {task.name} is counted within {tolerance:g} of the diagonal in "
                    f"{reference.name}, within {task.tolerance:g} here, which says nothing about a gain; name a "
                    "reference on the same data, or leave edges out with --tasks"
                )
            return key
    title = score_of(task, wanted or headline(task, values)).title
    advice = "add --edge-ods" if "ods_f" in theirs and wanted is None else "name a reference that has it"
    advice += "" if wanted is None else ", or compare by Delta_m, one score a task (eval.delta=delta_m)"
    raise UserError(
        f"--reference: {reference.name} scores {task.name} by {', '.join(theirs) or 'nothing'}, this evaluation by "
        f"{title}; {advice}"
    )
