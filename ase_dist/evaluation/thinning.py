"""Morphological thinning of up to 64 binary images at once: bit t of a pixel's word belongs to image t.

This is the two-step thinning of Guo and Hall ("Parallel thinning with two-subiteration algorithms", Comm. ACM 32,
1989, pp. 359-373) repeated until nothing changes, which is MATLAB's ``bwmorph(image, 'thin', inf)`` and scikit-image's
``thin``. A pixel is deleted where three conditions on its eight neighbours hold; on words they are a few dozen bitwise
operations for all images together. Letters: H height, W width, A the pixels looked at in one half-step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
WORD_BITS = 64


def thin_bits(bits_HW: Words) -> Words:
    """Thin each of the 64 binary images packed into ``bits_HW`` (uint64 [H, W]); returns a new array of that shape.

    A half-step looks only at pixels that have a deleted pixel in their 3x3 neighbourhood in one of the last two
    half-steps: for all others its two conditions have already been tried on the same neighbourhood.
    """
    height, width = bits_HW.shape
    padded = np.zeros((height + 2, width + 2), dtype=np.uint64)
    padded[1:-1, 1:-1] = bits_HW
    flat = padded.ravel()
    row = width + 2
    ring = (1, 1 - row, -row, -1 - row, -1, row - 1, row, row + 1)  # counterclockwise from east: the paper's x1 .. x8
    everything = np.flatnonzero(flat)
    older, newer, second = everything, everything, False  # the pixels deleted in the last two half-steps
    while older.size or newer.size:
        changed = np.concatenate((older, newer))
        near = np.zeros(flat.shape, dtype=bool)
        near[changed] = True
        for step in ring:
            near[changed + step] = True
        active_A = np.flatnonzero(near & (flat != 0))
        deleted_A = flat[active_A] & _deletable([flat[active_A + step] for step in ring], second=second)
        hit = np.flatnonzero(deleted_A)
        older, newer, second = newer, active_A[hit], not second
        flat[newer] &= ~deleted_A[hit]
    return padded[1:-1, 1:-1].copy()


def _deletable(x: list[Words], *, second: bool) -> Words:
    """Where G1, G2 and G3 (G3' in the ``second`` half-step) hold, given the neighbours x1 .. x8 as ``x[0] .. x[7]``."""
    x1, x2, x3, x4, x5, x6, x7, x8 = x
    a, b, c, d = ~x1 & (x2 | x3), ~x3 & (x4 | x5), ~x5 & (x6 | x7), ~x7 & (x8 | x1)
    exactly_one = (a ^ b ^ c ^ d) & ~((a & b) | (c & d))
    two_a, four_a = _two_and_four(x1 | x2, x3 | x4, x5 | x6, x7 | x8)
    two_b, four_b = _two_and_four(x2 | x3, x4 | x5, x6 | x7, x8 | x1)
    side = (x6 | x7 | ~x4) & x5 if second else (x2 | x3 | ~x8) & x1
    return exactly_one & two_a & two_b & ~(four_a & four_b) & ~side


def _two_and_four(a: Words, b: Words, c: Words, d: Words) -> tuple[Words, Words]:
    """Where at least two, and where all four, of the arguments are set."""
    return np.bitwise_or((a & b) | (c & d), (a | b) & (c | d)), np.bitwise_and(a & b, c & d)
