"""How the keys of the metrics' results are written in tables: names, units and directions of ``tasks.SCORES``."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ase_dist.tasks import SCORES, Score, Task

Results = Mapping[str, Mapping[str, float]]  # {task: {key: value}}
CLASS_PREFIX = "iou/"  # of the IoU of one class

__all__ = ["CLASS_PREFIX", "SCORES", "Results", "Score", "format_score", "headline", "score_of"]


def score_of(task: Task, key: str) -> Score:
    """How ``key`` is written; ``iou/<class name>`` is the IoU of that class."""
    if key.startswith(CLASS_PREFIX):
        return Score(f"IoU {key.removeprefix(CLASS_PREFIX)}", "%", True)
    return SCORES[task.kind][key]


def headline(task: Task, values: Mapping[str, float]) -> str:
    """The key that stands for the task: of edges odsF where it was computed, else what the task table names."""
    return "ods_f" if task.kind == "edges" and math.isfinite(values.get("ods_f", math.nan)) else task.metric


def format_score(value: float | None, unit: str = "") -> str:
    """A number as tables show it: two decimals of percent and degrees, else four significant digits; "-" for none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.2f}" if unit in ("%", "deg") else f"{value:.4g}"
