"""The trivial predictor is the best constant under its task's metric, and its totals add up."""

import pytest
import torch

from ase_dist.evaluation.constant import ConstantPredictor
from ase_dist.evaluation.metrics import build_metric
from ase_dist.tasks import IGNORE

from .conftest import TASK_OF_KIND, random_image

pytestmark = pytest.mark.single_gpu


def labels_of(task, device):
    return [random_image(task, seed=seed, height=8 + seed)[1].to(device) for seed in range(5)]


def fitted(task, labels):
    constant = ConstantPredictor(task)
    for label in labels:
        constant.update(label)
    return constant


def score(task, labels, value):
    """The task's metric when every pixel is predicted as ``value`` ([] or [channels])."""
    metric = build_metric(task)
    for label in labels:
        metric.update(value[..., None, None].expand(label.shape), label)
    return metric.result()[task.metric]


@pytest.mark.parametrize("task", TASK_OF_KIND.values(), ids=TASK_OF_KIND)
def test_the_prediction_is_decoded_and_constant(task, device):
    constant = fitted(task, labels_of(task, device)).predict(4, 6)
    prediction, _ = random_image(task, seed=0, height=4, width=6)
    assert constant.shape == prediction.shape and constant.dtype == prediction.dtype
    assert torch.equal(constant, constant[..., :1, :1].expand_as(constant))


@pytest.mark.parametrize("kind", ["edges", "depth"])
def test_no_other_value_scores_better(kind, device):
    task = TASK_OF_KIND[kind]
    labels = labels_of(task, device)
    value = fitted(task, labels).predict(1, 1)[..., 0, 0]
    best = score(task, labels, value)
    assert best < score(task, labels, value * 1.02) and best < score(task, labels, value * 0.98)


def test_the_class_is_the_most_frequent_valid_one(device):
    task = TASK_OF_KIND["classes"]
    labels = [torch.tensor([[IGNORE] * 9 + [4, 2]], dtype=torch.uint8, device=device),
              torch.tensor([[2, 2, 4, 4, 4, IGNORE]], dtype=torch.uint8, device=device)]  # fmt: skip
    assert fitted(task, labels).predict(3, 2).tolist() == [[4, 4]] * 3


def test_everything_is_salient(device):
    task = TASK_OF_KIND["mask"]
    assert fitted(task, labels_of(task, device)).predict(2, 2).tolist() == [[1, 1], [1, 1]]


def test_the_normal_is_the_mean_direction(device):
    label = torch.zeros(3, 1, 3, device=device)
    label[0, 0, 0] = label[2, 0, 1] = 1  # x, z, and one ignored pixel
    normal = fitted(TASK_OF_KIND["normals"], [label]).predict(1, 1).flatten().tolist()
    assert normal == pytest.approx([0.5**0.5, 0, 0.5**0.5])


@pytest.mark.parametrize("task", TASK_OF_KIND.values(), ids=TASK_OF_KIND)
def test_totals_of_two_ranks_add_up(task, device):
    labels = labels_of(task, device)
    whole, left, right = fitted(task, labels), fitted(task, labels[:2]), fitted(task, labels[2:])
    left.totals = left.totals + right.totals
    torch.testing.assert_close(left.totals, whole.totals)
    torch.testing.assert_close(left.predict(2, 3), whole.predict(2, 3))


@pytest.mark.parametrize("task", TASK_OF_KIND.values(), ids=TASK_OF_KIND)
def test_without_valid_labels_it_says_so(task):
    constant = ConstantPredictor(task)
    ignored = random_image(task, seed=0)[1]
    constant.update(torch.full_like(ignored, IGNORE if ignored.dtype == torch.uint8 else 0))
    with pytest.raises(ValueError, match=f"{task.name}: got no valid label pixel"):
        constant.predict(2, 2)
