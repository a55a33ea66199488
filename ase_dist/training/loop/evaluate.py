"""Evaluation over all ranks: every image once, at its original size, metrics merged exactly."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ase_dist import collectives
from ase_dist.agreement import raise_together
from ase_dist.data.batch import EvalBatch
from ase_dist.data.dataset import RecordDataset
from ase_dist.data.labels import ignored_label, label_tensor
from ase_dist.evaluation.constant import ConstantPredictor
from ase_dist.evaluation.decode import decode
from ase_dist.evaluation.metrics import EdgeOds, Metric, build_metric
from ase_dist.evaluation.scores import CLASS_PREFIX, IMAGES, SET_MARK
from ase_dist.models import ModelOutput
from ase_dist.tasks import Task

LOGGER = logging.getLogger("ase_dist")
Results = dict[str, dict[str, float]]  # {task: {metric: value}}
Forward = Callable[[Tensor], ModelOutput]


@dataclass
class Gallery:
    """The first images of an evaluation with labels and predictions, for pictures; empty except on the first rank.

    They stay on the device until ``collect`` at the evaluation's end.
    """

    limit: int
    images: list[Tensor] = field(default_factory=list)
    labels: dict[str, list[Tensor]] = field(default_factory=dict)
    predictions: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        """Whether no further image is kept."""
        return len(self.images) >= self.limit

    def add(self, image_3SS: Tensor, labels: Mapping[str, Tensor], predictions: Mapping[str, Tensor]) -> None:
        """Keep one image, unless ``limit`` is reached."""
        if self.is_full:
            return
        self.images.append(image_3SS)
        for name, label in labels.items():
            self.labels.setdefault(name, []).append(label)
            self.predictions.setdefault(name, []).append(predictions[name])

    def collect(self) -> None:
        """Bring everything to the host."""
        self.images = [image.cpu() for image in self.images]
        for many in (self.labels, self.predictions):
            many.update({name: [tensor.cpu() for tensor in tensors] for name, tensors in many.items()})


class Evaluation(NamedTuple):
    """The model's metrics, and those of the trivial predictors on the same images if there are any."""

    results: Results
    trivial: Results


def evaluate(
    forward: Forward,
    batches: Iterable[tuple[EvalBatch, Exception | None]],
    tasks: Sequence[Task],
    *,
    device: torch.device,
    gallery: Gallery,
    constants: Mapping[str, ConstantPredictor],
    go_on: Callable[[Exception | None], bool],
    edge_ods: EdgeOds | None = None,
    dataset: RecordDataset | None = None,
) -> Evaluation | None:
    """Every task's metrics over the images that have a label of it, equal on all ranks (collective).

    ``images`` in each task's results is how many these are. Where ``dataset``, that of ``loader``, mixes several data
    sets and more than one of them has the task, each score is there for all of them together and as ``<key>@<set>`` for
    each. None where ``go_on`` returned False.

    ``batches`` are those of ``EvalLoader.until_error``, of the same number on all ranks. On an empty one a rank still
    runs the model, on a blank image, because the other ranks wait for it in the collectives of the forward pass, and so
    it does where it cannot read its batch. ``go_on`` is called after every batch, with the error where this rank's
    could not be read; it must return the same on all ranks, or raise on all, as ``raise_unread`` does. ``edge_ods``
    adds the boundary F-measure of edges (not the trivial predictor's), counted in other processes while the model runs.
    The host waits for the device at the end, and for ``go_on`` and ``edge_ods``.
    """
    places = [(task, title) for task in tasks for title in _scored_sets(task, dataset)]
    metrics = {(task.name, title): build_metric(task, edge_ods=edge_ods) for task, title in places}
    values = {
        name: constant.predict(1, 1).to(device)
        for name, constant in constants.items()
        if constant.is_fitted and any(task.name == name for task in tasks)
    }
    trivial = {(task.name, title): build_metric(task) for task, title in places if task.name in values}
    with ExitStack() as closing, torch.no_grad():
        for metric in metrics.values():
            closing.callback(metric.close)
        for batch, error in batches:
            moved = batch.to(device)
            if dataset is None:
                titles = [""] * len(moved.images)
            else:
                titles = [dataset.set_of(index) for index in batch.indices.tolist()]
            blank = moved.images.new_zeros(1, *moved.images.shape[1:])
            logits = forward(moved.images if len(moved.images) else blank).predictions
            for i in range(len(moved.images)):
                labels: dict[str, Tensor] = {}
                predictions: dict[str, Tensor] = {}
                for task in tasks:
                    label, name = moved.labels[task.name][i], task.name
                    if label is None and gallery.is_full:
                        continue
                    labels[name] = unknown_label(task, moved.images[i]) if label is None else label
                    predictions[name] = predict(task, logits[name][i : i + 1], labels[name])
                    if label is not None:
                        place = (name, titles[i] if (name, titles[i]) in metrics else "")
                        metrics[place].update(predictions[name], label)
                        if place in trivial:
                            trivial[place].update(values[name].expand_as(label), label)
                gallery.add(moved.images[i], labels, predictions)
            if not go_on(error):
                return None
        for metric in metrics.values():
            metric.finish()
    gallery.collect()
    return Evaluation(_merged(metrics, device, warns=collectives.rank() == 0), _merged(trivial, device))


def raise_unread(error: Exception | None) -> bool:
    """``go_on`` of an evaluation that nothing but an unreadable image stops: then all ranks raise (collective)."""

    def told() -> None:
        if error is not None:
            raise error

    raise_together(told)
    return True


def fit_constants(
    loader: Iterable[EvalBatch], tasks: Sequence[Task], *, device: torch.device
) -> dict[str, ConstantPredictor]:
    """Predictors that ignore the image (majority class, all salient, base rate, mean normal), fitted on labels.

    Each rank reads its share of ``loader``; the sums are taken over all ranks (collective). Where one cannot read it,
    all raise.
    """
    constants = {task.name: ConstantPredictor(task) for task in tasks}

    def count() -> None:
        for batch in loader:
            for name, constant in constants.items():
                for label in batch.labels[name]:
                    if label is not None:
                        constant.update(label)

    raise_together(count)
    for constant in constants.values():
        constant.totals = collectives.all_reduce_sum(constant.totals.to(device)).to(constant.totals.device)
    return constants


def predict(task: Task, logits_1Chw: Tensor, label: Tensor) -> Tensor:
    """The decoded prediction for one image at the size of its label."""
    height, width = label.shape[-2:]
    return decode(task, logits_1Chw, size=(height, width))[0]


def unknown_label(task: Task, image_3SS: Tensor) -> Tensor:
    """A label of the image's size that says nothing, for pictures of an image without one."""
    size = (image_3SS.shape[-2], image_3SS.shape[-1])
    return label_tensor(task.kind, ignored_label(task.kind, size)).to(image_3SS.device)


def _scored_sets(task: Task, dataset: RecordDataset | None) -> list[str]:
    """The data sets that ``task`` is scored on one by one; "" stands for all where there are not several."""
    titles = [] if dataset is None else [title for title, names in dataset.sets.items() if task.name in names]
    return titles if len(titles) > 1 else [""]


def _merged(metrics: Mapping[tuple[str, str], Metric], device: torch.device, *, warns: bool = False) -> Results:
    """Add up the ranks' totals, and those of the data sets of each task, and compute every score from the sums.

    With ``warns`` scores that are undefined are told.
    """
    for metric in metrics.values():
        counted = torch.cat((metric.images.view(1).to(metric.totals.device), metric.totals))
        counted = collectives.all_reduce_sum(counted.to(device)).to(counted.device)
        metric.images, metric.totals = counted[0], counted[1:]
    results: Results = {}
    for name in dict.fromkeys(name for name, _ in metrics):
        parts = {title: metric for (task, title), metric in metrics.items() if task == name}
        whole = copy.copy(next(iter(parts.values())))
        whole.images = torch.stack([part.images for part in parts.values()]).sum()
        whole.totals = torch.stack([part.totals for part in parts.values()]).sum(dim=0)
        results[name] = _scores(whole)
        for title, part in parts.items() if len(parts) > 1 else ():
            scores = {key: value for key, value in _scores(part).items() if not key.startswith(CLASS_PREFIX)}
            results[name] |= {f"{key}{SET_MARK}{title}": value for key, value in scores.items()}
        if warns and (why := whole.why_undefined()) is not None:
            LOGGER.warning("%s", why)
    return results


def _scores(metric: Metric) -> dict[str, float]:
    return {**metric.result(), IMAGES: float(metric.images)}
