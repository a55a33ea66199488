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

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from ase_dist.files import write_atomic
from ase_dist.tasks import IGNORE, Task

PerImage = Tensor | Sequence[Tensor]  # [B, ...], or B tensors of different sizes
Tile = NDArray[np.uint8]  # [h, w, 3]
Size = tuple[int, int]  # h, w

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HATCH = ((112, 112, 112), (156, 156, 156))  # the two greys of ignored pixels
HATCH_PERIOD = 8  # pixels
MAX_ASPECT = 1.5  # a taller image is squeezed to this height over width

MARGIN = 12  # pixels, like all that follow
GAP = 4  # between truth and prediction, and between rows
TASK_GAP = 14
LINE = 20  # height of a line of text
SWATCH = 12  # side of a colour in the legend
FONT_SIZE = 14
INK, PAPER = (30, 30, 30), (255, 255, 255)


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
    legends = [_legend(task, labels[task.name], predictions[task.name]) for task in tasks if task.kind == "classes"]
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
    return _bytes(_smooth(_channels_first(image_3SS) * std + mean, size))


def _pair(task: Task, truth: Tensor, prediction: Tensor, size: Size) -> list[Tile]:
    """The tile of the truth, hatched where it is ignored, and the tile of the prediction."""
    truth_CHW, prediction_CHW = _channels_first(truth), _channels_first(prediction)
    is_vector = task.kind in {"normals", "depth"}
    ignored_1HW = (truth_CHW == 0).all(0, keepdim=True) if is_vector else truth_CHW == IGNORE
    value_range = _range(truth_CHW[~ignored_1HW]) if task.kind == "depth" else (0.0, 1.0)
    truth_tile = _paint(task, truth_CHW.masked_fill(ignored_1HW, 0.0), size, value_range)
    ignored_hw = _crisp(ignored_1HW.float(), size)[0].numpy() > 0
    truth_tile[ignored_hw] = _hatch(size)[ignored_hw]
    return [truth_tile, _paint(task, prediction_CHW, size, value_range)]


def _paint(task: Task, value_CHW: Tensor, size: Size, value_range: tuple[float, float]) -> Tile:
    """The colours of a label or of a decoded prediction; ``value_range`` is for depth, in metres."""
    if task.kind == "classes":
        palette = np.asarray(task.palette, dtype=np.uint8)
        ids = _crisp(value_CHW, size)[0].long().clamp(max=len(palette) - 1).numpy()
        return np.array(palette[ids])
    if task.kind == "depth":
        low, high = value_range
        share_hw = ((_crisp(value_CHW, size)[0] - low) / (high - low)).clamp(0, 1).numpy()
        return np.array(matplotlib.colormaps["viridis"](share_hw, bytes=True)[..., :3])
    if task.kind == "normals":
        return _bytes((F.normalize(_smooth(value_CHW, size), dim=0) + 1) / 2)
    if task.kind == "edges":  # the maximum keeps lines of one pixel that a mean would wash out
        return _bytes(F.adaptive_max_pool2d(value_CHW, size).expand(3, -1, -1))
    return _bytes(_smooth(value_CHW, size).expand(3, -1, -1))


def _channels_first(value: Tensor) -> Tensor:
    """[H, W] or [C, H, W] of any type and device as float32 [C, H, W] on the CPU."""
    value = value.detach().float().cpu()
    return value if value.ndim == 3 else value.unsqueeze(0)


def _smooth(value_CHW: Tensor, size: Size) -> Tensor:
    return F.interpolate(value_CHW[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def _crisp(value_CHW: Tensor, size: Size) -> Tensor:
    return F.interpolate(value_CHW[None], size=size, mode="nearest-exact")[0]


def _bytes(share_3hw: Tensor) -> Tile:
    """Shares from 0 to 1 as colours."""
    return np.array((share_3hw.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _hatch(size: Size) -> Tile:
    """Diagonal stripes of the two greys."""
    row, column = np.indices(size)
    stripe = (row + column) % HATCH_PERIOD < HATCH_PERIOD // 2
    return np.array(np.asarray(HATCH, dtype=np.uint8)[stripe.astype(int)])


def _range(metres: Tensor) -> tuple[float, float]:
    """The least and the greatest of the valid depths, never equal; 0 to 1 where there are none."""
    if metres.numel() == 0:
        return 0.0, 1.0
    low, high = float(metres.min()), float(metres.max())
    return low, max(high, low + 1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The sheet


def _compose(rows: list[list[Tile]], tasks: Sequence[Task], legends: list[Legend], *, width: int) -> Image.Image:
    """Tiles in columns under their titles, the legends below them."""
    lefts = _lefts(len(tasks), width)
    right = lefts[-1] + width
    tops = np.cumsum([MARGIN + 2 * LINE + GAP, *(row[0].shape[0] + GAP for row in rows)]).tolist()
    lines = [line for legend in legends for line in _wrap(legend, right - MARGIN)]
    sheet = Image.new("RGB", (right + MARGIN, tops[-1] + LINE * len(lines) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    _titles(draw, tasks, lefts, width)
    for top, row in zip(tops, rows, strict=False):
        for left, tile in zip(lefts, row, strict=True):
            sheet.paste(Image.fromarray(tile), (left, top))
    for i, line in enumerate(lines):
        _draw_legend(draw, line, tops[-1] + GAP + LINE * i)
    return sheet


def _lefts(tasks: int, width: int) -> list[int]:
    """The left edge of the image's column, then of truth and prediction of every task."""
    lefts = [MARGIN]
    for _ in range(tasks):
        truth = lefts[-1] + width + TASK_GAP
        lefts += [truth, truth + width + GAP]
    return lefts


def _titles(draw: ImageDraw.ImageDraw, tasks: Sequence[Task], lefts: list[int], width: int) -> None:
    font, below = _font(), MARGIN + LINE + LINE // 2
    draw.text((lefts[0] + width // 2, below), "image", fill=INK, font=font, anchor="mm")
    for task, truth, prediction in zip(tasks, lefts[1::2], lefts[2::2], strict=True):
        middle = (truth + prediction + width) // 2
        draw.text((middle, MARGIN + LINE // 2), task.title, fill=INK, font=font, anchor="mm")
        draw.text((truth + width // 2, below), "truth", fill=INK, font=font, anchor="mm")
        draw.text((prediction + width // 2, below), "prediction", fill=INK, font=font, anchor="mm")


def _font() -> ImageFont.FreeTypeFont:
    """The font of the plots, which matplotlib carries with it."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), FONT_SIZE)


# ---------------------------------------------------------------------------------------------------------------------
# Legends

Entry = tuple[tuple[int, int, int] | None, str]  # a colour and its name; the first of a legend is its title
Legend = list[Entry]


def _legend(task: Task, labels: PerImage, predictions: PerImage) -> Legend:
    """The classes that occur in the picture, in order of their ids."""
    found = torch.cat([torch.unique(value.detach().cpu().long()) for value in (*labels, *predictions)])
    ids = [i for i in torch.unique(found).tolist() if i < task.channels]
    names = task.class_names or tuple(f"class {i}" for i in range(task.channels))
    return [(None, f"{task.title}:"), *((task.palette[i], names[i]) for i in ids)]


def _wrap(legend: Legend, width: int) -> list[list[tuple[int, Entry]]]:
    """The entries with their left edges, on as many lines as they need."""
    font, left = _font(), width
    lines: list[list[tuple[int, Entry]]] = []
    for entry in legend:
        needed = round(font.getlength(entry[1])) + (SWATCH + GAP if entry[0] else 0)
        if left + needed > width or not lines:
            lines.append([])
            left = 0
        lines[-1].append((MARGIN + left, entry))
        left += needed + TASK_GAP
    return lines


def _draw_legend(draw: ImageDraw.ImageDraw, line: list[tuple[int, Entry]], top: int) -> None:
    font, middle = _font(), top + LINE // 2
    for left, (color, name) in line:
        text = left
        if color is not None:
            draw.rectangle((left, middle - SWATCH // 2, left + SWATCH - 1, middle + SWATCH // 2 - 1), fill=color)
            text += SWATCH + GAP
        draw.text((text, middle), name, fill=INK, font=font, anchor="lm")
