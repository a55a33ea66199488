"""What is passed from a data set to the training loop: records, samples and batches.

B images, h w the size that the model sees; label forms as in ``tasks.py``'s table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ase_dist.data.files import Array
from ase_dist.image_size import ImageSize


@dataclass(frozen=True)
class Record:
    """One decoded image at its original size: uint8 [H, W, 3], and compact labels (``labels.py``) by task.

    A task for which the image has no label (``data.partial``) is not in ``labels``.
    """

    index: int
    name: str
    image: Array
    labels: Mapping[str, Array]


@dataclass
class Sample:
    """One image ready for the model: float32 [3, h, w], ImageNet-normalised, with a label for each task.

    Labels are [..., h, w] in training, where a label that the image lacks is ignored everywhere, and of the image's own
    size in evaluation, where it is not in ``labels``.
    """

    image: Tensor
    labels: dict[str, Tensor]
    index: int
    name: str


@dataclass
class Batch:
    """Images [B, 3, h, w], labels [B, ...] by task, indices int64 [B] into the list, names of the images."""

    images: Tensor
    labels: dict[str, Tensor]
    indices: Tensor
    names: list[str]

    def to(self, device: torch.device | str) -> Batch:
        """A copy on ``device``; asynchronous from pinned memory."""
        moved = {task: label.to(device, non_blocking=True) for task, label in self.labels.items()}
        images = self.images.to(device, non_blocking=True)
        return Batch(images, moved, self.indices.to(device, non_blocking=True), self.names)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory (also called by torch's DataLoader)."""
        pinned = {task: label.pin_memory() for task, label in self.labels.items()}
        return Batch(self.images.pin_memory(), pinned, self.indices.pin_memory(), self.names)


@dataclass
class EvalBatch:
    """As Batch, with a list of B labels of each image's own size by task; B is 0 on a rank with nothing left.

    A label is None where the image has none for the task.
    """

    images: Tensor
    labels: dict[str, list[Tensor | None]]
    indices: Tensor
    names: list[str]

    def to(self, device: torch.device | str) -> EvalBatch:
        """A copy on ``device``; asynchronous from pinned memory."""
        moved = self._each_label(lambda label: label.to(device, non_blocking=True))
        images = self.images.to(device, non_blocking=True)
        return EvalBatch(images, moved, self.indices.to(device, non_blocking=True), self.names)

    def pin_memory(self) -> EvalBatch:
        """A copy in page-locked memory (also called by torch's DataLoader)."""
        pinned = self._each_label(Tensor.pin_memory)
        return EvalBatch(self.images.pin_memory(), pinned, self.indices.pin_memory(), self.names)

    def _each_label(self, change: Callable[[Tensor], Tensor]) -> dict[str, list[Tensor | None]]:
        return {
            task: [None if label is None else change(label) for label in many] for task, many in self.labels.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        """One flat tensor per task: each tensor sent by a loader process holds a file descriptor open."""
        there = {task: [label for label in many if label is not None] for task, many in self.labels.items()}
        shapes = {
            task: [None if label is None else label.shape for label in many] for task, many in self.labels.items()
        }
        flat = {task: torch.cat([label.reshape(-1) for label in many]) for task, many in there.items() if many}
        return {**self.__dict__, "labels": flat, "shapes": shapes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        flat, shapes = state.pop("labels"), state.pop("shapes")
        self.__dict__.update(state)
        self.labels = {task: [None] * len(shapes[task]) for task in shapes}
        for task, values in flat.items():  # tasks with no labels are not in it
            places = [i for i, shape in enumerate(shapes[task]) if shape is not None]
            pieces = values.split([shapes[task][i].numel() for i in places])
            for i, piece in zip(places, pieces, strict=True):
                self.labels[task][i] = piece.view(shapes[task][i])


def collate(samples: Sequence[Sample], tasks: Sequence[str]) -> Batch:
    """Samples stacked to a batch.

    Through numpy: torch would start its own pool of threads in whichever thread prepares the batch.
    """
    labels = {task: _stack([sample.labels[task] for sample in samples]) for task in tasks}
    return Batch(_stack([sample.image for sample in samples]), labels, _indices(samples), _names(samples))


def collate_eval(samples: Sequence[Sample], tasks: Sequence[str], *, size: ImageSize) -> EvalBatch:
    """Samples as a batch, possibly an empty one; labels keep their own sizes."""
    images = _stack([sample.image for sample in samples]) if samples else torch.zeros(0, 3, *size)
    labels = {task: [sample.labels.get(task) for sample in samples] for task in tasks}
    return EvalBatch(images, labels, _indices(samples), _names(samples))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.from_numpy(np.stack([tensor.numpy() for tensor in tensors]))


def _indices(samples: Sequence[Sample]) -> Tensor:
    return torch.tensor([sample.index for sample in samples], dtype=torch.int64)


def _names(samples: Sequence[Sample]) -> list[str]:
    return [sample.name for sample in samples]
