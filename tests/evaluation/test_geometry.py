"""Normals and depth against NumPy over all pixels at once."""

import numpy as np
import pytest
import torch

from ase_dist.evaluation.metrics import build_metric

from .conftest import TASK_OF_KIND, random_image

pytestmark = pytest.mark.single_gpu
NORMALS, DEPTH = TASK_OF_KIND["normals"], TASK_OF_KIND["depth"]


def scored(task, images, device):
    metric = build_metric(task)
    for prediction, label in images:
        metric.update(prediction.to(device), label.to(device))
    return metric.result()


def test_angles_agree_with_the_arc_cosine_of_all_pixels(device):
    images = [random_image(NORMALS, seed=seed, height=8 + 5 * seed) for seed in range(4)]
    a = np.concatenate([p.double().numpy().reshape(3, -1) for p, _ in images], axis=1)
    b = np.concatenate([y.double().numpy().reshape(3, -1) for _, y in images], axis=1)
    a, b = (v[:, (b != 0).any(axis=0)] for v in (a, b))
    cosine = (a * b).sum(0) / np.linalg.norm(a, axis=0) / np.linalg.norm(b, axis=0)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    result = scored(NORMALS, images, device)
    assert result["mean"] == pytest.approx(angle.mean(), rel=1e-6)
    assert result["rmse"] == pytest.approx(np.sqrt((angle**2).mean()), rel=1e-6)
    assert result["median"] == pytest.approx(np.quantile(angle, 0.5, method="inverted_cdf"), abs=0.00501)
    for limit in (11.25, 22.5, 30.0):
        assert result[f"within_{limit:g}"] == pytest.approx(100 * (angle < limit).mean(), abs=1e-9)


def test_lengths_do_not_matter_and_no_direction_is_90_degrees_off(device):
    label = torch.zeros(3, 1, 4)
    label[2] = 1
    prediction = torch.zeros(3, 1, 4)
    prediction[2, 0, :2] = torch.tensor([5.0, -0.1])  # 0 and 180 degrees; the other two have no direction
    result = scored(NORMALS, [(prediction, label)], device)
    assert result["mean"] == pytest.approx(90)
    assert result["median"] == pytest.approx(90, abs=0.00501)


def test_tiny_angles_are_measured(device):
    label = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).view(3, 1, 1)
    prediction = torch.tensor([np.radians(1e-4), 0.0, 1.0], dtype=torch.float64).view(3, 1, 1)
    assert scored(NORMALS, [(prediction, label)], device)["mean"] == pytest.approx(1e-4, rel=1e-6)


def test_depth_agrees_with_numpy(device):
    images = [random_image(DEPTH, seed=seed, height=8 + 5 * seed) for seed in range(4)]
    p = np.concatenate([p.double().numpy().ravel() for p, _ in images])
    d = np.concatenate([y.double().numpy().ravel() for _, y in images])
    p, d = p[d > 0], d[d > 0]
    positive = np.maximum(p, 1e-3)
    worst = np.maximum(positive / d, d / positive)
    result = scored(DEPTH, images, device)
    assert result["rmse"] == pytest.approx(np.sqrt(((p - d) ** 2).mean()))
    assert result["abs_err"] == pytest.approx(abs(p - d).mean())
    assert result["rel"] == pytest.approx((abs(p - d) / d).mean())
    assert result["log10"] == pytest.approx(abs(np.log10(positive) - np.log10(d)).mean())
    for k in (1, 2, 3):
        assert result[f"delta{k}"] == pytest.approx(100 * (worst < 1.25**k).mean())
