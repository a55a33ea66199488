"""The table of tasks holds together, and asking it for what is not there gets one sentence."""

import numpy as np
import pytest
import torch

from ase_dist.errors import did_you_mean
from ase_dist.evaluation.metrics import build_metric
from ase_dist.tasks import DATA_SETS, NYUD_TASKS, PASCAL_TASKS, Task, find_task, select_tasks, voc_color

pytestmark = pytest.mark.single_gpu
ROWS = [(name, task) for name, data in DATA_SETS.items() for task in data.tasks.values()]


@pytest.mark.parametrize(("data", "task"), ROWS)
def test_rows_hold_together(data, task):
    assert DATA_SETS[data].tasks[task.name] is find_task(data, task.name) is task
    assert task.channels == {"mask": 1, "edges": 1, "normals": 3, "depth": 1}.get(task.kind, task.channels)
    assert task.loss_weight > 0
    if task.kind == "classes":
        assert len(task.class_names) == len(task.palette) == len(set(task.palette)) == task.channels


@pytest.mark.parametrize(("data", "task"), ROWS)
def test_the_metric_of_a_row_is_one_that_is_computed(data, task):
    metric = build_metric(task)
    shape = {"normals": (3, 4, 4), "depth": (1, 4, 4)}.get(task.kind, (4, 4))
    is_float = task.kind in ("normals", "depth")
    label = torch.ones(shape, dtype=torch.float32 if is_float else torch.uint8)
    prediction = label if task.kind == "classes" else label.float()
    metric.update(prediction, label)
    assert task.metric in metric.result()


def test_boundaries_match_as_far_apart_as_the_data_sets_papers_let_them():
    assert NYUD_TASKS["edge"].tolerance == 0.011 and PASCAL_TASKS["edge"].tolerance == 0.0075
    assert all(task.tolerance is None for _, task in ROWS if task.kind != "edges")
    assert Task("e", "E", "edges", 1, 1.0, "bce", "BCE", False).tolerance == 0.0075
    for kind, tolerance in (("depth", 0.011), ("edges", 0.0), ("edges", 1.0)):
        with pytest.raises(ValueError, match="tolerance of e: got"):
            Task("e", "E", kind, 1, 1.0, "bce", "BCE", False, tolerance=tolerance)
    with pytest.raises(ValueError, match="only depth may be inverse"):
        Task("e", "E", "edges", 1, 1.0, "bce", "BCE", False, inverse_depth=True)


def test_the_classes_of_nyud_have_their_names():
    """By the numbers of the 40-class task (Gupta et al. 2013), from 1 on."""
    names = dict(enumerate(NYUD_TASKS["semseg"].class_names, start=1))
    known = {1: "wall", 2: "floor", 5: "chair", 10: "bookshelf", 16: "curtain", 22: "ceiling", 25: "television",
             31: "person", 33: "toilet", 36: "bathtub", 37: "bag", 40: "otherprop"}  # fmt: skip
    assert known.items() <= names.items()


def test_weights_are_those_of_m3vit():
    weights = {name: task.loss_weight for name, task in PASCAL_TASKS.items()}
    assert weights == {"semseg": 1, "human_parts": 2, "saliency": 5, "edge": 50, "normals": 10}


def test_colours_are_those_of_pascal_voc():
    """The devkit's own loop, written out."""
    for index in range(256):
        r = g = b = 0
        number = index
        for j in range(8):
            r |= ((number >> 0) & 1) << (7 - j)
            g |= ((number >> 1) & 1) << (7 - j)
            b |= ((number >> 2) & 1) << (7 - j)
            number >>= 3
        assert voc_color(index) == (r, g, b)
    assert len(np.unique([voc_color(i) for i in range(256)], axis=0)) == 256


def test_tasks_come_in_the_order_asked_for():
    assert [task.name for task in select_tasks("scenes", ["edge", "semseg"])] == ["edge", "semseg"]
    assert select_tasks("pascal_context") == tuple(PASCAL_TASKS.values())
    assert select_tasks("nyud") == tuple(NYUD_TASKS.values())


@pytest.mark.parametrize(
    ("data", "names", "words"),
    [
        ("pascal", None, "data.name: got 'pascal', wanted one of"),
        ("pascal_context", ["depth"], "pascal_context has no task 'depth'"),
        ("scenes", ["edges"], "did you mean 'edge'?"),
        ("scenes", ["edge", "edge"], "each at most once"),
        ("scenes", [], "at least one task"),
    ],
)
def test_what_is_not_there(data, names, words):
    with pytest.raises(ValueError) as caught:
        select_tasks(data, names)
    assert words in str(caught.value)


def test_the_nearest_name():
    assert did_you_mean("semsg", PASCAL_TASKS) == ", did you mean 'semseg'?"
    assert did_you_mean("xyz", PASCAL_TASKS) == ""
