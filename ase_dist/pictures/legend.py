"""Text in pictures: the font, and legends of the classes that occur."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor

from ase_dist.tasks import Task

Entry = tuple[tuple[int, int, int] | None, str]  # a colour and its name; the first of a legend is its title
Legend = list[Entry]

MARGIN = 12  # pixels, like all that follow
GAP = 4  # between a swatch and its name, and between tiles that belong together
TASK_GAP = 14  # between others
LINE = 20  # height of a line of text
SWATCH = 12  # side of a colour in the legend
FONT_SIZE = 14
INK, PAPER = (30, 30, 30), (255, 255, 255)


def font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib  # at the top it would delay every import of this module

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), FONT_SIZE)


def class_legend(task: Task, maps: Iterable[Tensor]) -> Legend:
    """The classes that occur in ``maps`` of ids, in order of their ids."""
    found = torch.cat([torch.unique(value.detach().cpu().long()) for value in maps])
    ids = [i for i in torch.unique(found).tolist() if i < task.channels]
    names = task.class_names or tuple(f"class {i}" for i in range(task.channels))
    return [(None, f"{task.title}:"), *((task.palette[i], names[i]) for i in ids)]


def wrap(legend: Legend, width: int) -> list[list[tuple[int, Entry]]]:
    """The entries with their left edges, on as many lines as they need."""
    text_font, left = font(), width
    lines: list[list[tuple[int, Entry]]] = []
    for entry in legend:
        needed = round(text_font.getlength(entry[1])) + (SWATCH + GAP if entry[0] else 0)
        if left + needed > width or not lines:
            lines.append([])
            left = 0
        lines[-1].append((MARGIN + left, entry))
        left += needed + TASK_GAP
    return lines


def draw_legend(draw: ImageDraw.ImageDraw, line: list[tuple[int, Entry]], top: int) -> None:
    """Draw one of the lines that ``wrap`` gives."""
    text_font, middle = font(), top + LINE // 2
    for left, (color, name) in line:
        text = left
        if color is not None:
            draw.rectangle((left, middle - SWATCH // 2, left + SWATCH - 1, middle + SWATCH // 2 - 1), fill=color)
            text += SWATCH + GAP
        draw.text((text, middle), name, fill=INK, font=text_font, anchor="lm")
