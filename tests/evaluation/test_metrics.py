"""What every metric promises: totals that add up, the task table's key, NaN for nothing, a clear error."""

import math

import pytest
import torch

from ase_dist.evaluation.decode import decode
from ase_dist.evaluation.metrics import EdgeOds, build_metric
from ase_dist.evaluation.ods import SCORES
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


def undefined(prediction):
    """The prediction with one pixel of which nothing is known."""
    broken = prediction.clone()
    broken[..., 2, 3] = math.nan if prediction.is_floating_point() else IGNORE
    return broken


@pytest.mark.parametrize("ods", [None, EdgeOds(workers=0)], ids=["plain", "boundaries"])
@pytest.mark.parametrize("task", ALL_TASKS, ids=NAMES)
def test_one_undefined_prediction_leaves_no_score(task, ods, device):
    metric, other = build_metric(task, edge_ods=ods), build_metric(task, edge_ods=ods)
    for i, at in enumerate((metric, other, metric)):
        prediction, label = (tensor.to(device) for tensor in random_image(task, seed=i))
        label[..., 2, 3] = 1
        at.update(undefined(prediction) if i == 0 else prediction, label)
    for each in (metric, other):
        each.finish()
        assert math.isnan(each.result()[task.metric]) == (each is metric)
    other.totals = other.totals + metric.totals  # nor have all ranks together
    for each in (metric, other):
        assert all(math.isnan(value) for value in each.result().values())
        why = each.why_undefined()
        assert why.startswith(f"{task.name}: ") and task.metric in why and why.endswith("some predictions are NaN")


@pytest.mark.parametrize("task", ALL_TASKS, ids=NAMES)
def test_what_is_predicted_without_a_label_does_not_matter(task, device):
    metric, sound = build_metric(task), build_metric(task)
    prediction, label = (tensor.to(device) for tensor in random_image(task, seed=0))
    label[..., 2, 3] = IGNORE if label.dtype == torch.uint8 else 0
    metric.update(undefined(prediction), label)
    sound.update(prediction, label)
    assert torch.equal(metric.totals, sound.totals) and metric.why_undefined() is None


def test_nothing_salient_in_the_set_has_no_f_measure(device):
    metric = build_metric(TASK_OF_KIND["mask"])
    label = torch.zeros(4, 5, dtype=torch.uint8, device=device)
    metric.update(torch.full((4, 5), 0.1, device=device), label)
    found = metric.result()
    assert math.isnan(found["maxf"]) and math.isnan(found["maxf_threshold"])
    assert found["miou"] == 100 and found["mae"] == pytest.approx(0.1)
    assert metric.why_undefined() == ("saliency: maxf, maxf_threshold are NaN: the labels hold nothing to score it by")
    label[0, 0] = 1
    metric.update(torch.full((4, 5), 0.1, device=device), label)
    assert metric.result()["maxf"] > 0 and metric.why_undefined() is None


def test_no_edge_in_the_set_has_no_boundary_score(device):
    metric = build_metric(TASK_OF_KIND["edges"], edge_ods=EdgeOds(workers=0))
    metric.update(torch.full((20, 30), 0.7, device=device), torch.zeros(20, 30, dtype=torch.uint8, device=device))
    metric.finish()
    found = metric.result()
    assert found["edge_share"] == 0 and math.isfinite(found["bce"])
    assert all(math.isnan(found[name]) for name in SCORES)


@pytest.mark.parametrize("task", ALL_TASKS, ids=NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_leave_no_score(task, value):
    """From the head's output on: the scores are NaN, or those of a certain prediction where a logit is infinite."""
    metric = build_metric(task)
    _, label = random_image(task, seed=0)
    logits = torch.randn(1, task.channels, *label.shape[-2:], generator=torch.Generator().manual_seed(0))
    logits[:, 0] = value
    metric.update(decode(task, logits)[0], label)
    score = metric.result()[task.metric]
    certain = value == math.inf and task.kind in ("classes", "mask", "edges")
    assert math.isfinite(score) if certain else not math.isfinite(score)
