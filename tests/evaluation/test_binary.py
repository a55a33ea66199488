"""Saliency against torchmetrics and pysodmetrics, edges against PyTorch's loss."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ase_dist.evaluation.binary import EdgesMetric, MaskMetric
from ase_dist.evaluation.metrics import build_metric
from ase_dist.tasks import IGNORE

from .conftest import TASK_OF_KIND, random_image

pytestmark = pytest.mark.single_gpu
MASK, EDGES = TASK_OF_KIND["mask"], TASK_OF_KIND["edges"]
THRESHOLDS = np.arange(4, 19) / 20


def saliency_result(images, device):
    metric = build_metric(MASK)
    assert isinstance(metric, MaskMetric)
    for prediction, label in images:
        metric.update(prediction.to(device), label.to(device))
    return metric.result()


def test_miou_is_the_best_threshold_of_the_mean_jaccard(device):
    from torchmetrics.functional.classification import binary_jaccard_index

    images = [random_image(MASK, seed=seed, height=8 + 3 * seed) for seed in range(5)]
    means = [
        np.mean([float(binary_jaccard_index(p, y.long(), threshold=float(t), ignore_index=IGNORE))
                 for p, y in images]) for t in THRESHOLDS
    ]  # fmt: skip
    result = saliency_result(images, device)
    assert result["miou"] == pytest.approx(100 * max(means), rel=1e-5)
    assert result["miou_threshold"] == pytest.approx(THRESHOLDS[int(np.argmax(means))])


def test_an_empty_prediction_of_an_empty_mask_is_right(device):
    empty, full = torch.zeros(4, 4), torch.ones(4, 4)
    label = torch.zeros(4, 4, dtype=torch.uint8)
    assert saliency_result([(empty, label)], device)["miou"] == 100
    assert saliency_result([(full, label)], device)["miou"] == 0
    assert saliency_result([(empty, label), (full, label)], device)["miou"] == 50


def test_maxf_is_from_the_counts_of_the_whole_set(device):
    images = [random_image(MASK, seed=seed, height=8 + 3 * seed) for seed in range(5)]
    p = torch.cat([(255 * p).round()[y != IGNORE] for p, y in images]).numpy()
    y = torch.cat([y[y != IGNORE] for _, y in images]).numpy() == 1
    curve = []
    for level in range(256):
        hits = (y & (p >= level)).sum()
        precision, recall = hits / max((p >= level).sum(), 1), hits / y.sum()
        curve.append(1.3 * precision * recall / max(0.3 * precision + recall, 1e-12))
    result = saliency_result(images, device)
    assert result["maxf"] == pytest.approx(100 * max(curve))
    assert result["maxf_threshold"] == int(np.argmax(curve)) / 255


def test_maxf_and_mae_of_one_image_agree_with_pysodmetrics(device):
    import py_sod_metrics as sod

    prediction, label = random_image(MASK, seed=3, height=40, width=50)
    label = torch.where(label == IGNORE, 0, label)
    levels = (255 * prediction).round().to(torch.uint8)
    levels[0, 0], levels[0, 1] = 0, 255  # it stretches predictions to 0..1; these two make that change nothing
    fmeasure, mae = sod.Fmeasure(beta=0.3), sod.MAE()
    for oracle in (fmeasure, mae):
        oracle.step(pred=levels.numpy(), gt=255 * label.numpy())
    result = saliency_result([(levels.float() / 255, label)], device)
    assert result["maxf"] == pytest.approx(100 * fmeasure.get_results()["fm"]["curve"].max(), rel=1e-6)
    assert result["mae"] == pytest.approx(mae.get_results()["mae"], rel=1e-5)


def test_mae_is_averaged_over_images(device):
    small, large = torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(9, 9, dtype=torch.uint8)
    images = [(torch.full((2, 2), 0.8), small), (torch.full((9, 9), 0.2), large)]
    assert saliency_result(images, device)["mae"] == pytest.approx(0.5)


def test_bce_is_the_weighted_loss_over_the_valid_pixels_of_the_set(device):
    metric = build_metric(EDGES)
    assert isinstance(metric, EdgesMetric)
    losses, edges = [], []
    for seed in range(4):
        prediction, label = random_image(EDGES, seed=seed, height=8 + 3 * seed)
        prediction = prediction.clamp(0.01, 0.99)
        metric.update(prediction.to(device), label.to(device))
        valid = label != IGNORE
        weight = torch.where(label == 1, 0.95, 0.05)[valid]
        logits, target = prediction.double().logit()[valid], (label == 1).double()[valid]
        losses.append(F.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="none"))
        edges.append(target)
    result = metric.result()
    assert result["bce"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-6)
    assert result["edge_share"] == pytest.approx(100 * float(torch.cat(edges).mean()))


def test_bce_of_a_certain_mistake_is_finite(device):
    metric = build_metric(EDGES)
    metric.update(torch.zeros(3, 3, device=device), torch.ones(3, 3, dtype=torch.uint8, device=device))
    assert metric.result()["bce"] == pytest.approx(0.95 * 16.118, rel=1e-4)
