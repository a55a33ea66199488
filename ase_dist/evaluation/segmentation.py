"""Scores of class maps: mean IoU, pixel accuracy and the IoU of each class from one confusion matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ase_dist.errors import UserError
from ase_dist.evaluation.metric import NOTHING, Metric, count_values, ratio
from ase_dist.tasks import IGNORE, Task

IDS = 256  # that a uint8 can hold


class ClassesMetric(Metric):
    """The confusion matrix of the whole set (rows: label, columns: prediction), background included.

    - ``miou``: mean over classes of intersection over union, percent. A class that neither any label nor any
      prediction shows has no IoU and is left out.
    - ``accuracy``: pixels with the right class, percent of the valid ones.
    - ``iou/<class name>``: the IoU of each class that has one, percent.

    Pixels labelled 255 are not counted; so an image whose label is 255 throughout (Parts without a person) is skipped.
    ``totals`` end with the pixels of each id out of range, which ``result`` refuses.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task, size=task.channels**2 + IGNORE - task.channels)

    def _count(self, prediction: Tensor, label: Tensor) -> Tensor:
        classes = self.task.channels
        pairs = count_values(label.long() * IDS + prediction.long(), IDS**2).view(IDS, IDS)[:IGNORE, :IGNORE]
        strangers = pairs[classes:].sum(1) + pairs[:, classes:].sum(0)
        return torch.cat((pairs[:classes, :classes].flatten(), strangers)).double()

    def result(self) -> dict[str, float]:
        """``miou``, ``accuracy`` and ``iou/<class name>``, all in percent; UserError for a class id out of range."""
        classes = self.task.channels
        pairs, strangers = self.totals.cpu().split([classes**2, IGNORE - classes])
        if (strangers > 0).any():
            highest = classes + int((strangers > 0).nonzero().max())
            raise UserError(
                f"{self.task.name}: got class ids up to {highest}, wanted 0..{classes - 1} or {IGNORE} (ignored)"
            )
        confusion = pairs.view(classes, -1)
        hits = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - hits
        names = self.task.class_names or tuple(str(i) for i in range(self.task.channels))
        iou = {
            name: 100 * float(hits[i] / union[i]) for i, name in enumerate(names) if float(union[i]) > 0
        }  # classes seen nowhere are left out
        return {
            "miou": sum(iou.values()) / len(iou) if iou else NOTHING,
            "accuracy": 100 * ratio(hits.sum(), confusion.sum()),
            **{f"iou/{name}": value for name, value in iou.items()},
        }
