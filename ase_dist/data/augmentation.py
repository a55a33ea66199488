"""What happens to a training image: the presets of ``data.augmentation``, and the geometry of a warp.

A preset draws from the generator of (seed, epoch, image) alone, so that a sample is the same in every process. It
gives one affine ``Warp`` for the image and all of its labels, and may change the colours. What the published code
does:

| preset  | zoom                     | further                              | normals under zoom | code               |
|---------|--------------------------|--------------------------------------|--------------------|--------------------|
| eigen   | 0.75 to 1.25             | rotation by up to 20 degrees         | agree with depth   | as astmt           |
| astmt   | 0.75 to 1.25             | rotation by up to 20 degrees         | unchanged          | ASTMT, M3ViT       |
| atrc    | 0.5 to 2                 | a crop at random, colours            | unchanged          | ATRC, InvPT        |
| mtan    | 1, 1.2 or 1.5            | a crop at random                     | unchanged          | MTAN, LibMTL       |
| none    |                          |                                      |                    |                    |

All but ``none`` mirror half of the images, and divide depth by the zoom. A program adds its own:
``ase_dist.registries.AUGMENTATIONS["mine"] = Augmentation(...)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Generator

from ase_dist.data.batch import Record
from ase_dist.data.files import Array
from ase_dist.image_size import ImageSize
from ase_dist.tasks import IGNORE

FLIP_PROBABILITY = 0.5
SCALES = (0.75, 1.25)  # of ASTMT
ANGLES_DEG = (-20.0, 20.0)
ATRC_SCALES = (0.5, 2.0)
ATRC_LARGEST_CLASS = 0.75  # share of a crop
ATRC_CROPS = 10  # tried for one without a class that is larger
MTAN_SCALES = (1.0, 1.2, 1.5)


@dataclass(frozen=True)
class Warp:
    """A mirroring about the vertical axis (or none), a scale and a rotation about a point, which becomes the centre.

    ``angle`` in radians turns x towards y, which is clockwise on the screen. ``center`` is the point of the image that
    comes to the centre of the output, (x, y) in shares of its width and height.

    Depth and normals under a zoom by s: let a camera of focal length f see the point (X, Y, Z) at x = f X / Z from its
    principal point. The magnified picture shows it at s x, and with the depth Z / s (a thing s times nearer, Eigen et
    al. 2014) the same camera places it at s x (Z / s) / f = X: the warp maps points by diag(1, 1, 1 / s). Normals go
    by the inverse transpose, diag(1, 1, s): n_z is multiplied by s and the vector made a unit vector again (Eigen and
    Fergus 2015), whichever way z points. Mirroring and rotation are orthogonal, so they turn the (x, y) of normals as
    they turn points (``turn``); a crop moves the principal point and changes neither.
    """

    flip: bool = False
    scale: float = 1.0
    angle: float = 0.0
    center: tuple[float, float] = (0.5, 0.5)

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
        return matrix, np.array(self.center) * extent - inverse @ (extent / 2)


@dataclass(frozen=True)
class Augmentation:
    """A preset: ``draw`` makes the warp of an image, ``recolor`` changes the colours of the warped one.

    Both draw from the generator of the image. ``recolor`` takes and gives uint8 [H, W, 3]. ``zooms_normals``: normals
    follow the zoom as depth does; the published protocols leave them.
    """

    draw: Callable[[Record, Generator], Warp]
    recolor: Callable[[Array, Generator], Array] | None = None
    zooms_normals: bool = True


def no_warp(record: Record, generator: Generator) -> Warp:
    """The whole image, resized."""
    return Warp()


def turn_and_zoom(record: Record, generator: Generator) -> Warp:
    """Mirrored or not, zoomed and rotated about the centre on an unchanged canvas (ASTMT, M3ViT)."""
    u = _uniform(3, generator)
    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * u[1]
    degrees = ANGLES_DEG[0] + (ANGLES_DEG[1] - ANGLES_DEG[0]) * u[2]
    return Warp(flip=u[0] < FLIP_PROBABILITY, scale=scale, angle=math.radians(degrees))


def crop_of_many_scales(record: Record, generator: Generator) -> Warp:
    """ATRC's: zoomed by 0.5 to 2; of a larger picture a crop at random, round a smaller one a margin that is ignored.

    A crop in which one class of ``semseg`` has more than three quarters of the labelled pixels is drawn again, up to
    ten times. A zoom of 1 is the picture as evaluation sees it, at ``data.size``; ATRC evaluates
    pictures at their own size and zooms from there.
    """
    flip, share = _uniform(2, generator)
    scale = ATRC_SCALES[0] + (ATRC_SCALES[1] - ATRC_SCALES[0]) * share
    ids = record.labels.get("semseg")
    for _ in range(ATRC_CROPS):
        free = max(0.0, 1 - 1 / scale)  # of the picture's width and height, outside the crop
        x, y = (0.5 + free * (u - 0.5) for u in _uniform(2, generator))
        if ids is None or not _has_ruling_class(ids, x, y, 1 / scale):
            break
    return Warp(flip=flip < FLIP_PROBABILITY, scale=scale, center=(x, y))


def crop_of_few_scales(record: Record, generator: Generator) -> Warp:
    """MTAN's: a crop of 1, 1 / 1.2 or 1 / 1.5 of the picture's sides at a whole pixel, mirrored or not."""
    flip, which, *places = _uniform(4, generator)
    scale = MTAN_SCALES[int(which * len(MTAN_SCALES))]
    center = []
    for u, length in zip(places, (record.image.shape[1], record.image.shape[0]), strict=True):
        window = length / scale
        start = int(u * (int(length - window + 1e-6) + 1))
        center.append((start + window / 2) / length)
    return Warp(flip=flip < FLIP_PROBABILITY, scale=scale, center=(center[0], center[1]))


def distort_colors(image_HW3: Array, generator: Generator) -> Array:
    """ATRC's photometric distortion, each with probability one half, of a uint8 picture.

    1. Brightness: up to 32 levels are added. 2. Contrast: all times 0.5 to 1.5, now or at the end. 3. Saturation in
    HSV times 0.5 to 1.5. 4. Hue turned by up to 36 degrees. What is called contrast there is torchvision's brightness,
    and its saturation is another (a blend with grey).
    """
    from torchvision.transforms.v2 import functional as tv

    level, contrast, saturation, hue, *chosen = _uniform(9, generator)
    does_level, does_contrast, does_saturation, does_hue, is_contrast_first = (u < 0.5 for u in chosen)
    if does_level:
        levels = np.arange(256) + (64 * level - 32)
        image_HW3 = levels.clip(0, 255).astype(np.uint8)[image_HW3]
    picture = Image.fromarray(image_HW3)
    if does_contrast and is_contrast_first:
        picture = tv.adjust_brightness(picture, 0.5 + contrast)
    if does_saturation:
        picture = Image.fromarray(_saturated(np.asarray(picture), 0.5 + saturation))
    if does_hue:
        picture = tv.adjust_hue(picture, 0.2 * hue - 0.1)
    if does_contrast and not is_contrast_first:
        picture = tv.adjust_brightness(picture, 0.5 + contrast)
    return np.asarray(picture)


EIGEN = Augmentation(turn_and_zoom)
ASTMT = Augmentation(turn_and_zoom, zooms_normals=False)
ATRC = Augmentation(crop_of_many_scales, distort_colors, zooms_normals=False)
MTAN = Augmentation(crop_of_few_scales, zooms_normals=False)
NONE = Augmentation(no_warp)


def _uniform(count: int, generator: Generator) -> list[float]:
    return torch.rand(count, generator=generator, dtype=torch.float64).tolist()


def _has_ruling_class(ids_HW: Array, x: float, y: float, share: float) -> bool:
    """Whether one class has more than ``ATRC_LARGEST_CLASS`` of the labelled pixels in a crop round (x, y)."""
    height, width = ids_HW.shape
    rows, columns = (
        slice(max(0, round(n * (at - share / 2))), max(1, round(n * (at + share / 2))))
        for n, at in ((height, y), (width, x))
    )
    counts = np.bincount(ids_HW[rows, columns].reshape(-1), minlength=IGNORE + 1)[:IGNORE]
    return bool(counts.max() > ATRC_LARGEST_CLASS * counts.sum())  # false where no pixel is labelled


def _saturated(image_HW3: Array, factor: float) -> Array:
    """HSV's saturation times ``factor``, at most 1; hue and value stay.

    With value v = max(r, g, b) and saturation (v - min) / v, every channel c becomes v - (v - c) f.
    """
    c = image_HW3.astype(np.float32)
    value = c.max(axis=2, keepdims=True)
    most = value / np.maximum(value - c.min(axis=2, keepdims=True), 1)
    return np.rint(value - (value - c) * np.minimum(np.float32(factor), most)).clip(0, 255).astype(np.uint8)
