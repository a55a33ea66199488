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

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ase_dist import imagenet
from ase_dist.data.batch import Record, Sample
from ase_dist.data.files import Array
from ase_dist.data.labels import ignored_label, ignored_value, label_tensor
from ase_dist.image_size import ImageSize
from ase_dist.seeding import generator
from ase_dist.tasks import Task

FLIP_PROBABILITY = 0.5
SCALES = (0.75, 1.25)
ANGLES_DEG = (-20.0, 20.0)

_FILL = tuple(round(255 * mean) for mean in imagenet.MEAN)
_GAIN_311 = (1 / (255 * np.array(imagenet.STD))).astype(np.float32)[:, None, None]
_OFFSET_311 = (np.array(imagenet.MEAN) / np.array(imagenet.STD)).astype(np.float32)[:, None, None]


@dataclass(frozen=True)
class Warp:
    """A mirroring about the vertical axis (or none), then a scale and a rotation about the centre of the image.

    ``angle`` in radians turns x towards y, which is clockwise on the screen.
    """

    flip: bool = False
    scale: float = 1.0
    angle: float = 0.0

    @property
    def turn(self) -> Array:
        """[2, 2] orthogonal: what the warp does to directions, and to the (x, y) of normals."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        mirror = -1.0 if self.flip else 1.0
        return np.array([[cos * mirror, -sin], [sin * mirror, cos]])

    def source(self, shape: tuple[int, int], size: ImageSize) -> tuple[Array, Array]:
        """[2, 2] matrix and [2] offset that take a point of the output to the point of the original [H, W]."""
        extent = np.array([shape[1], shape[0]], dtype=np.float64)
        inverse = self.turn.T / self.scale
        matrix = inverse * (extent / np.array([size.width, size.height]))
        return matrix, extent / 2 - inverse @ (extent / 2)


def draw_warp(*, seed: int, epoch: int, index: int) -> Warp:
    """The warp of image ``index`` in ``epoch``: the same in every process and thread."""
    u = torch.rand(3, generator=generator(seed, "augment", epoch, index), dtype=torch.float64).tolist()
    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * u[1]
    degrees = ANGLES_DEG[0] + (ANGLES_DEG[1] - ANGLES_DEG[0]) * u[2]
    return Warp(flip=u[0] < FLIP_PROBABILITY, scale=scale, angle=math.radians(degrees))


class Transform:
    """Makes samples of ``size`` for ``tasks``; without ``augment``, training samples are resized only."""

    def __init__(self, size: ImageSize | int, *, tasks: Sequence[Task], augment: bool) -> None:
        self.size = ImageSize.read(size)
        self.tasks = tuple(tasks)
        self.augment = augment

    def train_sample(self, record: Record, *, seed: int, epoch: int) -> Sample:
        """1. Draw the warp. 2. Warp the image (cubic). 3. Warp labels (nearest) and turn normals.

        What comes from outside the original is the mean colour in the image and ignored in every label. Depth is
        divided by the scale: a picture magnified s times is that of things s times nearer (Eigen et al. 2014).
        """
        warp = draw_warp(seed=seed, epoch=epoch, index=record.index) if self.augment else Warp()
        return self.warped_sample(record, warp)

    def warped_sample(self, record: Record, warp: Warp) -> Sample:
        """The training sample of ``record`` under a given warp."""
        matrix, offset = warp.source(_shape(record.image), self.size)
        image = _warp_image(record.image, matrix, offset, self.size)
        where, outside = _nearest(_shape(record.image), matrix, offset, self.size)
        labels = {task.name: self._warp_label(task, record, warp, where, outside) for task in self.tasks}
        return Sample(image, labels, record.index, record.name)

    def eval_sample(self, record: Record) -> Sample:
        """The image resized to ``size``; the labels stay at the image's own size, at which they are scored."""
        matrix, offset = Warp().source(_shape(record.image), self.size)
        image = _warp_image(record.image, matrix, offset, self.size)
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
            warped /= np.float32(warp.scale)
        return label_tensor(task.kind, warped.reshape(*self.size, *compact.shape[2:]), turn=warp.turn)


def normalise(image_HW3: Array) -> Tensor:
    """uint8 [H, W, 3] to float32 [3, H, W] with ImageNet's mean and standard deviation."""
    x = image_HW3.transpose(2, 0, 1).astype(np.float32, order="C")
    x *= _GAIN_311
    x -= _OFFSET_311
    return torch.from_numpy(x)


def _shape(image: Array) -> tuple[int, int]:
    return image.shape[0], image.shape[1]


def _warp_image(image: Array, matrix: Array, offset: Array, size: ImageSize) -> Tensor:
    (a, b), (d, e) = matrix.tolist()
    c, f = offset.tolist()
    picture = Image.fromarray(image).transform(
        (size.width, size.height), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC, fillcolor=_FILL
    )
    return normalise(np.asarray(picture))


def _nearest(shape: tuple[int, int], matrix: Array, offset: Array, size: ImageSize) -> tuple[Array, Array]:
    """For each output pixel, row by row, the flat index of the original pixel under it; and which are outside."""
    u, v = np.arange(size.width) + 0.5, np.arange(size.height) + 0.5
    x = np.floor(matrix[0, 0] * u + (matrix[0, 1] * v + offset[0])[:, None]).astype(np.int32).reshape(-1)
    y = np.floor(matrix[1, 0] * u + (matrix[1, 1] * v + offset[1])[:, None]).astype(np.int32).reshape(-1)
    outside = np.flatnonzero((x.view(np.uint32) >= shape[1]) | (y.view(np.uint32) >= shape[0]))  # negative: huge
    where = y.astype(np.intp) * shape[1] + x
    where[outside] = 0
    return where, outside
