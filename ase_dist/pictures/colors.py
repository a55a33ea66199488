"""The colours of labels and decoded predictions: the tiles of pictures.

Classes have the colours of the task table, masks and edges are grey from 0 to 1, a normal n is (n + 1) / 2 in RGB,
depth runs over a given range. Letters: C channels, H W a map's own size, h w a tile's.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ase_dist.tasks import Task

Tile = NDArray[np.uint8]  # [h, w, 3]
Size = tuple[int, int]  # h, w
Range = tuple[float, float]  # metres, for depth


def paint(task: Task, value_CHW: Tensor, size: Size, depth_range: Range) -> Tile:
    """The colours of a label or of a decoded prediction; ``depth_range`` gives the ends of the scale for depth."""
    if task.kind == "classes":
        palette = np.asarray(task.palette, dtype=np.uint8)
        ids = resize_nearest(value_CHW, size)[0].long().clamp(max=len(palette) - 1).numpy()
        return np.array(palette[ids])
    if task.kind == "depth":
        import matplotlib  # at the top it would delay every import of this module

        low, high = depth_range
        share_hw = ((resize_nearest(value_CHW, size)[0] - low) / (high - low)).clamp(0, 1).numpy()
        return np.array(matplotlib.colormaps["viridis"](share_hw, bytes=True)[..., :3])
    if task.kind == "normals":
        return to_bytes((F.normalize(resize_bilinear(value_CHW, size), dim=0) + 1) / 2)
    if task.kind == "edges":  # the maximum keeps lines of one pixel that a mean would wash out
        return to_bytes(F.adaptive_max_pool2d(value_CHW, size).expand(3, -1, -1))
    return to_bytes(resize_bilinear(value_CHW, size).expand(3, -1, -1))


def channels_first(value: Tensor) -> Tensor:
    """[H, W] or [C, H, W] of any type and device as float32 [C, H, W] on the CPU."""
    value = value.detach().float().cpu()
    return value if value.ndim == 3 else value.unsqueeze(0)


def resize_bilinear(value_CHW: Tensor, size: Size) -> Tensor:
    """Resized bilinearly, with antialiasing."""
    return F.interpolate(value_CHW[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def resize_nearest(value_CHW: Tensor, size: Size) -> Tensor:
    """Resized to the nearest pixel: no new values, as class ids need."""
    return F.interpolate(value_CHW[None], size=size, mode="nearest-exact")[0]


def to_bytes(rgb_3hw: Tensor) -> Tile:
    """RGB in 0..1 as bytes [h, w, 3]."""
    return np.array((rgb_3hw.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def depth_range(metres: Tensor) -> Range:
    """The least and the greatest of the valid depths, never equal; 0 to 1 where there are none."""
    if metres.numel() == 0:
        return 0.0, 1.0
    low, high = float(metres.min()), float(metres.max())
    return low, max(high, low + 1e-3)
