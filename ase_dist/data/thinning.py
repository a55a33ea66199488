"""Morphological thinning of sparse masks: Guo and Hall's two-subiteration algorithm over the set pixels only.

The same result as ``skimage.morphology.thin`` (which visits every pixel of the image in every pass) in a tenth of the
time on boundary maps, where about one pixel in twenty is set. Z. Guo and R. W. Hall, "Parallel thinning with
two-subiteration algorithms", Communications of the ACM 32(3), 1989.
"""

from __future__ import annotations

import functools

import numpy as np

from ase_dist.data.files import Array

# Neighbours x1..x8 of the paper, from the right one counter-clockwise, as (row, column) steps.
_STEPS = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


def thin(mask_HW: Array) -> Array:
    """The mask bool [H, W] thinned to lines one pixel wide, its connectivity kept; pixels outside count as unset."""
    height, width = mask_HW.shape
    padded = np.zeros((height + 2, width + 2), dtype=np.uint8)
    padded[1:-1, 1:-1] = mask_HW != 0
    flat = padded.reshape(-1)
    steps = [row * (width + 2) + column for row, column in _STEPS]
    pixels = np.flatnonzero(flat)
    before = -1
    while before != pixels.size:
        before = pixels.size
        for removable in _removable():
            pixels = _peel(flat, pixels, steps, removable)
    return padded[1:-1, 1:-1].astype(bool)


def _peel(flat: Array, pixels: Array, steps: list[int], removable: Array) -> Array:
    """Unset in ``flat`` those of ``pixels`` whose neighbourhood allows it; the others are returned."""
    code = np.zeros(pixels.size, dtype=np.uint8)
    for bit, step in enumerate(steps):
        code |= flat[pixels + step] << bit
    gone = removable[code]
    flat[pixels[gone]] = 0
    return pixels[~gone]


@functools.cache
def _removable() -> tuple[Array, Array]:
    """For each of the 256 neighbourhoods, whether the first and the second subiteration remove its centre."""
    codes = np.arange(256)
    x = [((codes >> bit) & 1).astype(bool) for bit in range(8)]  # x[0] is the paper's x1
    crossings = sum((~x[i] & (x[i + 1] | x[(i + 2) % 8])).astype(int) for i in (0, 2, 4, 6))
    pairs_from_right = sum((x[i] | x[i + 1]).astype(int) for i in (0, 2, 4, 6))
    pairs_from_above = sum((x[i + 1] | x[(i + 2) % 8]).astype(int) for i in (0, 2, 4, 6))
    fewest = np.minimum(pairs_from_right, pairs_from_above)
    simple = (crossings == 1) & (fewest >= 2) & (fewest <= 3)
    first = simple & ~((x[1] | x[2] | ~x[7]) & x[0])
    second = simple & ~((x[5] | x[6] | ~x[3]) & x[4])
    return first, second
