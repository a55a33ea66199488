"""Matchings against the assignment problem solved densely."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from ase_dist.evaluation.matching import find_candidates, match_most, match_nearest

pytestmark = pytest.mark.single_gpu


def random_maps(seed, *, density=0.15, shape=(18, 22)):
    rng = np.random.default_rng(seed)
    return rng.random(shape) < density, rng.random(shape) < density


def best_assignment(predicted, truth, radius):
    """(pairs, sum of distances) of the best matching, from one dense cost matrix."""
    distance = np.linalg.norm(np.argwhere(predicted)[:, None] - np.argwhere(truth), axis=-1)
    cost = np.where(distance <= radius, np.rint(100 * distance), 1e6)
    rows, columns = linear_sum_assignment(cost)
    paid = cost[rows, columns]
    return int((paid < 1e6).sum()), paid[paid < 1e6].sum() / 100


def valid_pairs(candidates, chosen, partner):
    """Which of ``chosen`` have a partner, after a look that no true pixel has two and that each may be matched."""
    matched = partner >= 0
    assert len(np.unique(partner[matched])) == np.count_nonzero(matched)
    for pixel, true in zip(chosen[matched], partner[matched], strict=True):
        start = candidates.starts_P[pixel]
        assert true in candidates.true_E[start : start + candidates.counts_P[pixel]]
    return matched


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("radius", [1.0, 2.88, 4.7])
def test_most_pairs_and_least_distance(seed, radius):
    predicted, truth = random_maps(seed)
    candidates = find_candidates(np.argwhere(predicted), truth, radius=radius)
    everything = np.arange(np.count_nonzero(predicted))
    pairs, distance = best_assignment(predicted, truth, radius)
    matched = valid_pairs(candidates, everything, match_nearest(candidates, everything))
    assert pairs == np.count_nonzero(matched)
    assert pairs == np.count_nonzero(valid_pairs(candidates, everything, match_most(candidates, everything)))
    rest = np.zeros_like(predicted)
    rest[tuple(np.argwhere(predicted)[matched].T)] = True
    assert best_assignment(rest, truth, radius) == (pairs, pytest.approx(distance))


def test_any_subset_of_the_predicted_pixels_can_be_chosen():
    predicted, truth = random_maps(7)
    pixels = np.argwhere(predicted)
    candidates = find_candidates(pixels, truth, radius=2.5)
    rng = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.5, 0.9):
        chosen = np.flatnonzero(rng.random(len(pixels)) < share)
        some = np.zeros_like(predicted)
        some[tuple(pixels[chosen].T)] = True
        pairs = best_assignment(some, truth, 2.5)[0]
        for match in (match_most, match_nearest):
            assert np.count_nonzero(valid_pairs(candidates, chosen, match(candidates, chosen))) == pairs


def test_the_radius_is_inclusive_and_knows_no_wrap_around():
    truth = np.zeros((6, 8), dtype=bool)
    truth[2, 7] = True
    pixels = np.array([[2, 4], [3, 0], [5, 6], [5, 7]])  # at distance 3; across the border; sqrt(10); 3
    candidates = find_candidates(pixels, truth, radius=3.0)
    assert candidates.counts_P.tolist() == [1, 0, 0, 1]
    assert np.count_nonzero(match_most(candidates, np.arange(4)) >= 0) == 1


@pytest.mark.parametrize("empty", ["predicted", "truth", "both"])
def test_empty_maps_match_nothing(empty):
    predicted, truth = random_maps(0)
    predicted &= empty == "truth"
    truth &= empty == "predicted"
    candidates = find_candidates(np.argwhere(predicted), truth, radius=2.0)
    everything = np.arange(np.count_nonzero(predicted))
    for match in (match_most, match_nearest):
        assert match(candidates, everything).tolist() == [-1] * len(everything)
