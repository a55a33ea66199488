"""Boundary F-measure of edge maps (odsF, oisF) with NumPy and SciPy only, on all cores.

The definition is the published benchmark's (Arbelaez, Maire, Fowlkes and Malik, "Contour detection and hierarchical
image segmentation", PAMI 2011; the code known as ``edgesEvalImg`` and ``edgesEvalDir``): a prediction is thresholded
and thinned, then matched one to one with each annotator's map, within ``max_dist`` of the image diagonal. Recall counts
the matched true pixels summed over annotators, precision the predicted pixels that any annotator matches; both are
summed over images for each threshold. Letters: T thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ase_dist.errors import UserError
from ase_dist.evaluation.boundary_counts import (
    MATCHED_PREDICTED,
    MATCHED_TRUE,
    PREDICTED,
    TRUE,
    Floats,
    Matching,
    Protocol,
)
from ase_dist.evaluation.boundary_workers import count_images, pair_images

STEPS_BETWEEN = 101  # points tried from one threshold to the next in the search for the best F


@dataclass(frozen=True)
class BoundaryScores:
    """The result of ``evaluate_boundaries``; every value is a share from 0 to 1.

    ``ods_*`` (optimal data set scale) belong to the one threshold with the best F over all images, where precision and
    recall are interpolated linearly between thresholds as in ``edgesEvalDir``; ``ois_*`` (optimal image scale) to the
    counts summed at each image's own best threshold; all are NaN where no image has a true edge. The last
    four are the curve, one value per threshold.
    """

    ods_f: float
    ods_precision: float
    ods_recall: float
    ods_threshold: float
    ois_f: float
    ois_precision: float
    ois_recall: float
    thresholds: Floats
    precision: Floats
    recall: Floats
    f: Floats


def evaluate_boundaries(
    predictions: Iterable[ArrayLike],
    ground_truths: Iterable[Iterable[ArrayLike]],
    *,
    thresholds: int | Sequence[float] = 99,
    max_dist: float = 0.0075,
    thin: bool = True,
    nms: bool = False,
    matching: Matching = "published",
    workers: int | None = None,
) -> BoundaryScores:
    """Score edge maps [H, W] in 0..1 against, for each image, one bool [H, W] per annotator.

    ``thresholds`` is a number n (k / (n + 1) for k = 1..n) or an increasing list; a pixel is predicted where its value
    is at least the threshold. ``max_dist`` is a share of the image diagonal. ``nms`` suppresses non-maxima before
    thresholding, ``thin`` thins after it; ground truths are taken as they are. ``matching="published"`` counts what the
    published code finds on average: its random outlier graph makes it miss up to 0.25 % of the pairs, most where nearly
    everything matches, so that even a perfect prediction scores 0.9975. ``"exact"`` counts the best matching.

    Images are counted in ``workers`` spawned processes (None: one per core, or none for a handful of images; 0 or 1:
    in this process), so a script needs the usual ``if __name__ == "__main__"``; the result is the same for any number.
    Both iterables are read as they are needed. Raises UserError for wrong arguments, naming the image.
    """
    totals = boundary_totals(
        predictions,
        ground_truths,
        thresholds=thresholds,
        max_dist=max_dist,
        thin=thin,
        nms=nms,
        matching=matching,
        workers=workers,
    )
    if not totals.any():
        raise UserError("predictions: got no image with an edge, predicted or true, wanted at least one")
    return boundary_scores(totals, thresholds=thresholds)


def boundary_totals(
    predictions: Iterable[ArrayLike],
    ground_truths: Iterable[Iterable[ArrayLike]],
    *,
    thresholds: int | Sequence[float] = 99,
    max_dist: float = 0.0075,
    thin: bool = True,
    nms: bool = False,
    matching: Matching = "published",
    workers: int | None = None,
) -> Floats:
    """The counts behind ``evaluate_boundaries`` as one float64 [T + 1, 4] that adds up over ranks.

    A row holds matched true, true, matched predicted and predicted pixels: one row per threshold, then one with the
    sums at each image's best threshold.
    """
    levels = threshold_values(thresholds)
    if not 0 < max_dist < 1:
        raise UserError(f"max_dist: got {max_dist}, wanted a share of the image diagonal such as 0.0075")
    if matching not in ("exact", "published"):
        raise UserError(f"matching: got {matching!r}, wanted 'exact' or 'published'")
    if workers is not None and workers < 0:
        raise UserError(f"workers: got {workers}, wanted None, 0 or a number of processes")
    protocol = Protocol(tuple(levels.tolist()), max_dist=max_dist, thin=thin, nms=nms, matching=matching)
    totals = np.zeros((len(levels) + 1, 4))
    for counts_T4 in count_images(pair_images(predictions, ground_truths), protocol, workers=workers):
        totals += with_best(counts_T4)
    return totals


def with_best(counts_T4: Floats) -> Floats:
    """The counts of one image [T, 4] followed by those at its best threshold: [T + 1, 4], to be summed over images."""
    return np.vstack((counts_T4, counts_T4[np.argmax(_precision_recall_f(counts_T4)[2])]))


def boundary_scores(totals: Floats, *, thresholds: int | Sequence[float] = 99) -> BoundaryScores:
    """The scores of (the sum over ranks of) ``boundary_totals`` at the same ``thresholds``."""
    levels = threshold_values(thresholds)
    if totals.shape != (len(levels) + 1, 4):
        raise UserError(f"totals: got shape {list(totals.shape)}, wanted {[len(levels) + 1, 4]} for these thresholds")
    precision, recall, f = _precision_recall_f(totals)
    share = np.linspace(0, 1, STEPS_BETWEEN)  # each curve: its first value, then neighbours blended at every share
    fine_precision, fine_recall, fine_levels = (
        np.concatenate((curve[:1], (np.outer(curve[:-1], 1 - share) + np.outer(curve[1:], share)).ravel()))
        for curve in (precision[:-1], recall[:-1], levels)
    )
    fine_f = _harmonic_mean(fine_precision, fine_recall)
    best = int(np.argmax(fine_f))
    defined = 1.0 if totals[:, TRUE].any() else math.nan  # there is no recall without a true edge
    return BoundaryScores(
        ods_f=float(fine_f[best]) * defined,
        ods_precision=float(fine_precision[best]) * defined,
        ods_recall=float(fine_recall[best]) * defined,
        ods_threshold=float(fine_levels[best]) * defined,
        ois_f=float(f[-1]) * defined,
        ois_precision=float(precision[-1]) * defined,
        ois_recall=float(recall[-1]) * defined,
        thresholds=levels,
        precision=precision[:-1],
        recall=recall[:-1],
        f=f[:-1],
    )


def threshold_values(thresholds: int | Sequence[float]) -> Floats:
    """The thresholds as float64 [T]; UserError unless they increase within 0 < t <= 1."""
    if isinstance(thresholds, int):
        if thresholds < 1:
            raise UserError(f"thresholds: got {thresholds}, wanted a number of at least 1, such as 99")
        return np.linspace(0, 1, thresholds + 2)[1:-1]
    levels = np.asarray(thresholds, dtype=np.float64)
    if levels.ndim != 1 or levels.size == 0 or not (levels[0] > 0 and levels[-1] <= 1 and np.all(np.diff(levels) > 0)):
        raise UserError(f"thresholds: got {thresholds}, wanted values in 0 < t <= 1 in increasing order")
    return levels


def _precision_recall_f(counts_T4: Floats) -> tuple[Floats, Floats, Floats]:
    """Precision, recall and their harmonic mean, each [T]; 0 where there is nothing to count, as published."""
    precision = counts_T4[:, MATCHED_PREDICTED] / np.maximum(counts_T4[:, PREDICTED], 1)
    recall = counts_T4[:, MATCHED_TRUE] / np.maximum(counts_T4[:, TRUE], 1)
    return precision, recall, _harmonic_mean(precision, recall)


def _harmonic_mean(precision: Floats, recall: Floats) -> Floats:
    total = precision + recall
    return 2 * precision * recall / np.where(total == 0, 1, total)
