"""From a record to a sample: one random affine warp for the image and all of its labels, straight to the
input size.

The multi-task line that the paper follows (ASTMT, M3ViT) flips, then scales and rotates about the centre on an
unchanged canvas, then resizes to the input size, which interpolates twice. Here the three maps are multiplied and the
original is sampled once: the same pixels are seen (what leaves the canvas lies outside the input too), with less blur,
in one pass. The image is sampled with Pillow's cubic kernel, clipped to 8 bits and without anti-aliasing, as that line
does with OpenCV; evaluation uses the same kernel, so that the model meets the same sharpness as in training.

Points are (x, y) in pixels, y down; the centre of the pixel in row i, column j is (j + 0.5, i + 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ase_dist import imagenet
from ase_dist.data.augmentation import Augmentation, Warp
from ase_dist.data.batch import Record, Sample
from ase_dist.data.files import Array
from ase_dist.data.labels import ignored_label, ignored_value, label_tensor
from ase_dist.image_size import ImageSize
from ase_dist.registries import AUGMENTATIONS
from ase_dist.seeding import generator
from ase_dist.tasks import Task

_FILL = tuple(round(255 * mean) for mean in imagenet.MEAN)
_GAIN_311 = (1 / (255 * np.array(imagenet.STD))).astype(np.float32)[:, None, None]
_OFFSET_311 = (np.array(imagenet.MEAN) / np.array(imagenet.STD)).astype(np.float32)[:, None, None]


class Transform:
    """Makes samples of ``size`` for ``tasks``; ``augmentation`` names what happens to training images."""

    def __init__(self, size: ImageSize | int, *, tasks: Sequence[Task], augmentation: str) -> None:
        self.size = ImageSize.read(size)
        self.tasks = tuple(tasks)
        self.augmentation: Augmentation = AUGMENTATIONS[augmentation]

    def train_sample(self, record: Record, *, seed: int, epoch: int) -> Sample:
        """The training sample of ``record`` in ``epoch``: the same in every process and thread."""
        draws = generator(seed, "augment", epoch, record.index)
        warp = self.augmentation.draw(record, draws)
        return self.warped_sample(record, warp, draws=draws)

    def warped_sample(self, record: Record, warp: Warp, *, draws: torch.Generator | None = None) -> Sample:
        """The training sample of ``record`` under a given warp; without ``draws`` in its own colours.

        1. Warp the image (cubic). 2. Change its colours. 3. Warp the labels (nearest). 4. Depth and normals follow the
        geometry (``Warp``), disparity inversely. What comes from outside the original is the mean colour in the image
        and ignored in every label.
        """
        matrix, offset = warp.source(_shape(record.image), self.size)
        where, outside = _nearest(_shape(record.image), matrix, offset, self.size)
        image = _warp_image(record.image, matrix, offset, self.size)
        if draws is not None and self.augmentation.recolor is not None:
            image = self.augmentation.recolor(image, draws).copy()
            image.reshape(-1, 3)[outside] = _FILL
        labels = {task.name: self._warp_label(task, record, warp, where, outside) for task in self.tasks}
        return Sample(normalise(image), labels, record.index, record.name)

    def eval_sample(self, record: Record) -> Sample:
        """The image resized to ``size``; the labels stay at the image's own size, at which they are scored."""
        matrix, offset = Warp().source(_shape(record.image), self.size)
        image = normalise(_warp_image(record.image, matrix, offset, self.size))
        labels = {
            task.name: label_tensor(task.kind, record.labels[task.name])
            for task in self.tasks
            if task.name in record.labels
        }
        return Sample(image, labels, record.index, record.name)

    def _warp_label(self, task: Task, record: Record, warp: Warp, where: Array, outside: Array) -> Tensor:
        compact = record.labels.get(task.name)
        if compact is None:  # the same bits as a label that is ignored everywhere
            return label_tensor(task.kind, ignored_label(task.kind, self.size), turn=warp.turn)
        warped = np.take(compact.reshape(-1, *compact.shape[2:]), where, axis=0)
        warped[outside] = ignored_value(task.kind)
        if task.kind == "depth":
            if task.inverse_depth:
                warped *= np.float32(warp.scale)
            else:
                warped /= np.float32(warp.scale)
        zoom = warp.scale if self.augmentation.zooms_normals else 1.0
        return label_tensor(task.kind, warped.reshape(*self.size, *compact.shape[2:]), turn=warp.turn, zoom=zoom)


def normalise(image_HW3: Array) -> Tensor:
    """uint8 [H, W, 3] to float32 [3, H, W] with ImageNet's mean and standard deviation."""
    x = image_HW3.transpose(2, 0, 1).astype(np.float32, order="C")
    x *= _GAIN_311
    x -= _OFFSET_311
    return torch.from_numpy(x)


def _shape(image: Array) -> tuple[int, int]:
    return image.shape[0], image.shape[1]


def _warp_image(image: Array, matrix: Array, offset: Array, size: ImageSize) -> Array:
    (a, b), (d, e) = matrix.tolist()
    c, f = offset.tolist()
    picture = Image.fromarray(image).transform(
        (size.width, size.height), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC, fillcolor=_FILL
    )
    return np.asarray(picture)


def _nearest(shape: tuple[int, int], matrix: Array, offset: Array, size: ImageSize) -> tuple[Array, Array]:
    """For each output pixel, row by row, the flat index of the original pixel under it; and which are outside."""
    u, v = np.arange(size.width) + 0.5, np.arange(size.height) + 0.5
    x = np.floor(matrix[0, 0] * u + (matrix[0, 1] * v + offset[0])[:, None]).astype(np.int32).reshape(-1)
    y = np.floor(matrix[1, 0] * u + (matrix[1, 1] * v + offset[1])[:, None]).astype(np.int32).reshape(-1)
    outside = np.flatnonzero((x.view(np.uint32) >= shape[1]) | (y.view(np.uint32) >= shape[0]))  # negative: huge
    where = y.astype(np.intp) * shape[1] + x
    where[outside] = 0
    return where, outside
