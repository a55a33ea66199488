"""The trivial predictor: the best constant that the training labels give, a floor that every model must beat."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ase_dist.errors import UserError
from ase_dist.evaluation.decode import unit_vectors
from ase_dist.tasks import EDGE_POSITIVE_WEIGHT, IGNORE, Task


class ConstantPredictor:
    """Predicts one value for every pixel of every image.

    1. ``update`` adds the labels of one training image to ``totals`` (float64, 1-D, additive over images and ranks).
    2. ``predict`` gives the constant as a decoded prediction:

       - classes: the most frequent class;
       - mask: foreground everywhere, probability 1;
       - edges: the probability with the least weighted cross-entropy, 0.95 e / (0.95 e + 0.05 (1 - e)) for a share e
         of edge pixels (the base rate under the weights of loss and metric);
       - normals: the mean unit normal, rescaled to unit length;
       - depth: the mean depth, which has the least RMSE.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        size = {"classes": task.channels, "normals": 3}.get(task.kind, 2)
        self.totals = torch.zeros(size, dtype=torch.float64)

    def update(self, label: Tensor) -> None:
        """Add the label of one image, in the form that ``tasks`` gives for its kind."""
        part = _count(self.task, label)
        self.totals = self.totals.to(part.device) + part

    def predict(self, height: int, width: int) -> Tensor:
        """The constant for one image, decoded: [H, W], [3, H, W] or [1, H, W] as its kind has it.

        Raises UserError before any valid pixel was seen.
        """
        if not self.totals.any():
            raise UserError(f"{self.task.name}: got no valid label pixel, wanted update() with training labels first")
        constant = _constant(self.task, self.totals)
        return constant[..., None, None].expand(*constant.shape, height, width)


def _count(task: Task, label: Tensor) -> Tensor:
    """Sums over valid pixels: of each class; of each component; (pixels, metres); (pixels, positives)."""
    if task.kind == "classes":
        slot = torch.where(label == IGNORE, task.channels, label.long()).flatten()
        return torch.bincount(slot, minlength=task.channels + 1)[: task.channels].double()
    if task.kind == "normals":
        return unit_vectors(label, dim=0).sum(dim=(1, 2), dtype=torch.float64)
    if task.kind == "depth":
        return torch.stack(((label > 0).sum().double(), label.double().sum()))
    return torch.stack(((label <= 1).sum(), (label == 1).sum())).double()


def _constant(task: Task, totals: Tensor) -> Tensor:
    """The value of one pixel: [] or, for normals and depth, [channels]."""
    if task.kind == "classes":
        return totals.argmax().to(torch.uint8)
    if task.kind == "normals":
        return F.normalize(totals, dim=0).float()
    if task.kind == "depth":
        return (totals[1:] / totals[0]).float()
    if task.kind == "mask":
        return torch.ones((), device=totals.device)
    pixels, edges = totals
    positive = EDGE_POSITIVE_WEIGHT * edges
    negative = (1 - EDGE_POSITIVE_WEIGHT) * (pixels - edges)
    return (positive / (positive + negative)).float()
