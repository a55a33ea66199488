"""Sparse thinning against scikit-image's, which visits every pixel."""

import numpy as np
import pytest
from skimage.morphology import thin as thin_everywhere

from ase_dist.data.thinning import thin

pytestmark = pytest.mark.single_gpu


@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 2), (23, 31)])
def test_equals_scikit_image(density, shape):
    rng = np.random.default_rng(1)
    for _ in range(5):
        mask = rng.random(shape) < density
        np.testing.assert_array_equal(thin(mask), thin_everywhere(mask))


def test_a_thick_bar_becomes_a_line_and_the_mask_is_left_alone():
    mask = np.zeros((9, 20), dtype=bool)
    mask[3:6] = True
    before = mask.copy()
    line = thin(mask)
    assert line.sum(axis=0).max() == 1
    assert line[4].sum() >= 18
    np.testing.assert_array_equal(mask, before)
