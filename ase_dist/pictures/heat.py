"""A coarse map of numbers as a heat map over a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

OPACITY = 0.6  # of the colours over the picture, which is grey below them


def heat_over(image: NDArray[np.uint8], map_hw: NDArray[Any], *, top: float) -> Image.Image:
    """``map_hw`` from 0 to ``top`` in the colours of viridis over uint8 [H, W, 3], each cell over its own patch."""
    import matplotlib  # at the top it would delay every import of this module

    share_hw = np.clip(np.asarray(map_hw, dtype=np.float64) / max(top, 1e-9), 0, 1)
    colors = Image.fromarray(np.asarray(matplotlib.colormaps["viridis"](share_hw, bytes=True))[..., :3].copy())
    picture = Image.fromarray(image)
    grey = picture.convert("L").convert("RGB")
    return Image.blend(grey, colors.resize(picture.size, Image.Resampling.NEAREST), OPACITY)
