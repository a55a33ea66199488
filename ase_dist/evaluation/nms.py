"""Non-maximum suppression of an edge map across the edge, as in the structured-edge toolbox (``edgesNms``).

The published evaluation of learned edge detectors (Dollar and Zitnick, "Fast edge detection using structured forests",
PAMI 2015; the same call is made for HED and its successors) smooths the map, takes the direction across the edge from
second derivatives of a smoother copy, keeps a pixel only where it is no weaker than its neighbours in that direction
and fades the border of the image. Letters: H height, W width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.float64]

FINE_RADIUS, COARSE_RADIUS = 1, 4  # triangle filters: of the map itself, and of the copy that gives the direction
CLAMP = 1.001  # the toolbox samples at most at (size - 1.001)


def suppress_non_maxima(
    edges: NDArray[np.floating], *, radius: int = 1, border: int = 5, factor: float = 1.01
) -> Floats:
    """Thin the edge strengths ``edges`` [H, W] to ridges; the result is the smoothed strength there and 0 elsewhere.

    A pixel stays where ``factor`` times its strength is at least the strength at 1 .. ``radius`` pixels on both sides.
    ``border`` is the width in pixels of the frame that is faded to 0 at the edge of the image.
    """
    strength_HW = smooth(edges, radius=FINE_RADIUS)
    angle_HW = orientation(strength_HW)
    height, width = strength_HW.shape
    row_HW, column_HW = np.indices(strength_HW.shape)
    is_ridge_HW = np.ones(strength_HW.shape, dtype=bool)
    for distance in (*range(-radius, 0), *range(1, radius + 1)):
        y_HW = np.clip(row_HW + distance * np.sin(angle_HW), 0, max(height - CLAMP, 0))
        x_HW = np.clip(column_HW + distance * np.cos(angle_HW), 0, max(width - CLAMP, 0))
        neighbour_HW = ndimage.map_coordinates(strength_HW, (y_HW, x_HW), order=1, mode="nearest", prefilter=False)
        is_ridge_HW &= factor * strength_HW >= neighbour_HW
    kept_HW = np.where(is_ridge_HW, strength_HW, 0.0)
    frame = min(border, height // 2, width // 2)
    for i in range(frame):
        kept_HW[[i, -1 - i], :] *= i / frame
        kept_HW[:, [i, -1 - i]] *= i / frame
    return kept_HW


def smooth(image_HW: NDArray[np.floating], *, radius: int) -> Floats:
    """Convolve with the triangle filter of ``radius`` in both directions; the border is mirrored (``convTri``)."""
    rise = np.arange(1.0, radius + 2)
    kernel = np.concatenate((rise, rise[-2::-1])) / (radius + 1) ** 2
    rows = ndimage.correlate1d(np.asarray(image_HW, dtype=np.float64), kernel, axis=0, mode="reflect")
    smoothed: Floats = ndimage.correlate1d(rows, kernel, axis=1, mode="reflect")
    return smoothed


def orientation(strength_HW: Floats) -> Floats:
    """The angle in [0, pi) across the edge at each pixel, x to the right and y down."""
    dy, dx = np.gradient(smooth(strength_HW, radius=COARSE_RADIUS))
    dxx = np.gradient(dx, axis=1)
    dyy, dxy = np.gradient(dy)
    return np.mod(np.arctan(dyy * np.sign(-dxy) / (dxx + 1e-5)), np.pi)
