"""Packed thinning equals scikit-image's, bit by bit."""

import numpy as np
import pytest
from scipy import ndimage
from skimage.morphology import thin

from ase_dist.evaluation.thinning import thin_bits

pytestmark = pytest.mark.single_gpu


def packed(images):
    words = np.zeros(images[0].shape, dtype=np.uint64)
    for bit, image in enumerate(images):
        words |= image.astype(np.uint64) << np.uint64(bit)
    return words


def unpacked(words, count):
    return [((words >> np.uint64(bit)) & np.uint64(1)).astype(bool) for bit in range(count)]


def assert_thinned(images):
    for ours, image in zip(unpacked(thin_bits(packed(images)), len(images)), images, strict=True):
        np.testing.assert_array_equal(ours, thin(image))


def test_64_images_of_noise_at_all_densities():
    noise = np.random.default_rng(0).random((31, 45))
    assert_thinned([noise > threshold for threshold in np.linspace(0, 1, 64)])


@pytest.mark.parametrize("scale", [1, 3, 6])
def test_blobs_that_take_many_passes(scale):
    smooth = ndimage.gaussian_filter(np.random.default_rng(scale).standard_normal((60, 70)), scale)
    assert_thinned([smooth > np.quantile(smooth, q) for q in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)])


def test_independent_images_do_not_touch_one_another():
    rng = np.random.default_rng(1)
    assert_thinned([rng.random((20, 20)) > 0.4 for _ in range(64)])


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2)])
def test_small_images_and_full_ones(shape):
    assert_thinned([np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool)])


def test_the_argument_is_left_alone():
    words = packed([np.ones((8, 8), dtype=bool)])
    before = words.copy()
    thin_bits(words)
    np.testing.assert_array_equal(words, before)
