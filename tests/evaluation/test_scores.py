"""Every score has a name, and the one that stands for a task is the task table's or odsF."""

import math

import pytest
import torch

from ase_dist.evaluation.metrics import EdgeOds, build_metric
from ase_dist.evaluation.scores import CLASS_PREFIX, SCORES, format_score, headline, score_of
from ase_dist.tasks import NYUD_TASKS, PASCAL_TASKS

from .conftest import TASK_OF_KIND, random_image

pytestmark = pytest.mark.single_gpu


@pytest.mark.parametrize("kind", TASK_OF_KIND)
def test_every_key_of_a_result_is_described_and_every_description_is_of_one(kind):
    task = TASK_OF_KIND[kind]
    metric = build_metric(task, edge_ods=EdgeOds(workers=0))
    metric.update(*random_image(task, seed=0))
    metric.finish()
    keys = {key for key in metric.result() if not key.startswith(CLASS_PREFIX)}
    assert keys == SCORES[kind].keys()


@pytest.mark.parametrize("task", [*PASCAL_TASKS.values(), *NYUD_TASKS.values()], ids=lambda task: task.name)
def test_directions_agree_with_the_task_table(task):
    assert score_of(task, task.metric).higher_is_better is task.higher_is_better


def test_directions_are_those_of_the_metrics(device):
    """A perfect prediction is at least as good as a poor one in every score that has a direction."""
    for task in TASK_OF_KIND.values():
        prediction, label = random_image(task, seed=0, height=40, width=50)
        label = torch.where(label == 255, 0, label) if label.dtype == torch.uint8 else label
        poor, perfect = build_metric(task), build_metric(task)
        poor.update(prediction, label)
        perfect.update(label if task.kind != "mask" else label.float(), label)
        for key, value in poor.result().items():
            better = score_of(task, key).higher_is_better
            if better is not None:
                assert (perfect.result()[key] >= value) if better else (perfect.result()[key] <= value), key


def test_classes_go_by_their_names():
    score = score_of(PASCAL_TASKS["semseg"], "iou/tvmonitor")
    assert (score.title, score.unit, score.higher_is_better) == ("IoU tvmonitor", "%", True)


def test_edges_stand_by_ods_where_it_was_computed():
    edge = PASCAL_TASKS["edge"]
    assert headline(edge, {"bce": 0.1, "ods_f": 50.0}) == "ods_f"
    assert headline(edge, {"bce": 0.1, "ods_f": math.nan}) == headline(edge, {"bce": 0.1}) == "bce"
    assert headline(PASCAL_TASKS["saliency"], {"miou": 1.0, "maxf": 2.0}) == "miou"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(12.3456, "%", "12.35"), (0.0123456, "", "0.01235"), (math.nan, "%", "-"), (None, "", "-"), (1.0, "deg", "1.00")],
)
def test_numbers_are_written_as_tables_want_them(value, unit, text):
    assert format_score(value, unit) == text
