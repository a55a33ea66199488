"""The pairs that the published code misses on average, against its outlier graph drawn and solved many times."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from skimage.morphology import thin

from ase_dist.evaluation.matching import find_candidates, match_most
from ase_dist.evaluation.outliers import DEGREE, missed_pairs

from .conftest import borders, edge_sample, region_labels

pytestmark = pytest.mark.single_gpu
DRAWINGS = 24


def candidates_of(predicted, truth, radius):
    return find_candidates(np.argwhere(predicted), truth, radius=radius), np.arange(np.count_nonzero(predicted))


def drawn(predicted, truth, radius, rng):
    """Pairs found by the assignment that the published code solves, with one drawing of its random connections."""
    distance = np.linalg.norm(np.argwhere(predicted)[:, None] - np.argwhere(truth), axis=-1)
    allowed = distance <= radius
    distance, allowed = (m[allowed.any(1)][:, allowed.any(0)] for m in (distance, allowed))
    rows, columns = allowed.shape
    outlier = 100 * radius
    cost = np.full((rows + columns, rows + columns), 1e9)
    cost[:rows, :columns] = np.where(allowed, distance, 1e9)
    cost[:rows, columns:] = overlay(rows, outlier, rng)
    cost[rows:, :columns] = overlay(columns, outlier, rng).T
    corner = cost[rows:, columns:]  # between the outlier nodes of the true and of the predicted pixels
    for i in range(max(rows, columns)):
        few = rng.choice(min(rows, columns), DEGREE, replace=False)
        if rows < columns:
            corner[i, few] = outlier
        else:
            corner[few, i] = outlier
    chosen = linear_sum_assignment(cost)
    return int(np.count_nonzero(cost[chosen] <= radius))


def overlay(size, outlier, rng):
    """A pixel's connections to outlier nodes: its own at a hundred times the price, six random others."""
    cost = np.full((size, size), 1e9)
    for i in range(size):
        cost[i, rng.choice(np.delete(np.arange(size), i), DEGREE, replace=False)] = outlier
        cost[i, i] = 100 * outlier
    return cost


@pytest.mark.parametrize(("shift", "noise", "level"), [(0, 0, 0.4), (0, 0.1, 0.3), (1.0, 0.1, 0.4), (2.5, 0.2, 0.4)])
def test_the_mean_of_many_drawings(shift, noise, level):
    rng, found, expected = np.random.default_rng(0), [], []
    for seed in range(3):
        prediction, (truth,) = edge_sample(region_labels(seed=seed, height=64, width=80, regions=14), seed=seed,
                                           shift=shift, noise=noise)  # fmt: skip
        predicted = thin(prediction >= level)
        candidates, everything = candidates_of(predicted, truth, radius=1.5)
        partner = match_most(candidates, everything)
        most = np.count_nonzero(partner >= 0)
        expected.append(missed_pairs(candidates, everything, partner))
        found.append(np.mean([most - drawn(predicted, truth, 1.5, rng) for _ in range(DRAWINGS)]))
    tolerance = 4 * np.sqrt(max(sum(expected), 0.1) / DRAWINGS)  # four standard deviations of the mean
    assert sum(found) == pytest.approx(sum(expected), abs=tolerance)


def test_a_four_hundredth_is_missed_where_everything_matches():
    truth = np.zeros((80, 80), dtype=bool)
    truth[::2] = True
    candidates, everything = candidates_of(truth, truth, radius=1.0)
    missed = missed_pairs(candidates, everything, everything.astype(np.int64))
    assert missed / len(everything) == pytest.approx(np.exp(-6), rel=0.01)


def test_pixels_that_may_be_left_out_take_the_places_of_the_missed():
    """Above, three predicted pixels to each true one; below, the reverse: three quarters of both sets are to spare."""
    lines = np.zeros((120, 60), dtype=bool)
    lines[10::20] = True
    thick = lines | np.roll(lines, 1, axis=0) | np.roll(lines, -1, axis=0)
    above = np.arange(120)[:, None] < 60
    predicted, truth = np.where(above, thick, lines), np.where(above, lines, thick)
    candidates, everything = candidates_of(predicted, truth, radius=1.5)
    partner = match_most(candidates, everything)
    assert np.count_nonzero(partner >= 0) == lines.sum()
    assert missed_pairs(candidates, everything, partner) / truth.sum() == pytest.approx(np.exp(-6 * 1.75), rel=0.05)


def test_few_pixels_are_connected_with_all_others():
    truth = np.eye(DEGREE, dtype=bool)
    candidates, everything = candidates_of(truth, truth, radius=1.0)
    assert missed_pairs(candidates, everything, match_most(candidates, everything)) == 0


def test_empty_maps_miss_nothing():
    candidates, everything = candidates_of(np.zeros((9, 9), dtype=bool), borders(np.eye(9)), radius=1.0)
    assert missed_pairs(candidates, everything, match_most(candidates, everything)) == 0
