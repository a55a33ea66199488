"""Random labels and predictions of every kind of task, and edge maps with several annotators."""

import sys

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.io import loadmat
from skimage.morphology import thin

from ase_dist.tasks import IGNORE, NYUD_TASKS, PASCAL_TASKS

TASK_OF_KIND = {
    "classes": PASCAL_TASKS["human_parts"],
    "mask": PASCAL_TASKS["saliency"],
    "edges": PASCAL_TASKS["edge"],
    "normals": PASCAL_TASKS["normals"],
    "depth": NYUD_TASKS["depth"],
}

with_pyedgeeval = pytest.mark.skipif(sys.version_info >= (3, 13), reason="pyEdgeEval cannot be built by Python 3.13")


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_image(task, *, seed, height=13, width=17):
    """(decoded prediction, label) of one image, with a tenth of the pixels ignored."""
    generator = torch.Generator().manual_seed(seed)
    shape = {"normals": (3, height, width), "depth": (1, height, width)}.get(task.kind, (height, width))
    ignored = torch.rand(height, width, generator=generator) < 0.1
    if task.kind == "classes":
        prediction, label = (torch.randint(task.channels, shape, generator=generator) for _ in range(2))
        label = torch.where(torch.rand(shape, generator=generator) < 0.5, prediction, label)
        return prediction.to(torch.uint8), label.masked_fill(ignored, IGNORE).to(torch.uint8)
    if task.kind in ("mask", "edges"):
        label = (torch.rand(shape, generator=generator) < 0.3).long()
        prediction = (0.5 * label + 0.6 * torch.rand(shape, generator=generator)).clamp(0, 1)
        return prediction, label.masked_fill(ignored, IGNORE).to(torch.uint8)
    label = torch.randn(shape, generator=generator)
    label = torch.nn.functional.normalize(label, dim=0) if task.kind == "normals" else 0.5 + 5 * label.abs()
    prediction = label + 0.4 * torch.randn(shape, generator=generator)
    prediction = torch.nn.functional.normalize(prediction, dim=0) if task.kind == "normals" else prediction
    return prediction, label.masked_fill(ignored, 0)


def borders(labels):
    """The thinned borders of a label map, as the edge task defines them."""
    return thin(ndimage.laplace(labels.astype(float), mode="nearest") != 0)


def warped(labels, rng, *, pixels):
    noise = np.stack([smooth_noise(rng, labels.shape, scale=8) for _ in range(2)])
    return ndimage.map_coordinates(labels, np.indices(labels.shape) + pixels * noise, order=0, mode="nearest")


def smooth_noise(rng, shape, *, scale):
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), scale)
    return noise / noise.std()


def edge_sample(labels, *, seed, annotators=1, shift=1.5, noise=0.15):
    """(prediction, ground truths): borders of a warped map, blurred, with noise; annotators draw differently."""
    rng = np.random.default_rng(seed)
    truths = [borders(labels), *(borders(warped(labels, rng, pixels=1.5)) for _ in range(annotators - 1))]
    blurred = ndimage.gaussian_filter(borders(warped(labels, rng, pixels=shift)).astype(float), 1.5)
    return np.clip(blurred / blurred.max() + noise * smooth_noise(rng, labels.shape, scale=1.5), 0, 1), truths


def region_labels(*, seed, height=96, width=128, regions=12):
    """A map of regions nearest to random points."""
    points = np.random.default_rng(seed).uniform((0, 0), (height, width), size=(regions, 2))
    pixels = np.stack(np.indices((height, width)), axis=-1)[:, :, None]
    return ((pixels - points) ** 2).sum(axis=-1).argmin(axis=-1)


def generated_samples(count, **options):
    """Predictions and ground truths of ``count`` generated images."""
    samples = [edge_sample(region_labels(seed=seed), seed=seed, **options) for seed in range(count)]
    return [prediction for prediction, _ in samples], [truths for _, truths in samples]


@pytest.fixture(scope="session")
def photograph_labels(shared_data):
    """LabelMaps of the first real photographs; skips where the shared data is absent."""
    files = sorted((shared_data / "data" / "ccp_mt" / "pascal-context" / "trainval").glob("*.mat"))
    return [loadmat(str(file))["LabelMap"].astype(int) for file in files[:24]]
