"""One-to-one matching of boundary pixels: the candidate pairs, and the best matching for each subset of predictions.

The published benchmark (BSDS ``correspondPixels``) matches predicted with true boundary pixels one to one, within a
radius, so that as many as possible are matched and, among such matchings, the sum of distances is least. Letters: P
predicted pixels of one image (those present at any threshold), G true pixels, D offsets within the radius, E candidate
pairs, C predicted pixels chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching, min_weight_full_bipartite_matching

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

UNMATCHED_COST = 100.0  # in radii: the published price of an outlier, which makes the number of pairs come first
DISTANCE_UNITS = 100  # the published code rounds distances to hundredths of a pixel


@dataclass(frozen=True)
class Candidates:
    """Pairs (predicted pixel, true pixel) within ``radius`` pixels, in compressed rows, nearest first in a row.

    ``starts_P`` and ``counts_P`` give the row of each predicted pixel in ``true_E`` (index of the true pixel) and
    ``distance_E`` (pixels); ``num_true`` is G, the number of true pixels.
    """

    starts_P: Ints
    counts_P: Ints
    true_E: NDArray[np.int32]
    distance_E: NDArray[np.float64]
    num_true: int
    radius: float

    def rows(self, chosen_C: Ints) -> tuple[Ints, Ints]:
        """Row pointers [C + 1] and positions in ``true_E`` of the rows ``chosen_C``."""
        counts_C = self.counts_P[chosen_C]
        pointers = np.concatenate(([0], np.cumsum(counts_C)))
        shift_C = self.starts_P[chosen_C] - pointers[:-1]
        return pointers, np.repeat(shift_C, counts_C) + np.arange(pointers[-1])


def find_candidates(predicted_P2: Ints, truth_HW: Mask, *, radius: float) -> Candidates:
    """All pairs of ``predicted_P2`` (row, column) and true pixels at most ``radius`` pixels apart."""
    reach = math.floor(radius)
    line = np.arange(-reach, reach + 1)
    step_D2 = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
    squared_D = (step_D2**2).sum(axis=1)
    order_D = np.argsort(squared_D, kind="stable")  # steps (rows, columns) within the radius, nearest first
    step_D2 = step_D2[order_D][squared_D[order_D] <= radius * radius]
    number_HW = np.full(truth_HW.shape, -1, dtype=np.int32)  # true pixels numbered in raster order, -1 elsewhere
    number_HW[truth_HW] = np.arange(np.count_nonzero(truth_HW), dtype=np.int32)
    number_HW = np.pad(number_HW, reach, constant_values=-1)
    flat_2 = np.array([truth_HW.shape[1] + 2 * reach, 1])  # (row, column) @ this is the index in the flattened map
    place_P = (predicted_P2 + reach) @ flat_2
    true_PD = number_HW.ravel()[place_P[:, None] + step_D2 @ flat_2]
    found_PD = true_PD >= 0
    counts_P = found_PD.sum(axis=1)
    return Candidates(
        starts_P=np.cumsum(counts_P) - counts_P,
        counts_P=counts_P,
        true_E=true_PD[found_PD],
        distance_E=np.broadcast_to(np.sqrt((step_D2**2).sum(axis=1)), found_PD.shape)[found_PD],
        num_true=int(np.count_nonzero(truth_HW)),
        radius=radius,
    )


def match_most(candidates: Candidates, chosen_C: Ints) -> Ints:
    """The true pixel of each of ``chosen_C`` (-1: none) in a one-to-one matching of as many as possible."""
    pointers, positions = candidates.rows(chosen_C)
    ones = np.ones(len(positions), dtype=np.int8)
    graph = _graph(ones, candidates.true_E[positions], pointers, width=candidates.num_true)
    return maximum_bipartite_matching(graph, perm_type="column").astype(np.int64)


def match_nearest(candidates: Candidates, chosen_C: Ints) -> Ints:
    """As ``match_most``, and the sum of distances is then least.

    Each predicted pixel gets a private stand-in at the price of staying unmatched, so that a full matching exists.
    """
    matchable = np.flatnonzero(candidates.counts_P[chosen_C])
    partner_C = np.full(len(chosen_C), -1, dtype=np.int64)
    if matchable.size == 0:
        return partner_C
    pointers, positions = candidates.rows(chosen_C[matchable])
    cost = np.rint(candidates.distance_E[positions] * DISTANCE_UNITS) + 1  # an explicit zero is no edge to scipy
    price = math.ceil(UNMATCHED_COST * candidates.radius * DISTANCE_UNITS) + 1
    stand_ins = candidates.num_true + np.arange(matchable.size)
    graph = _graph(
        np.insert(cost, pointers[1:], float(price)),
        np.insert(candidates.true_E[positions].astype(np.int64), pointers[1:], stand_ins),
        pointers + np.arange(pointers.size),
        width=candidates.num_true + matchable.size,
    )
    _, partner = min_weight_full_bipartite_matching(graph)
    partner_C[matchable] = np.where(partner < candidates.num_true, partner, -1)
    return partner_C


def _graph(data: NDArray[np.generic], columns: NDArray[np.integer], pointers: Ints, *, width: int) -> csr_matrix:
    return csr_matrix((data, columns, pointers), shape=(len(pointers) - 1, width))
