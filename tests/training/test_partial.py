"""Tasks without labels in a batch, on a rank or in a whole step: losses, gradients, evaluation, trivial predictors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ase_dist.data.batch import EvalBatch
from ase_dist.evaluation.metrics import build_metric
from ase_dist.models import ModelOutput
from ase_dist.tasks import NYUD_TASKS, PASCAL_TASKS, Task
from ase_dist.training.loop.evaluate import Gallery, evaluate, fit_constants, predict
from ase_dist.training.loop.losses import label_counts, task_losses
from ase_dist.training.process.runtime import World
from ase_dist.training.record.reports import MicroStep, SpanStatistics, result_table
from ase_dist.training.state.history import gain
from tests.training.test_losses import SIZE, ignore_all, make_batch, make_label, reference

pytestmark = pytest.mark.single_gpu

TASKS = (*PASCAL_TASKS.values(), NYUD_TASKS["depth"])
IMAGES = 4


@pytest.mark.parametrize("ranks, micro_steps", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_images_without_a_label_add_nothing_at_any_world_and_accumulation(
    task: Task, ranks: int, micro_steps: int
) -> None:
    """Only image 3 has a label, so most ranks and micro-steps have none; the loss is that of image 3 alone."""
    logits, labels = make_batch(IMAGES, seed=5)
    label = labels[task.name].clone()
    label[:3] = ignore_all(label[:3])
    leaf = logits[task.name].requires_grad_()

    def parts(tensor: Tensor) -> list[Tensor]:
        return list(tensor.chunk(ranks * micro_steps))

    counts = torch.stack([label_counts({task.name: part}, [task]) for part in parts(label)]).mean(dim=0)
    losses = [
        task_losses({task.name: one}, {task.name: other}, [task], counts)[task.name]
        for one, other in zip(parts(leaf), parts(label), strict=True)
    ]
    mean = torch.stack(losses).mean()
    assert float(mean.detach()) == pytest.approx(reference(task, leaf[3:].detach(), label[3:]), rel=1e-5)
    mean.backward()
    alone = leaf[3:].detach().clone().requires_grad_()
    task_losses({task.name: alone}, {task.name: label[3:]}, [task], label_counts({task.name: label[3:]}, [task]))[
        task.name
    ].backward()
    assert leaf.grad is not None and alone.grad is not None
    assert not leaf.grad[:3].any() and torch.allclose(leaf.grad[3:], alone.grad, rtol=1e-5, atol=1e-9)


# --- evaluation ------------------------------------------------------------------------------------------------------


def eval_batches(tasks: tuple[Task, ...]) -> tuple[list[EvalBatch], dict[str, list[Tensor | None]]]:
    """Three batches of two images; image i lacks the label of task (i mod tasks)."""
    g = torch.Generator().manual_seed(1)
    every: dict[str, list[Tensor | None]] = {
        task.name: [None if i % len(tasks) == n else make_label(task, 1, g)[0] for i in range(6)]
        for n, task in enumerate(tasks)
    }
    images = torch.randn(6, 3, SIZE, SIZE, generator=g)
    batches = [
        EvalBatch(
            images[i : i + 2],
            {name: labels[i : i + 2] for name, labels in every.items()},
            torch.arange(i, i + 2),
            [str(i), str(i + 1)],
        )
        for i in (0, 2, 4)
    ]
    return batches, every


def unread(batches: list[EvalBatch]) -> list[tuple[EvalBatch, Exception | None]]:
    """As ``EvalLoader.until_error`` gives them where all can be read."""
    return [(batch, None) for batch in batches]


def forward_of(tasks: tuple[Task, ...], images: Tensor) -> dict[str, Tensor]:
    """Something that depends on the image."""
    return {
        task.name: images.mean(1, keepdim=True) * torch.linspace(-1, 1, task.channels)[:, None, None] for task in tasks
    }


@pytest.mark.parametrize("limit", (0, 3))
def test_a_task_is_scored_on_the_images_that_have_it(limit: int) -> None:
    batches, every = eval_batches(TASKS)
    empty = torch.zeros(0)

    def forward(images: Tensor) -> ModelOutput:
        return ModelOutput(forward_of(TASKS, images), empty.sum(), empty, empty)

    device = torch.device("cpu")
    constants = fit_constants(batches, TASKS, device=device)
    gallery = Gallery(limit=limit)
    found = evaluate(
        forward, unread(batches), TASKS, device=device, gallery=gallery, constants=constants, go_on=lambda error: True
    )
    assert found is not None
    for task in TASKS:
        metric, images = build_metric(task), 0
        for i, label in enumerate(every[task.name]):
            if label is not None:
                logits = forward_of((task,), batches[i // 2].images[i % 2 : i % 2 + 1])[task.name]
                metric.update(predict(task, logits, label), label)
                images += 1
        assert found.results[task.name] == {**metric.result(), "images": images} and images == 5
        assert found.trivial[task.name]["images"] == images
    shown = {name: len(labels) for name, labels in gallery.labels.items()}
    assert shown == ({task.name: limit for task in TASKS} if limit else {})


def test_a_task_without_any_label_is_not_a_number_and_decides_nothing() -> None:
    tasks = (PASCAL_TASKS["semseg"], PASCAL_TASKS["normals"])
    batches, _ = eval_batches(tasks)
    for batch in batches:
        batch.labels["normals"] = [None] * len(batch.names)
    device = torch.device("cpu")
    constants = fit_constants(batches, tasks, device=device)
    empty = torch.zeros(0)
    found = evaluate(
        lambda images: ModelOutput(forward_of(tasks, images), empty.sum(), empty, empty),
        unread(batches),
        tasks,
        device=device,
        gallery=Gallery(limit=0),
        constants=constants,
        go_on=lambda error: True,
    )
    assert found is not None
    assert math.isnan(found.results["normals"]["mean"]) and found.results["normals"]["images"] == 0
    assert found.trivial.keys() == {"semseg"}
    assert math.isfinite(gain(tasks, found.results, found.trivial))


# --- records ---------------------------------------------------------------------------------------------------------


def test_the_loss_that_is_logged_is_the_mean_over_the_steps_that_have_a_label() -> None:
    tasks = (PASCAL_TASKS["semseg"], PASCAL_TASKS["normals"], PASCAL_TASKS["edge"])
    span = SpanStatistics(tasks, World(0, 1, 0, 1, torch.device("cpu"), False), layers=[])
    empty = torch.zeros(0)
    for semseg, labelled in ((1.0, (1, 1, 0)), (0.0, (0, 1, 0)), (3.0, (1, 1, 0))):
        losses = {"semseg": torch.tensor(semseg), "normals": torch.tensor(0.5), "edge": torch.tensor(0.0)}
        numbers = (torch.tensor(semseg), torch.tensor(0.0), empty, empty)
        span.add(MicroStep(losses, *numbers, ["a"], labelled_t=torch.tensor(labelled)))
    span.seconds = 1.0
    assert span.take()["losses"] == pytest.approx({"semseg": 2.0, "normals": 0.5})


def test_the_table_says_how_many_images_each_task_is_scored_on() -> None:
    tasks = (PASCAL_TASKS["semseg"], PASCAL_TASKS["normals"])
    results = {"semseg": {"miou": 5.0, "images": 7.0}, "normals": {"mean": 9.0, "images": 11.0}}
    lines = result_table("step 1", tasks, results, {}, None).splitlines()
    found = [line.split()[-1] for line in lines if "mIoU" in line or "mean angle" in line or "metric" in line]
    assert found == ["images", "7", "11"]
    results["normals"]["images"] = 7.0
    assert "images" not in result_table("step 1", tasks, results, {}, None)
