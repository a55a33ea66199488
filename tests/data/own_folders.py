"""Folders as users have them: the same pictures and labels in the layouts and file types of the field."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SHAPE = (24, 32)
CLASSES = 5


def ids(i, *, classes=CLASSES, shape=SHAPE):
    """Class ids uint8 [H, W], every class in every image."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return ((x // 4 + y // 6 + i) % classes).astype(np.uint8)


def picture(i, *, shape=SHAPE):
    return np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)


def save(path: Path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path, quality=90)


def millimetres(i):
    return (ids(i).astype(np.uint16) + 1) * 700 + np.arange(32, dtype=np.uint16) * 3


def metres(i):
    return millimetres(i).astype(np.float32) / 1000


def disc(i, *, shape=SHAPE):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (x - 8 - i % 8) ** 2 + (y - 12) ** 2 < 40


def outline(i):
    edges = np.zeros(SHAPE, np.uint8)
    edges[i % 20 + 2] = 255
    return edges


def palette_picture(values, colors):
    picture = Image.fromarray(values, mode=None).convert("P")
    picture.putpalette([channel for color in colors for channel in color])
    return picture
