"""Results beside a reference row: each task's relative gain, and Delta_m."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ase_dist.errors import UserError
from ase_dist.evaluation.delta_m import PAPER_METRICS, PAPER_REFERENCE, delta_m
from ase_dist.evaluation.scores import Results, headline, score_of
from ase_dist.tasks import Task


@dataclass(frozen=True)
class Reference:
    """Scores to compare with; ``name`` says whose, ``data`` on which data set (empty: unknown)."""

    name: str
    data: str
    scores: Results


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
    """The paper's single-task row, which its own Delta_m is relative to."""
    scores = {task: {PAPER_METRICS[task]: value} for task, value in PAPER_REFERENCE.scores.items()}
    name = f"{PAPER_REFERENCE.method}, {PAPER_REFERENCE.backbone} (arXiv 2510.00570)"
    return Reference(name, "PASCAL-Context", scores)


def compare(tasks: Sequence[Task], results: Results, reference: Reference) -> Comparison:
    """Compare every one of ``tasks``; edges by odsF where both sides have it, else by their cross-entropy.

    Raises UserError where the reference lacks a task or its score.
    """
    gains = tuple(_gain(task, results[task.name], reference) for task in tasks)
    left_out = tuple(sorted(reference.scores.keys() - {task.name for task in tasks}))
    return Comparison(reference, gains, _delta_m(gains), left_out)


def _gain(task: Task, values: Mapping[str, float], reference: Reference) -> Gain:
    key = _key(task, values, reference)
    gain = Gain(task, key, values[key], reference.scores[task.name][key], percent=math.nan)
    return replace(gain, percent=_delta_m([gain]))


def _delta_m(gains: Sequence[Gain]) -> float:
    return delta_m(
        {gain.task.name: gain.value for gain in gains},
        {gain.task.name: gain.reference for gain in gains},
        higher_is_better={gain.task.name: bool(score_of(gain.task, gain.key).higher_is_better) for gain in gains},
    )


def _key(task: Task, values: Mapping[str, float], reference: Reference) -> str:
    """The first of the task's scores that both sides have."""
    if task.name not in reference.scores:
        raise UserError(
            f"--reference: {reference.name} has no task {task.name!r}, it has {', '.join(reference.scores)}; name "
            "another, or evaluate fewer tasks with --tasks"
        )
    theirs = reference.scores[task.name]
    for key in (headline(task, values), task.metric):
        if math.isfinite(theirs.get(key, math.nan)):
            return key
    wanted = score_of(task, headline(task, values)).title
    advice = "add --edge-ods" if "ods_f" in theirs else "name a reference that has it"
    raise UserError(
        f"--reference: {reference.name} scores {task.name} by {', '.join(theirs) or 'nothing'}, this evaluation by "
        f"{wanted}; {advice}"
    )
