"""Pairs that the published matching code misses because of its random outlier graph, as an expected number.

That code (BSDS ``correspondPixels``) solves an assignment in which every pixel that may match has an outlier node, its
stand-in on the other side. Leaving p pairs matched needs p pairs of outlier nodes, and each node of the larger set is
connected with only six random ones of the smaller. A node of the smaller set that none of these reaches (a share
exp(-6) where both are equally many) must take an unmatched pixel of the smaller set: either one of about six random
ones can be left unmatched at no loss, or a pair is given up. Letters as in ``matching``; S pixels of the smaller set.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order

from ase_dist.evaluation.matching import Candidates, Ints

DEGREE = 6  # outlier connections that the published code draws for each pixel
UNMATCHED = -1


def missed_pairs(candidates: Candidates, chosen_C: Ints, partner_C: Ints) -> float:
    """How many pairs of the largest matching ``partner_C`` the published code misses on average.

    ``partner_C`` gives the true pixel of each of ``chosen_C``, -1 where there is none.
    """
    pointers, positions = candidates.rows(chosen_C)
    predicted_E, true_E = np.repeat(np.arange(len(chosen_C)), np.diff(pointers)), candidates.true_E[positions]
    partner_G = np.full(candidates.num_true, UNMATCHED, dtype=np.int64)
    matched_C = np.flatnonzero(partner_C != UNMATCHED)
    partner_G[partner_C[matched_C]] = matched_C
    sides = [_touched(predicted_E, len(chosen_C)), _touched(true_E, candidates.num_true)]
    few, many = sorted(int(np.count_nonzero(side)) for side in sides)
    if few <= DEGREE:
        return 0.0
    if np.count_nonzero(sides[0]) < np.count_nonzero(sides[1]):
        spare = _spare(
            predicted_E, partner_G[true_E], np.flatnonzero(sides[0] & (partner_C == UNMATCHED)), len(chosen_C)
        )
    else:
        spare = _spare(
            true_E, partner_C[predicted_E], np.flatnonzero(sides[1] & (partner_G == UNMATCHED)), len(partner_G)
        )
    return float(few * (1 - DEGREE / few) ** (many + spare))


def _spare(from_E: NDArray[np.integer], to_E: Ints, unmatched: NDArray[np.intp], size: int) -> int:
    """How many pixels of one set some largest matching leaves out: those at even distance from an unmatched one.

    From a pixel a step goes to a pixel of the other set that it may match, and on to the partner of that.
    """
    if unmatched.size == 0:
        return 0
    is_edge = to_E != UNMATCHED
    rows = np.concatenate((from_E[is_edge], np.full(unmatched.size, size)))  # one more node is joined to the unmatched
    columns = np.concatenate((to_E[is_edge], unmatched))
    graph = coo_matrix((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(size + 1, size + 1)).tocsr()
    return len(breadth_first_order(graph, size, return_predecessors=False)) - 1


def _touched(index_E: NDArray[np.integer], size: int) -> NDArray[np.bool_]:
    """Which of ``size`` pixels are in a candidate pair."""
    touched = np.zeros(size, dtype=bool)
    touched[index_E] = True
    return touched
