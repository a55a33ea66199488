"""The four counts of one image behind boundary precision and recall, at every threshold.

Separate from ``boundary`` because worker processes import only this: NumPy and SciPy, no torch. Letters: H
height, W width, T thresholds, P pixels that are left at any threshold, K annotators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ase_dist.errors import UserError
from ase_dist.evaluation.matching import Candidates, find_candidates, match_most, match_nearest
from ase_dist.evaluation.nms import suppress_non_maxima
from ase_dist.evaluation.outliers import missed_pairs
from ase_dist.evaluation.thinning import WORD_BITS, Words, thin_bits

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Matching = Literal["exact", "published"]

MATCHED_TRUE, TRUE, MATCHED_PREDICTED, PREDICTED = range(4)  # the columns of a table of counts
FRACTIONS = 1 << 20  # counts are multiples of 1 / FRACTIONS, so their sums are exact in any order


@dataclass(frozen=True)
class Protocol:
    """How an image is counted; the fields are those arguments of ``evaluate_boundaries``."""

    thresholds: tuple[float, ...]
    max_dist: float
    thin: bool
    nms: bool
    matching: Matching


def count_image(index: int, prediction: ArrayLike, annotators: Sequence[ArrayLike], protocol: Protocol) -> Floats:
    """Counts [T, 4] of one image: matched true, true, matched predicted and predicted pixels at each threshold.

    True pixels are summed over annotators; a predicted pixel counts as matched if any annotator's map matches it.
    Raises UserError naming image ``index`` for a prediction outside 0..1 or ground truths of another size or type.
    """
    prediction_HW, truths = _check_image(index, prediction, annotators)
    if protocol.nms:
        prediction_HW = suppress_non_maxima(prediction_HW)
    pixels_P2, present_TP = _pixels_at_thresholds(prediction_HW, protocol)
    radius = protocol.max_dist * math.hypot(*prediction_HW.shape)
    candidates_K = [find_candidates(pixels_P2, truth, radius=radius) for truth in truths]
    has_candidate_P = np.any([candidates.counts_P > 0 for candidates in candidates_K], axis=0)
    counts_T4 = np.zeros((len(present_TP), 4))
    counts_T4[:, TRUE] = sum(np.count_nonzero(truth) for truth in truths)
    counts_T4[:, PREDICTED] = present_TP.sum(axis=1)
    for counts, present_P in zip(counts_T4, present_TP & has_candidate_P, strict=True):
        chosen = np.flatnonzero(present_P)
        counts[MATCHED_TRUE], counts[MATCHED_PREDICTED] = _count_matched(candidates_K, chosen, protocol.matching)
    return np.rint(counts_T4 * FRACTIONS) / FRACTIONS


def _pixels_at_thresholds(prediction_HW: Floats, protocol: Protocol) -> tuple[NDArray[np.int64], Mask]:
    """The pixels [P, 2] that reach any threshold and survive thinning, and at which thresholds they do, bool [T, P].

    Thresholds are packed into words of 64 bits: a pixel that reaches the first n of them has the n lowest bits set.
    """
    reached_HW = np.searchsorted(np.array(protocol.thresholds), prediction_HW, side="right")
    lowest = np.array([(1 << n) - 1 for n in range(WORD_BITS + 1)], dtype=np.uint64)
    words: list[Words] = []
    for first in range(0, len(protocol.thresholds), WORD_BITS):
        word_HW = lowest[np.clip(reached_HW - first, 0, WORD_BITS)]
        words.append(thin_bits(word_HW) if protocol.thin else word_HW)
    left_HW = np.any(words, axis=0)
    bytes_P = np.stack([word[left_HW] for word in words], axis=1).astype("<u8").view(np.uint8)
    bits = np.unpackbits(bytes_P, axis=1, bitorder="little", count=len(protocol.thresholds))
    return np.argwhere(left_HW), np.ascontiguousarray(bits.T).astype(bool)


def _count_matched(
    candidates_K: list[Candidates], chosen: NDArray[np.int64], matching: Matching
) -> tuple[float, float]:
    """Matched true pixels summed over annotators, and predicted pixels matched with any annotator."""
    if len(candidates_K) == 1:  # which pixels are matched matters only for several annotators
        partner_C = match_most(candidates_K[0], chosen)
        pairs = np.count_nonzero(partner_C >= 0)
        left = pairs - (missed_pairs(candidates_K[0], chosen, partner_C) if matching == "published" else 0)
        return left, left
    partner_KC = np.stack([match_nearest(candidates, chosen) for candidates in candidates_K])
    times_C = (partner_KC >= 0).sum(axis=0)
    true, predicted = float(times_C.sum()), float(np.count_nonzero(times_C))
    if matching == "published":
        for candidates, partner_C in zip(candidates_K, partner_KC, strict=True):
            matched_C = partner_C >= 0
            missed = missed_pairs(candidates, chosen, partner_C)
            true -= missed
            pairs, alone = np.count_nonzero(matched_C), np.count_nonzero(matched_C & (times_C == 1))
            predicted -= missed * alone / max(int(pairs), 1)
    return true, predicted


def _check_image(index: int, prediction: ArrayLike, annotators: Sequence[ArrayLike]) -> tuple[Floats, list[Mask]]:
    """The prediction [H, W] and the annotators' maps as arrays; UserError naming the image where they do not fit."""
    prediction_HW = np.asarray(prediction, dtype=np.float64)
    if prediction_HW.ndim != 2 or prediction_HW.size == 0:
        raise UserError(f"image {index}: got a prediction of shape {list(prediction_HW.shape)}, wanted [H, W]")
    if not (prediction_HW.min() >= 0 and prediction_HW.max() <= 1):  # written so that NaN fails too
        raise UserError(
            f"image {index}: got predictions from {prediction_HW.min():.4g} to {prediction_HW.max():.4g}, "
            "wanted probabilities in 0..1; apply the sigmoid first"
        )
    truths = [np.asarray(truth) for truth in annotators]
    for truth in truths:
        if truth.dtype != np.bool_ or truth.shape != prediction_HW.shape:
            raise UserError(
                f"image {index}: got a ground truth of {truth.dtype} {list(truth.shape)}, wanted one bool "
                f"{list(prediction_HW.shape)} per annotator in a list; write label == 1 for labels that hold 255"
            )
    if not truths:
        raise UserError(f"image {index}: got no ground truth, wanted one map per annotator; leave such images out")
    return prediction_HW, truths
