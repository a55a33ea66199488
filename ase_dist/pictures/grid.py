"""Pictures of predictions: a row per validation image, with truth and prediction of every task side by side.

Classes have the colours of the task table, masks and edges are grey from 0 to 1, a normal n is (n + 1) / 2 in RGB,
depth runs over the truth's own range. Ignored pixels of a truth are hatched grey, for plain grey is a class's colour.
Each row has the shape of its label; the square that the model saw is stretched back to it. Letters: B images, S side
of the square, C channels, H W a label's size, h w a tile's.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ase_dist.files import write_atomic
from ase_dist.pictures.colors import Size, Tile, channels_first, colors, crisp, depth_range, paint, smooth
from ase_dist.pictures.legend import (
    GAP,
    INK,
    LINE,
    MARGIN,
    PAPER,
    TASK_GAP,
    Legend,
    class_legend,
    draw_legend,
    font,
    wrap,
)
from ase_dist.tasks import IGNORE, Task

PerImage = Tensor | Sequence[Tensor]  # [B, ...], or B tensors of different sizes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HATCH = ((112, 112, 112), (156, 156, 156))  # the two greys of ignored pixels
HATCH_PERIOD = 8  # pixels
MAX_ASPECT = 1.5  # a taller image is squeezed to this height over width


def prediction_grid(
    images_B3SS: Tensor,
    labels: Mapping[str, PerImage],
    predictions: Mapping[str, PerImage],
    tasks: Sequence[Task],
    *,
    width: int = 176,
) -> Image.Image:
    """The grid as an RGB picture; ``width`` is a tile's, in pixels.

    ``images`` are normalised with ImageNet's mean and deviation. ``labels`` are as in ``ase_dist.tasks`` at any size;
    ``predictions`` are decoded and of any size: class ids [H, W], probabilities [H, W], unit normals [3, H, W], metres
    [1, H, W].
    """
    rows = []
    for i, image_3SS in enumerate(images_B3SS):
        size = _tile_size(labels[tasks[0].name][i], width)
        tiles = [_image_tile(image_3SS, size)]
        for task in tasks:
            tiles += _pair(task, labels[task.name][i], predictions[task.name][i], size)
        rows.append(tiles)
    legends = [
        class_legend(task, [*labels[task.name], *predictions[task.name]]) for task in tasks if task.kind == "classes"
    ]
    return _compose(rows, tasks, legends, width=width)


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write a picture as a PNG file, whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Tiles


def _tile_size(label: Tensor, width: int) -> Size:
    height, label_width = label.shape[-2:]
    return max(1, round(width * min(height / label_width, MAX_ASPECT))), width


def _image_tile(image_3SS: Tensor, size: Size) -> Tile:
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return colors(smooth(channels_first(image_3SS) * std + mean, size))


def _pair(task: Task, truth: Tensor, prediction: Tensor, size: Size) -> list[Tile]:
    """The tile of the truth, hatched where it is ignored, and the tile of the prediction."""
    truth_CHW, prediction_CHW = channels_first(truth), channels_first(prediction)
    is_vector = task.kind in {"normals", "depth"}
    ignored_1HW = (truth_CHW == 0).all(0, keepdim=True) if is_vector else truth_CHW == IGNORE
    value_range = depth_range(truth_CHW[~ignored_1HW]) if task.kind == "depth" else (0.0, 1.0)
    truth_tile = paint(task, truth_CHW.masked_fill(ignored_1HW, 0.0), size, value_range)
    ignored_hw = crisp(ignored_1HW.float(), size)[0].numpy() > 0
    truth_tile[ignored_hw] = _hatch(size)[ignored_hw]
    return [truth_tile, paint(task, prediction_CHW, size, value_range)]


def _hatch(size: Size) -> Tile:
    """Diagonal stripes of the two greys."""
    row, column = np.indices(size)
    stripe = (row + column) % HATCH_PERIOD < HATCH_PERIOD // 2
    return np.array(np.asarray(HATCH, dtype=np.uint8)[stripe.astype(int)])


# ---------------------------------------------------------------------------------------------------------------------
# The sheet


def _compose(rows: list[list[Tile]], tasks: Sequence[Task], legends: list[Legend], *, width: int) -> Image.Image:
    """Tiles in columns under their titles, the legends below them."""
    lefts = _lefts(len(tasks), width)
    right = lefts[-1] + width
    tops = np.cumsum([MARGIN + 2 * LINE + GAP, *(row[0].shape[0] + GAP for row in rows)]).tolist()
    lines = [line for legend in legends for line in wrap(legend, right - MARGIN)]
    sheet = Image.new("RGB", (right + MARGIN, tops[-1] + LINE * len(lines) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    _titles(draw, tasks, lefts, width)
    for top, row in zip(tops[:-1], rows, strict=True):
        for left, tile in zip(lefts, row, strict=True):
            sheet.paste(Image.fromarray(tile), (left, top))
    for i, line in enumerate(lines):
        draw_legend(draw, line, tops[-1] + GAP + LINE * i)
    return sheet


def _lefts(tasks: int, width: int) -> list[int]:
    """The left edge of the image's column, then of truth and prediction of every task."""
    lefts = [MARGIN]
    for _ in range(tasks):
        truth = lefts[-1] + width + TASK_GAP
        lefts += [truth, truth + width + GAP]
    return lefts


def _titles(draw: ImageDraw.ImageDraw, tasks: Sequence[Task], lefts: list[int], width: int) -> None:
    face, below = font(), MARGIN + LINE + LINE // 2
    draw.text((lefts[0] + width // 2, below), "image", fill=INK, font=face, anchor="mm")
    for task, truth, prediction in zip(tasks, lefts[1::2], lefts[2::2], strict=True):
        middle = (truth + prediction + width) // 2
        draw.text((middle, MARGIN + LINE // 2), task.title, fill=INK, font=face, anchor="mm")
        draw.text((truth + width // 2, below), "truth", fill=INK, font=face, anchor="mm")
        draw.text((prediction + width // 2, below), "prediction", fill=INK, font=face, anchor="mm")
