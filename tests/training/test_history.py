"""Which evaluation is the best: a model that fails a task never is."""

from __future__ import annotations

import math

import pytest

from ase_dist.tasks import PASCAL_TASKS
from ase_dist.training.state.history import NEVER, History, gain

TASKS = (PASCAL_TASKS["semseg"], PASCAL_TASKS["saliency"])


def results(semseg: float, saliency: float) -> dict[str, dict[str, float]]:
    return {"semseg": {"miou": semseg}, "saliency": {"miou": saliency}}


def test_a_task_whose_result_is_nan_makes_no_best_step() -> None:
    history = History(trivial=results(10.0, 20.0))
    history.add(1, results(11.0, 20.0), TASKS)
    history.add(2, results(50.0, math.nan), TASKS)
    assert (history.best_step, history.best_score) == (1, pytest.approx(5.0))


def test_a_task_without_labels_does_not_count() -> None:
    assert gain(TASKS, results(11.0, math.nan), results(10.0, math.nan)) == pytest.approx(10.0)
    assert gain(TASKS, results(11.0, 0.0), results(10.0, 0.0)) == pytest.approx(10.0)


def test_nothing_defined_is_no_best_step() -> None:
    history = History(trivial=results(math.nan, 0.0))
    history.add(1, results(11.0, 5.0), TASKS)
    assert history.best_step == NEVER and history.best_score == -math.inf
