"""Results compared with a reference: the relative gain of each task, and Delta_m."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ase_dist.errors import UserError
from ase_dist.evaluation.delta_m import PAPER_METRICS, PAPER_REFERENCE, delta_m
from ase_dist.evaluation.scores import BOUNDARY_PREFIXES, Results, headline, score_of
from ase_dist.tasks import TOLERANCE, Task


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
    """One task: the score compared, both values, and the gain in percent of the reference, above 0 where better."""

    task: Task
    key: str
    value: float
    reference: float
    percent: float


@dataclass(frozen=True)
class Comparison:
    """``delta_m`` in percent over the tasks of ``gains``; ``left_out`` names tasks that only the reference has."""

    reference: Reference
    gains: tuple[Gain, ...]
    delta_m: float
    left_out: tuple[str, ...]


def paper_reference() -> Reference:
    """The paper's single-task baseline, the reference of its own Delta_m."""
    scores = {task: {PAPER_METRICS[task]: value} for task, value in PAPER_REFERENCE.scores.items()}
    name = f"{PAPER_REFERENCE.method}, {PAPER_REFERENCE.backbone} (arXiv 2510.00570)"
    return Reference(name, "PASCAL-Context", scores, {"edge": TOLERANCE})


def compare(tasks: Sequence[Task], results: Results, reference: Reference) -> Comparison:
    """Compare every one of ``tasks``; edges by odsF where both sides have it, else by their cross-entropy.

    Raises UserError where the reference lacks a task or its score, and where its odsF has another tolerance.
    """
    gains: list[Gain] = []
    values: dict[str, float] = {}
    references: dict[str, float] = {}
    directions: dict[str, bool] = {}
    for task in tasks:
        key, name = _common_score(task, results[task.name], reference), task.name
        values[name], references[name] = results[name][key], reference.scores[name][key]
        directions[name] = bool(score_of(task, key).higher_is_better)
        percent = delta_m({name: values[name]}, {name: references[name]}, higher_is_better={name: directions[name]})
        gains.append(Gain(task, key, values[name], references[name], percent))
    left_out = tuple(sorted(reference.scores.keys() - values.keys()))
    return Comparison(reference, tuple(gains), delta_m(values, references, higher_is_better=directions), left_out)


def _common_score(task: Task, values: Mapping[str, float], reference: Reference) -> str:
    """The first of the task's scores that both sides have."""
    if task.name not in reference.scores:
        raise UserError(
            f"--reference: {reference.name} has no task {task.name!r}, it has {', '.join(reference.scores)}; name "
            "another, or evaluate fewer tasks with --tasks"
        )
    theirs = reference.scores[task.name]
    for key in (headline(task, values), task.metric):
        if math.isfinite(theirs.get(key, math.nan)):
            tolerance = reference.tolerances.get(task.name, task.tolerance)
            if key.startswith(BOUNDARY_PREFIXES) and tolerance != task.tolerance:
                raise UserError(
                    f"--reference: odsF of {task.name} is counted within {tolerance:g} of the diagonal in "
                    f"{reference.name}, within {task.tolerance:g} here, which says nothing about a gain; name a "
                    "reference on the same data, or leave edges out with --tasks"
                )
            return key
    wanted = score_of(task, headline(task, values)).title
    advice = "add --edge-ods" if "ods_f" in theirs else "name a reference that has it"
    raise UserError(
        f"--reference: {reference.name} scores {task.name} by {', '.join(theirs) or 'nothing'}, this evaluation by "
        f"{wanted}; {advice}"
    )
