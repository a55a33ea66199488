"""How the keys of the metrics' results are written in tables: names, units and directions of ``tasks.SCORES``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ase_dist.tasks import SCORES, Score, Task

Results = Mapping[str, Mapping[str, float]]  # {task: {key: value}}
CLASS_PREFIX = "iou/"  # of the IoU of one class
SET_MARK = "@"  # before the data set in the key of a score that is of one set of several
IMAGES = "images"  # in the results of each task: how many images had a label of it
BOUNDARY_PREFIXES = ("ods_", "ois_")  # of the scores that depend on a tolerance

__all__ = [
    "CLASS_PREFIX",
    "IMAGES",
    "SCORES",
    "SET_MARK",
    "Results",
    "Score",
    "format_score",
    "headline",
    "score_of",
    "tolerances",
    "with_tolerance",
]


def score_of(task: Task, key: str) -> Score:
    """How ``key`` is written; ``iou/<class name>`` is the IoU of that class, ``<key>@<set>`` that of a data set.

    odsF is named with its tolerance.
    """
    if key.startswith(CLASS_PREFIX):
        return Score(f"IoU {key.removeprefix(CLASS_PREFIX)}", "%", True)
    key, _, title = key.partition(SET_MARK)
    if title:
        score = score_of(task, key)
        return replace(score, title=f"{score.title}, {title}")
    if key == IMAGES:
        return Score("images with a label")
    score = SCORES[task.kind][key]
    if task.inverse_depth and score.unit == "m":
        score = replace(score, unit="")  # a disparity is in no unit that is known
    return replace(score, title=with_tolerance(key, task.tolerance, text=score.title))


def with_tolerance(key: str, tolerance: float | None, *, text: str | None = None) -> str:
    """``text``, by default the key itself, with the tolerance that the boundary score ``key`` was counted with."""
    text = key if text is None else text
    return f"{text} (tolerance {tolerance:g})" if key.startswith(BOUNDARY_PREFIXES) and tolerance else text


def tolerances(tasks: Iterable[Task]) -> dict[str, float]:
    """By task of edges the tolerance of its odsF, as reports, summaries and checkpoints have it."""
    return {task.name: task.tolerance for task in tasks if task.tolerance is not None}


def headline(task: Task, values: Mapping[str, float]) -> str:
    """The key that stands for the task: of edges odsF where it was computed, else what the task table names."""
    return "ods_f" if task.kind == "edges" and math.isfinite(values.get("ods_f", math.nan)) else task.metric


def format_score(value: float | None, unit: str = "") -> str:
    """A number as tables show it: two decimals of percent and degrees, else four significant digits; "-" for none.

    A whole number without a unit, such as a count, keeps all its digits.
    """
    if value is None or not math.isfinite(value):
        return "-"
    if not unit and abs(value) >= 1e4 and value.is_integer():
        return f"{value:.0f}"
    return f"{value:.2f}" if unit in ("%", "deg") else f"{value:.4g}"
