"""The trivial predictor: the best constant that the training labels give, a floor that every model must beat."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ase_dist.errors import UserError
from ase_dist.evaluation.decode import unit_vectors
from ase_dist.evaluation.metric import count_values
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
        if self.task.kind == "classes":  # pixels of each class
            slot = label.long().masked_fill(label == IGNORE, self.task.channels)
            counts = count_values(slot, self.task.channels + 1)[: self.task.channels].double()
        elif self.task.kind == "normals":  # the sum of each component
            counts = unit_vectors(label, dim=0).sum(dim=(1, 2), dtype=torch.float64)
        elif self.task.kind == "depth":  # valid pixels, metres
            counts = torch.stack(((label > 0).sum().double(), label.double().sum()))
        else:  # valid pixels, positive pixels
            counts = torch.stack(((label <= 1).sum(), (label == 1).sum())).double()
        self.totals = self.totals.to(counts.device) + counts

    @property
    def is_fitted(self) -> bool:
        """Whether any valid pixel was seen (for a mask, any label)."""
        return bool(self.totals.any())

    def predict(self, height: int, width: int) -> Tensor:
        """The constant for one image, decoded: [H, W], [3, H, W] or [1, H, W] as its kind has it.

        Raises UserError before any valid pixel was seen.
        """
        if not self.is_fitted:
            raise UserError(f"{self.task.name}: got no valid label pixel, wanted update() with training labels first")
        if self.task.kind == "classes":
            constant = self.totals.argmax().to(torch.uint8)
        elif self.task.kind == "normals":
            constant = F.normalize(self.totals, dim=0).float()
        elif self.task.kind == "depth":
            constant = (self.totals[1:] / self.totals[0]).float()
        elif self.task.kind == "mask":
            constant = torch.ones((), device=self.totals.device)
        else:
            pixels, edges = self.totals
            positive = EDGE_POSITIVE_WEIGHT * edges
            negative = (1 - EDGE_POSITIVE_WEIGHT) * (pixels - edges)
            constant = (positive / (positive + negative)).float()
        return constant[..., None, None].expand(*constant.shape, height, width)
