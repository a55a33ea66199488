"""Pictures of predictions without truth: one per task at the image's size, and a sheet with all of them, labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from ase_dist.pictures.colors import Size, channels_first, depth_range, paint
from ase_dist.pictures.legend import INK, LINE, MARGIN, PAPER, TASK_GAP, class_legend, draw_legend, font, wrap
from ase_dist.tasks import Task

Pixels = NDArray[np.uint8]  # [H, W, 3]
TILE = 320  # pixels of a tile's longer side on the sheet
MOST_COLUMNS = 3
Values = NDArray[Any]


def task_picture(task: Task, value: Values) -> Image.Image:
    """A prediction in colours at its own size. Of classes the pixels are the ids and the colours are a palette."""
    if task.kind == "classes":
        picture = Image.fromarray(value).convert("P")
        picture.putpalette([channel for color in task.palette for channel in color])
        return picture
    if task.kind in ("mask", "edges"):
        return Image.fromarray(np.rint(value * 255.0).astype(np.uint8))
    value_CHW = channels_first(torch.from_numpy(value))
    height, width = value_CHW.shape[-2:]
    return Image.fromarray(paint(task, value_CHW, (height, width), depth_range(value_CHW)))


def sheet(image: Pixels, predictions: Mapping[str, Values], tasks: Sequence[Task]) -> Image.Image:
    """The image and every prediction under its task's name, at a size for looking at, with the classes that occur."""
    values = {task.name: torch.from_numpy(predictions[task.name]) for task in tasks}
    size = _tile_size(image)
    tiles = [("Image", Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS))]
    tiles += [(task.title, _tile(task, values[task.name], size)) for task in tasks]
    columns = _columns(len(tiles))
    width = columns * (size[1] + TASK_GAP) - TASK_GAP
    legends = [class_legend(task, [values[task.name]]) for task in tasks if task.kind == "classes"]
    lines = [line for legend in legends for line in wrap(legend, width)]
    rows = -(-len(tiles) // columns)
    top = MARGIN + rows * (LINE + size[0] + TASK_GAP)
    page = Image.new("RGB", (width + 2 * MARGIN, top + LINE * len(lines) + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for i, (title, tile) in enumerate(tiles):
        left = MARGIN + i % columns * (size[1] + TASK_GAP)
        above = MARGIN + i // columns * (LINE + size[0] + TASK_GAP)
        draw.text((left + size[1] // 2, above + LINE // 2 - 2), title, fill=INK, font=font(), anchor="mm")
        page.paste(tile, (left, above + LINE))
    for i, line in enumerate(lines):
        draw_legend(draw, line, top + LINE * i)
    return page


def _tile(task: Task, value: Tensor, size: Size) -> Image.Image:
    value_CHW = channels_first(value)
    return Image.fromarray(paint(task, value_CHW, size, depth_range(value_CHW)))


def _tile_size(image: Pixels) -> Size:
    """Height and width of a tile: the image's shape, the longer side ``TILE``, neither below a quarter of that."""
    height, width = image.shape[:2]
    scale = TILE / max(height, width)
    return max(TILE // 4, round(height * scale)), max(TILE // 4, round(width * scale))


def _columns(tiles: int) -> int:
    """Few tiles are one row; more are rows of three, or of two where those leave less empty (four, for one)."""
    if tiles <= MOST_COLUMNS:
        return tiles
    return min(range(MOST_COLUMNS, 1, -1), key=lambda columns: -tiles % columns)
