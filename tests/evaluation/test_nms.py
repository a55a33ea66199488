"""Suppression keeps ridges, and equals the compiled toolbox code that pyEdgeEval carries."""

import numpy as np
import pytest

from ase_dist.evaluation.nms import orientation, smooth, suppress_non_maxima

from .conftest import edge_sample, region_labels, with_pyedgeeval

pytestmark = pytest.mark.single_gpu


@pytest.mark.parametrize("degrees", [2, 30, 45, 88, 120])
def test_a_blurred_line_becomes_its_ridge(degrees):
    y, x = np.indices((64, 64)) - 31.5
    distance = np.abs(x * np.cos(np.radians(degrees)) + y * np.sin(np.radians(degrees)))
    inner = slice(10, -10), slice(10, -10)
    kept = suppress_non_maxima(np.exp(-((distance / 4) ** 2)))[inner] > 0
    distance = distance[inner]
    assert (distance[kept] < 1).mean() > 0.95  # of a line that is about 12 pixels wide
    assert kept[distance < 0.3].all()


def test_the_border_fades():
    strength = suppress_non_maxima(np.ones((30, 40)), border=5)
    np.testing.assert_allclose(strength[15, :6], [0, 0.2, 0.4, 0.6, 0.8, 1])
    np.testing.assert_allclose(strength[-6:, 20], [1, 0.8, 0.6, 0.4, 0.2, 0])


def test_smoothing_is_a_convolution_with_a_mirrored_border():
    image = np.random.default_rng(0).random((9, 12))
    weights = np.array([1, 2, 3, 2, 1]) / 9
    mirrored = np.pad(image, 2, mode="symmetric")
    expected = sum(weights[i] * weights[j] * mirrored[i : i + 9, j : j + 12] for i in range(5) for j in range(5))
    np.testing.assert_allclose(smooth(image, radius=2), expected)


@with_pyedgeeval
@pytest.mark.parametrize("radius", [1, 2])
def test_equals_the_compiled_toolbox(radius):
    from pyEdgeEval._lib import nms as compiled

    prediction, _ = edge_sample(region_labels(seed=0), seed=0)
    strength = smooth(prediction, radius=1)
    expected = compiled(strength, orientation(strength), r=radius, s=5, m=1.01)
    np.testing.assert_allclose(suppress_non_maxima(prediction, radius=radius), expected, atol=1e-12)


@with_pyedgeeval
def test_nearly_equals_the_whole_of_pyedgeeval():
    """It replaces only zeros of a second derivative by 1e-5 where the toolbox adds 1e-5: other angles, rarely."""
    from pyEdgeEval.preprocess import fast_nms

    prediction, _ = edge_sample(region_labels(seed=1), seed=1)
    same = (fast_nms(prediction) > 0) == (suppress_non_maxima(prediction) > 0)
    assert same.mean() > 0.998
