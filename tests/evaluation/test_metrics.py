"""What every metric promises: totals that add up, the task table's key, NaN for nothing, a clear error."""

import math

import pytest
import torch

from ase_dist.evaluation.metrics import build_metric
from ase_dist.tasks import IGNORE, NYUD_TASKS, PASCAL_TASKS

from .conftest import TASK_OF_KIND, random_image

pytestmark = pytest.mark.single_gpu

ALL_TASKS = [*PASCAL_TASKS.values(), *NYUD_TASKS.values()]
NAMES = [f"{i}-{task.name}" for i, task in enumerate(ALL_TASKS)]


@pytest.mark.parametrize("task", ALL_TASKS, ids=NAMES)
@pytest.mark.parametrize("ranks", [2, 5])
def test_totals_of_a_random_split_add_up_to_the_whole(task, ranks, device):
    whole, parts = build_metric(task), [build_metric(task) for _ in range(ranks)]
    owner = torch.randint(ranks - 1, (9,), generator=torch.Generator().manual_seed(ranks))  # one rank has no image
    for i in range(9):
        prediction, label = (tensor.to(device) for tensor in random_image(task, seed=i, height=8 + i))
        whole.update(prediction, label)
        parts[owner[i]].update(prediction, label)
    merged = build_metric(task)
    merged.totals = torch.stack([part.totals.to(device) for part in parts]).sum(0)
    torch.testing.assert_close(merged.totals, whole.totals, rtol=1e-13, atol=0)
    assert merged.result() == pytest.approx(whole.result(), rel=1e-12)
    assert whole.totals.dtype == torch.float64 and whole.totals.ndim == 1


@pytest.mark.parametrize("task", ALL_TASKS, ids=NAMES)
def test_the_task_tables_key_is_a_result(task, device):
    metric = build_metric(task)
    metric.update(*(tensor.to(device) for tensor in random_image(task, seed=0)))
    assert math.isfinite(metric.result()[task.metric])


@pytest.mark.parametrize("task", TASK_OF_KIND.values(), ids=TASK_OF_KIND)
def test_an_image_that_is_ignored_throughout_changes_nothing(task, device):
    once, again = build_metric(task), build_metric(task)
    prediction, label = (tensor.to(device) for tensor in random_image(task, seed=0))
    ignored = torch.full_like(label, IGNORE if label.dtype == torch.uint8 else 0)
    assert math.isnan(build_metric(task).result()[task.metric])
    again.update(prediction, ignored)
    assert math.isnan(again.result()[task.metric])
    for metric in (once, again):
        metric.update(prediction, label)
    assert torch.equal(once.totals, again.totals)


@pytest.mark.parametrize("task", TASK_OF_KIND.values(), ids=TASK_OF_KIND)
def test_a_perfect_prediction_has_the_best_score(task, device):
    metric = build_metric(task)
    _, label = (tensor.to(device) for tensor in random_image(task, seed=0))
    metric.update(torch.where(label == IGNORE, 0, label) if label.dtype == torch.uint8 else label, label)
    best = {"miou": 100, "bce": 0, "mean": 0, "rmse": 0}[task.metric]
    assert metric.result()[task.metric] == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("task", TASK_OF_KIND.values(), ids=TASK_OF_KIND)
def test_a_prediction_of_another_size_is_named(task):
    prediction, _ = random_image(task, seed=0)
    _, label = random_image(task, seed=0, width=5)
    with pytest.raises(ValueError, match=f"{task.name}: got a prediction .* for a label .*decoded at the size"):
        build_metric(task).update(prediction, label)
