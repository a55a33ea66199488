"""Matchings against the assignment problem solved densely."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from ase_dist.evaluation.matching import count_pairs, find_candidates, match_nearest, published_loss

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


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("radius", [1.0, 2.88, 4.7])
def test_most_pairs_and_least_distance(seed, radius):
    predicted, truth = random_maps(seed)
    candidates = find_candidates(np.argwhere(predicted), truth, radius=radius)
    everything = np.arange(np.count_nonzero(predicted))
    pairs, distance = best_assignment(predicted, truth, radius)
    matched = match_nearest(candidates, everything)
    assert count_pairs(candidates, everything) == pairs == np.count_nonzero(matched)
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
        assert count_pairs(candidates, chosen) == pairs == np.count_nonzero(match_nearest(candidates, chosen))


def test_the_radius_is_inclusive_and_knows_no_wrap_around():
    truth = np.zeros((6, 8), dtype=bool)
    truth[2, 7] = True
    pixels = np.array([[2, 4], [3, 0], [5, 6], [5, 7]])  # at distance 3; across the border; sqrt(10); 3
    candidates = find_candidates(pixels, truth, radius=3.0)
    assert candidates.counts_P.tolist() == [1, 0, 0, 1]
    assert count_pairs(candidates, np.arange(4)) == 1


@pytest.mark.parametrize("empty", ["predicted", "truth", "both"])
def test_empty_maps_match_nothing(empty):
    predicted, truth = random_maps(0)
    predicted &= empty == "truth"
    truth &= empty == "predicted"
    candidates = find_candidates(np.argwhere(predicted), truth, radius=2.0)
    everything = np.arange(np.count_nonzero(predicted))
    assert count_pairs(candidates, everything) == 0
    assert not match_nearest(candidates, everything).any()
    assert published_loss(candidates, everything, pairs=0) == 0


def test_the_published_loss_is_a_four_hundredth_where_everything_matches_and_nothing_elsewhere():
    truth = np.zeros((80, 80), dtype=bool)
    truth[::2] = True
    pixels = np.argwhere(truth)
    candidates = find_candidates(pixels, truth, radius=1.0)
    everything = np.arange(len(pixels))
    assert published_loss(candidates, everything, pairs=len(pixels)) / len(pixels) == pytest.approx(
        np.exp(-6), rel=0.01
    )
    assert published_loss(candidates, everything, pairs=len(pixels) // 2) < 0.06 * len(pixels) * np.exp(-6)
