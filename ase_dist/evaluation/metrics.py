"""One metric per kind of task: ``build_metric`` gives the accumulator that scores a task's decoded predictions."""

from __future__ import annotations

from collections.abc import Callable

from ase_dist.evaluation.binary import EdgesMetric, MaskMetric
from ase_dist.evaluation.geometry import DepthMetric, NormalsMetric
from ase_dist.evaluation.metric import Metric
from ase_dist.evaluation.ods import BoundaryMetric, EdgeOds
from ase_dist.evaluation.segmentation import ClassesMetric
from ase_dist.tasks import Kind, Task

__all__ = ["METRICS", "EdgeOds", "Metric", "build_metric"]

METRICS: dict[Kind, Callable[[Task], Metric]] = {
    "classes": ClassesMetric,
    "mask": MaskMetric,
    "edges": EdgesMetric,
    "normals": NormalsMetric,
    "depth": DepthMetric,
}


def build_metric(task: Task, *, edge_ods: EdgeOds | None = None) -> Metric:
    """An empty metric for ``task``; ``task.metric`` is one of the keys of its ``result()``.

    With ``edge_ods`` edges are scored by their boundaries too. ``close`` it, or its processes live on.
    """
    if edge_ods is not None and task.kind == "edges":
        return BoundaryMetric(task, ods=edge_ods)
    return METRICS[task.kind](task)
