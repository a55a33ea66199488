"""What all metrics share: one tensor of totals that adds up over images and ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ase_dist.errors import UserError
from ase_dist.tasks import IGNORE, Task

NOTHING = float("nan")  # the value of every score for which no pixel was counted


class Metric(ABC):
    """The scores of one task, accumulated image by image.

    1. ``update`` adds one image to ``totals``, on the device of the prediction and without waiting for it: numbers go
       there as arguments of a kernel (``masked_fill``), not as tensors of the host (``torch.where``).
    2. ``totals`` (float64, 1-D) is additive: the sum of two ranks' totals is that of all their images. Pixels are
       counted in whole numbers, exact up to 2**53. One image with an undefined prediction makes all totals NaN.
    3. ``finish`` waits for what is still being counted elsewhere; only then are ``totals`` whole.
    4. ``images`` counts, in the same way, the images with a labelled pixel.
    5. ``result`` turns totals into named scores; a score for which nothing was counted is NaN, and all are where a
       prediction was undefined. ``why_undefined`` says which and why.
    """

    def __init__(self, task: Task, *, size: int) -> None:
        self.task = task
        self.totals = torch.zeros(size, dtype=torch.float64)
        self.images = torch.zeros((), dtype=torch.float64)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add one image: a decoded ``prediction`` at the size of its ``label`` (forms: ``decode`` and ``tasks``).

        A prediction is undefined where it is NaN, of classes where it is 255; what it is at pixels without a label does
        not matter. Raises UserError where the two differ in size.
        """
        if prediction.shape != label.shape:
            raise UserError(
                f"{self.task.name}: got a prediction {list(prediction.shape)} for a label {list(label.shape)}, wanted "
                "one image, decoded at the size of its label"
            )
        label = label.to(prediction.device)
        is_labelled = self._is_labelled(label)
        prediction = prediction.masked_fill(~is_labelled, 0)
        part = self._count(prediction, label)
        undefined = prediction.isnan() if prediction.is_floating_point() else prediction == IGNORE
        part = part.masked_fill(undefined.any(), NOTHING)
        self.totals = self.totals.to(part.device, non_blocking=True) + part
        self.images = self.images.to(part.device, non_blocking=True) + is_labelled.any()

    def why_undefined(self) -> str | None:
        """A sentence about the scores that are NaN, or None where there is none: for the log of an evaluation."""
        undefined = [name for name, value in self.result().items() if math.isnan(value)]
        if not undefined:
            return None
        why = "some predictions are NaN" if self.totals.isnan().any() else "the labels hold nothing to score it by"
        return f"{self.task.name}: {', '.join(undefined)} {'is' if len(undefined) == 1 else 'are'} NaN: {why}"

    def finish(self) -> None:  # noqa: B027
        """Wait for what is being counted in other processes; most metrics have nothing there."""

    def close(self) -> None:  # noqa: B027
        """End such processes without waiting for what they count."""

    def _is_labelled(self, label: Tensor) -> Tensor:
        """Where ``label`` says something, [H, W] or [1, H, W]."""
        return label != IGNORE if self.task.kind in ("classes", "mask", "edges") else (label != 0).any(0, keepdim=True)

    @abstractmethod
    def _count(self, prediction: Tensor, label: Tensor) -> Tensor:
        """The totals of one image, whose prediction is 0 where there is no label."""

    @abstractmethod
    def result(self) -> dict[str, float]:
        """The scores by name; the class says what each means."""


def count_values(values: Tensor, size: int) -> Tensor:
    """How often each of 0 to ``size`` - 1 occurs, int64 [size]; ``torch.bincount`` would wait for the device."""
    flat = values.flatten()
    return torch.zeros(size, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def ratio(numerator: Tensor, denominator: Tensor) -> float:
    """``numerator / denominator`` of two scalars, NaN where nothing was counted."""
    return float(numerator / denominator) if float(denominator) > 0 else NOTHING
