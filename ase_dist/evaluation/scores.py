"""Names, units and directions of all scores: how the keys of the metrics' results are written in tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ase_dist.tasks import Kind, Task

Results = Mapping[str, Mapping[str, float]]  # {task: {key: value}}
CLASS_PREFIX = "iou/"  # of the IoU of one class


@dataclass(frozen=True)
class Score:
    """How one score is written; ``higher_is_better`` None: neither way."""

    title: str
    unit: str = ""
    higher_is_better: bool | None = None

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


SCORES: Mapping[Kind, Mapping[str, Score]] = {
    "classes": {
        "miou": Score("mIoU", "%", True),
        "accuracy": Score("pixel accuracy", "%", True),
    },
    "mask": {
        "miou": Score("mIoU at the best threshold", "%", True),
        "miou_threshold": Score("threshold of that mIoU"),
        "maxf": Score("maxF (beta^2 = 0.3)", "%", True),
        "maxf_threshold": Score("threshold of that F"),
        "mae": Score("mean absolute error", "", False),
    },
    "edges": {
        "ods_f": Score("odsF", "%", True),
        "ods_precision": Score("precision at odsF", "%", True),
        "ods_recall": Score("recall at odsF", "%", True),
        "ods_threshold": Score("threshold of odsF"),
        "ois_f": Score("oisF", "%", True),
        "bce": Score("weighted BCE", "", False),
        "edge_share": Score("share of edge pixels", "%"),
    },
    "normals": {
        "mean": Score("mean angle", "deg", False),
        "median": Score("median angle", "deg", False),
        "rmse": Score("RMSE", "deg", False),
        "within_11.25": Score("within 11.25 deg", "%", True),
        "within_22.5": Score("within 22.5 deg", "%", True),
        "within_30": Score("within 30 deg", "%", True),
    },
    "depth": {
        "rmse": Score("RMSE", "m", False),
        "absrel": Score("absolute relative error", "", False),
        "log10": Score("mean log10 error", "", False),
        "delta1": Score("delta < 1.25", "%", True),
        "delta2": Score("delta < 1.25^2", "%", True),
        "delta3": Score("delta < 1.25^3", "%", True),
    },
}


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
