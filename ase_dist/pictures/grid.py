"""Pictures of predictions: a row per validation image, with truth and prediction of every task side by side.

Classes have the colours of the task table, masks and edges are grey from 0 to 1, a normal n is (n + 1) / 2 in RGB,
depth runs over the truth's own range. Ignored pixels of a truth are hatched grey, because some
class is plain grey. Each row has the shape of its label; the square that the model saw is stretched back to it.
Letters: B images, S side of the square, C channels, H W a label's size, h w a tile's.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ase_dist import imagenet
from ase_dist.files import write_atomic
from ase_dist.pictures.colors import (
    Size,
    Tile,
    channels_first,
    depth_range,
    paint,
    resize_bilinear,
    resize_nearest,
    to_bytes,
)
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
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (imagenet.MEAN, imagenet.STD))
    rows = []
    for i, image_3SS in enumerate(images_B3SS):
        label_height, label_width = labels[tasks[0].name][i].shape[-2:]
        size = max(1, round(width * min(label_height / label_width, MAX_ASPECT))), width
        tiles = [to_bytes(resize_bilinear(channels_first(image_3SS) * std + mean, size))]
        for task in tasks:
            tiles += _truth_and_prediction(task, labels[task.name][i], predictions[task.name][i], size)
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


def _truth_and_prediction(task: Task, truth: Tensor, prediction: Tensor, size: Size) -> list[Tile]:
    """The tile of the truth, hatched where it is ignored, and the tile of the prediction."""
    truth_CHW, prediction_CHW = channels_first(truth), channels_first(prediction)
    is_vector = task.kind in {"normals", "depth"}
    ignored_1HW = (truth_CHW == 0).all(0, keepdim=True) if is_vector else truth_CHW == IGNORE
    value_range = depth_range(truth_CHW[~ignored_1HW]) if task.kind == "depth" else (0.0, 1.0)
    truth_tile = paint(task, truth_CHW.masked_fill(ignored_1HW, 0.0), size, value_range)
    ignored_hw = resize_nearest(ignored_1HW.float(), size)[0].numpy() > 0
    row, column = np.indices(size)
    stripe = (row + column) % HATCH_PERIOD < HATCH_PERIOD // 2
    truth_tile[ignored_hw] = np.asarray(HATCH, dtype=np.uint8)[stripe.astype(int)][ignored_hw]
    return [truth_tile, paint(task, prediction_CHW, size, value_range)]


def _compose(rows: list[list[Tile]], tasks: Sequence[Task], legends: list[Legend], *, width: int) -> Image.Image:
    """Columns of tiles under their titles (the image, then truth and prediction of each task), then the legends."""
    lefts = [MARGIN]  # of the columns
    for _ in tasks:
        truth = lefts[-1] + width + TASK_GAP
        lefts += [truth, truth + width + GAP]
    right = lefts[-1] + width
    tops = np.cumsum([MARGIN + 2 * LINE + GAP, *(row[0].shape[0] + GAP for row in rows)]).tolist()
    lines = [line for legend in legends for line in wrap(legend, right - MARGIN)]
    sheet = Image.new("RGB", (right + MARGIN, tops[-1] + LINE * len(lines) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    text_font, below = font(), MARGIN + LINE + LINE // 2
    draw.text((lefts[0] + width // 2, below), "image", fill=INK, font=text_font, anchor="mm")
    for task, truth, prediction in zip(tasks, lefts[1::2], lefts[2::2], strict=True):
        middle = (truth + prediction + width) // 2
        draw.text((middle, MARGIN + LINE // 2), task.title, fill=INK, font=text_font, anchor="mm")
        draw.text((truth + width // 2, below), "truth", fill=INK, font=text_font, anchor="mm")
        draw.text((prediction + width // 2, below), "prediction", fill=INK, font=text_font, anchor="mm")
    for top, row in zip(tops[:-1], rows, strict=True):
        for left, tile in zip(lefts, row, strict=True):
            sheet.paste(Image.fromarray(tile), (left, top))
    for i, line in enumerate(lines):
        draw_legend(draw, line, tops[-1] + GAP + LINE * i)
    return sheet
