"""What all metrics share: one tensor of totals that adds up over images and ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ase_dist.errors import UserError
from ase_dist.tasks import Task

NOTHING = float("nan")  # the value of every score for which no pixel was counted


class Metric(ABC):
    """The scores of one task, accumulated image by image.

    1. ``update`` adds one image to ``totals``, on the device of the prediction and without waiting for it.
    2. ``totals`` (float64, 1-D) is additive: the sum of two ranks' totals is that of all their images. Pixels are
       counted in whole numbers, exact up to 2**53.
    3. ``finish`` waits for what is still being counted elsewhere; only then are ``totals`` whole.
    4. ``result`` turns totals into named scores; a score for which nothing was counted is NaN.
    """

    def __init__(self, task: Task, *, size: int) -> None:
        self.task = task
        self.totals = torch.zeros(size, dtype=torch.float64)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add one image: a decoded ``prediction`` at the size of its ``label`` (forms: ``decode`` and ``tasks``).

        Raises UserError where the two differ in size.
        """
        if prediction.shape != label.shape:
            raise UserError(
                f"{self.task.name}: got a prediction {list(prediction.shape)} for a label {list(label.shape)}, wanted "
                "one image, decoded at the size of its label"
            )
        part = self._count(prediction, label.to(prediction.device))
        self.totals = self.totals.to(part.device) + part

    def finish(self) -> None:  # noqa: B027
        """Wait for whatever counts in other processes; most metrics have nothing there."""

    def close(self) -> None:  # noqa: B027
        """End such processes without waiting for what they count."""

    @abstractmethod
    def _count(self, prediction: Tensor, label: Tensor) -> Tensor:
        """The totals of one image."""

    @abstractmethod
    def result(self) -> dict[str, float]:
        """The scores by name; the class says what each means."""


def ratio(numerator: Tensor, denominator: Tensor) -> float:
    """``numerator / denominator`` of two scalars, NaN where nothing was counted."""
    return float(numerator / denominator) if float(denominator) > 0 else NOTHING
