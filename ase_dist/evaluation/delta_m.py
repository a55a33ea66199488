"""Delta_m, the one number of multi-task tables, and the paper's table to compare with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ase_dist.errors import UserError
from ase_dist.tasks import LIBMTL_SCORES, Delta, Task


@dataclass(frozen=True)
class PaperResult:
    """A model of the paper's PASCAL-Context table (arXiv 2510.00570): 224 x 224 pixels, 40 epochs.

    ``scores`` are mIoU in percent (semseg, human_parts, saliency), mean angular error in degrees (normals) and odsF in
    percent (edge), see ``PAPER_METRICS``; ``delta_m`` is the printed value, ``parameters`` millions.
    """

    method: str
    backbone: str
    scores: Mapping[str, float]
    delta_m: float
    parameters: int


PAPER_HIGHER_IS_BETTER: Mapping[str, bool] = {
    "semseg": True,
    "normals": False,
    "human_parts": True,
    "saliency": True,
    "edge": True,
}

PAPER_METRICS: Mapping[str, str] = {
    "semseg": "miou",
    "normals": "mean",
    "human_parts": "miou",
    "saliency": "miou",
    "edge": "ods_f",
}


def _result(method: str, backbone: str, scores: tuple[float, ...], delta: float, parameters: int) -> PaperResult:
    return PaperResult(method, backbone, dict(zip(PAPER_HIGHER_IS_BETTER, scores, strict=True)), delta, parameters)


PAPER_TABLE: tuple[PaperResult, ...] = (
    _result("STL", "ResNet-18", (60.1, 15.4, 51.0, 63.2, 50.8), 0.00, 11),
    _result("MTL", "ResNet-18", (58.4, 15.9, 51.8, 62.6, 50.3), -1.29, 11),
    _result("MTAN", "ResNet-18", (58.9, 16.4, 51.9, 62.2, 50.6), -1.74, 11),
    _result("NDDR-CNN", "ResNet-18", (59.7, 15.5, 51.7, 62.7, 51.5), 0.13, 11),
    _result("Cross-Stitch", "ResNet-18", (60.4, 15.4, 51.6, 63.1, 51.7), 0.66, 11),
    _result("MTL-ViT", "ViT-B", (69.1, 16.2, 54.8, 61.9, 49.9), 2.68, 104),
    _result("LoRA-MoE 16/4/0/4", "ViT-B", (73.7, 17.5, 59.2, 62.9, 53.7), 6.06, 107),
    _result("LoRA-MoE 32/8/0/2", "ViT-B", (73.8, 17.4, 59.3, 62.9, 53.3), 6.11, 108),
    _result("ASE 16/3/1/4", "ViT-B", (74.0, 17.3, 60.1, 63.2, 55.3), 7.49, 107),
    _result("ASE 32/6/2/2", "ViT-B", (74.0, 17.2, 60.3, 63.3, 54.9), 7.58, 108),
)
PAPER_REFERENCE: PaperResult = PAPER_TABLE[0]  # single-task learning, which every Delta_m is relative to


def delta_m(
    scores: Mapping[str, float], reference: Mapping[str, float], *, higher_is_better: Mapping[str, bool]
) -> float:
    """Mean over tasks of the relative gain over ``reference``, percent; a task where lower is better counts negated.

    Vandenhende et al., "Multi-task learning for dense prediction tasks" (PAMI 2021), the paper's Delta_m. All three
    mappings go by task, and a task's two scores must be of the same metric. Raises UserError where they don't hold
    the same tasks, or where a score is not finite or a reference is 0.
    """
    if not reference:
        raise UserError("Delta_m: got no task in the reference, wanted at least one")
    for name, tasks in (("scores", scores), ("directions", higher_is_better)):
        if set(tasks) != set(reference):
            raise UserError(
                f"Delta_m over {len(reference)} tasks where the {name} have {len(tasks)}: only one side has "
                f"{sorted(set(tasks) ^ set(reference))}; choose the same tasks on both sides"
            )
    gains = []
    for task, base in reference.items():
        if not math.isfinite(scores[task]) or not math.isfinite(base) or base == 0:
            raise UserError(f"Delta_m: got {scores[task]} for {task} against {base}, wanted finite values, not over 0")
        gains.append((scores[task] - base) / base * (1 if higher_is_better[task] else -1))
    return 100 * sum(gains) / len(gains)


def delta_p(
    scores: Mapping[str, Mapping[str, float]],
    reference: Mapping[str, Mapping[str, float]],
    *,
    higher_is_better: Mapping[str, Mapping[str, bool]],
) -> float:
    """LibMTL's Delta_p, percent: the relative gains averaged over the scores of each task, then over tasks.

    Lin and Zhang, "LibMTL: A Python library for deep multi-task learning" (JMLR 2023), ``count_improvement``: there B,
    N and w are the reference, the scores and 1 where higher is better, and a gain is (-1)^w (B - N) / B. With one
    score a task it is Delta_m. Mappings go by task, then by score; which scores LibMTL takes: ``tasks.LIBMTL_SCORES``.
    Raises UserError as ``delta_m``, also where a task's scores differ on the two sides.
    """
    if not reference or set(scores) != set(reference):
        raise UserError(
            f"Delta_p: got scores of {sorted(scores)} and a reference of {sorted(reference)}, wanted the same tasks"
        )
    gains = [
        delta_m(scores[task], of_task, higher_is_better=higher_is_better[task]) for task, of_task in reference.items()
    ]
    return sum(gains) / len(gains)


def compared_scores(task: Task, delta: Delta) -> tuple[str, ...]:
    """The scores of ``task`` that Delta_m takes, the one that stands for it, or Delta_p (``tasks.LIBMTL_SCORES``)."""
    return LIBMTL_SCORES.get(task.kind, (task.metric,)) if delta == "delta_p" else (task.metric,)


def directions(tasks: Iterable[Task]) -> dict[str, bool]:
    """Whether higher is better, by task, for the metric that the task table names."""
    return {task.name: task.higher_is_better for task in tasks}
