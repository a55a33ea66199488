"""Pictures of predictions without truth: one per task at the image's size, and a sheet with all of them, labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ase_dist.pictures.colors import channels_first, depth_range, paint
from ase_dist.pictures.legend import INK, LINE, MARGIN, PAPER, TASK_GAP, class_legend, draw_legend, font, wrap
from ase_dist.tasks import Task

Pixels = NDArray[np.uint8]  # [H, W, 3]
TILE = 320  # pixels of a tile's longer side on the sheet; no side is below a quarter of it
MAX_COLUMNS = 3
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
    """The image and every prediction under its task's name, and a legend of the classes that occur."""
    scale = TILE / max(image.shape[:2])
    tile_height, tile_width = (max(TILE // 4, round(side * scale)) for side in image.shape[:2])
    values = {task.name: torch.from_numpy(predictions[task.name]) for task in tasks}
    tiles = [("Image", Image.fromarray(image).resize((tile_width, tile_height), Image.Resampling.LANCZOS))]
    for task in tasks:
        value_CHW = channels_first(values[task.name])
        pixels = paint(task, value_CHW, (tile_height, tile_width), depth_range(value_CHW))
        tiles.append((task.title, Image.fromarray(pixels)))
    columns = _columns(len(tiles))
    width = columns * (tile_width + TASK_GAP) - TASK_GAP
    legends = [class_legend(task, [values[task.name]]) for task in tasks if task.kind == "classes"]
    lines = [line for legend in legends for line in wrap(legend, width)]
    rows = -(-len(tiles) // columns)
    top = MARGIN + rows * (LINE + tile_height + TASK_GAP)
    page = Image.new("RGB", (width + 2 * MARGIN, top + LINE * len(lines) + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for i, (title, tile) in enumerate(tiles):
        left = MARGIN + i % columns * (tile_width + TASK_GAP)
        above = MARGIN + i // columns * (LINE + tile_height + TASK_GAP)
        draw.text((left + tile_width // 2, above + LINE // 2 - 2), title, fill=INK, font=font(), anchor="mm")
        page.paste(tile, (left, above + LINE))
    for i, line in enumerate(lines):
        draw_legend(draw, line, top + LINE * i)
    return page


def _columns(tiles: int) -> int:
    """Up to three tiles make one row; more make rows of three, or of two where that leaves fewer empty places."""
    if tiles <= MAX_COLUMNS:
        return tiles
    return min(range(MAX_COLUMNS, 1, -1), key=lambda columns: -tiles % columns)
