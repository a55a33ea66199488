"""The warp against slow references and analytic fields; ignored outside; the same sample wherever it is made."""

import math

import numpy as np
import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.v2 import functional as tv

from ase_dist import imagenet
from ase_dist.data.augmentation import Warp
from ase_dist.data.batch import Record
from ase_dist.data.labels import codes_from_normals, normals_from_codes
from ase_dist.data.transforms import Transform, normalise
from ase_dist.image_size import ImageSize
from ase_dist.tasks import NYUD_TASKS, PASCAL_TASKS

pytestmark = pytest.mark.single_gpu

TASKS = (*PASCAL_TASKS.values(), NYUD_TASKS["depth"])
WARPS = [
    Warp(),
    Warp(flip=True),
    Warp(scale=0.75, angle=math.radians(-20)),
    Warp(flip=True, scale=1.25, angle=math.radians(13)),
]


def make_record(height, width, *, seed=0):
    rng = np.random.default_rng(seed)
    labels = {
        "semseg": rng.integers(0, 21, (height, width), dtype=np.uint8),
        "human_parts": rng.integers(0, 7, (height, width), dtype=np.uint8),
        "saliency": rng.integers(0, 2, (height, width), dtype=np.uint8),
        "edge": rng.integers(0, 2, (height, width), dtype=np.uint8),
        "normals": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "depth": rng.uniform(1, 9, (height, width)).astype(np.float32),
    }
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Record(3, "a", image, labels)


def transform(size, *, augmentation="astmt"):
    return Transform(size, tasks=TASKS, augmentation=augmentation)


def as_bytes(image_3SS):
    """The inverse of the normalisation: float64 [S, S, 3] in 0..255."""
    mean, std = (np.array(values)[:, None, None] for values in (imagenet.MEAN, imagenet.STD))
    return ((image_3SS.numpy().astype(np.float64) * std + mean) * 255).transpose(1, 2, 0)


def forward(warp, points, *, shape, size):
    """Where the warp takes complex points x + iy of an image [H, W] in an output of ``size``, in three steps."""
    centre = complex(shape[1] / 2, shape[0] / 2)
    p = points - centre
    p = -p.conjugate() if warp.flip else p
    p = p * warp.scale * np.exp(1j * warp.angle) + centre
    height, width = ImageSize.read(size)
    return p.real * width / shape[1] + 1j * (p.imag * height / shape[0])


def output_centres(size):
    height, width = ImageSize.read(size)
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return x + 1j * y


def source_points(warp, *, shape, size):
    """The original points under the output's pixel centres: ``forward`` undone step by step."""
    centre = complex(shape[1] / 2, shape[0] / 2)
    height, width = ImageSize.read(size)
    p = output_centres(size)
    p = p.real * shape[1] / width + 1j * (p.imag * shape[0] / height) - centre
    p = p / (warp.scale * np.exp(1j * warp.angle))
    p = -p.conjugate() if warp.flip else p
    return p + centre


# --- geometry --------------------------------------------------------------------------------------------------------


def test_no_warp_at_the_images_size_changes_nothing():
    record = make_record(17, 17)
    sample = transform(17, augmentation="none").train_sample(record, seed=0, epoch=0)
    torch.testing.assert_close(sample.image, normalise(record.image))
    for task in ("semseg", "human_parts", "saliency", "edge"):
        np.testing.assert_array_equal(sample.labels[task], record.labels[task])
    np.testing.assert_array_equal(sample.labels["depth"], record.labels["depth"][None])
    np.testing.assert_array_equal(sample.labels["normals"], normals_from_codes(record.labels["normals"]))
    assert (sample.index, sample.name) == (3, "a")


def test_mirroring_alone():
    record = make_record(9, 9)
    sample = transform(9).warped_sample(record, Warp(flip=True))
    torch.testing.assert_close(sample.image, normalise(record.image).flip(-1))
    np.testing.assert_array_equal(sample.labels["semseg"], record.labels["semseg"][:, ::-1])
    mirrored = normals_from_codes(record.labels["normals"])[:, :, ::-1] * np.array([-1, 1, 1])[:, None, None]
    np.testing.assert_allclose(sample.labels["normals"], mirrored, atol=1e-6)


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("size", [ImageSize(20, 20), ImageSize(16, 28), ImageSize(28, 16)], ids=str)
def test_source_undoes_flip_scale_rotate_resize(warp, size):
    shape = (31, 47)
    matrix, offset = warp.source(shape, size)
    x, y = np.meshgrid(np.arange(47.0), np.arange(31.0))
    out = forward(warp, x + 1j * y, shape=shape, size=size)
    back = np.einsum("ij,jhw->ihw", matrix, np.stack([out.real, out.imag])) + offset[:, None, None]
    np.testing.assert_allclose(back, np.stack([x, y]), atol=1e-9)


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("size", [ImageSize(20, 20), ImageSize(16, 28), ImageSize(28, 16)], ids=str)
def test_every_label_takes_the_pixel_under_its_centre_or_is_ignored(warp, size):
    shape = (31, 47)
    record = make_record(*shape)
    labels = transform(size).warped_sample(record, warp).labels
    points = source_points(warp, shape=shape, size=size)
    normals = normals_from_codes(record.labels["normals"], turn=warp.turn)
    inside = 0
    assert labels["semseg"].shape == size and labels["depth"].shape == (1, *size)
    for i in range(size.height):
        for j in range(size.width):
            row, column = math.floor(points[i, j].imag), math.floor(points[i, j].real)
            if 0 <= row < shape[0] and 0 <= column < shape[1]:
                inside += 1
                for task in ("semseg", "human_parts", "saliency", "edge"):
                    assert labels[task][i, j] == record.labels[task][row, column]
                assert labels["depth"][0, i, j] == pytest.approx(record.labels["depth"][row, column] / warp.scale)
                np.testing.assert_allclose(labels["normals"][:, i, j], normals[:, row, column], atol=1e-6)
            else:
                assert all(labels[task][i, j] == 255 for task in ("semseg", "human_parts", "saliency", "edge"))
                assert not labels["normals"][:, i, j].any()
                assert labels["depth"][0, i, j] == 0
    assert warp.scale > 1 or (inside < size.height * size.width) == (warp.scale < 1)


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("size", [ImageSize(40, 40), ImageSize(32, 56), ImageSize(56, 32)], ids=str)
def test_the_image_moves_with_its_labels(warp, size):
    """A cubic kernel reproduces a ramp, so the colour tells which original point is seen."""
    shape = (60, 90)
    x, y = np.meshgrid(np.arange(90) + 0.5, np.arange(60) + 0.5)
    image = np.stack([2 * x, 3 * y, 0 * x + 50], axis=-1)
    record = Record(0, "ramp", np.rint(image).astype(np.uint8), {})
    seen = as_bytes(Transform(size, tasks=(), augmentation="astmt").warped_sample(record, warp).image)
    points = source_points(warp, shape=shape, size=size)
    inner = (points.real > 2) & (points.real < 88) & (points.imag > 2) & (points.imag < 58)
    np.testing.assert_allclose(seen[inner, 0], 2 * points.real[inner], atol=1.6)
    np.testing.assert_allclose(seen[inner, 1], 3 * points.imag[inner], atol=1.6)
    outside = (points.real < 0) | (points.real > 90) | (points.imag < 0) | (points.imag > 60)
    assert outside.any() == (warp.scale < 1 or warp.angle != 0)
    np.testing.assert_allclose(
        seen[outside], np.broadcast_to(255 * np.array(imagenet.MEAN), seen[outside].shape), atol=0.5
    )


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warp", WARPS)
def test_a_warped_normal_field_is_the_field_of_the_warped_surface(warp):
    """The normals of a surface z = h(x, y) seen turned, mirrored and scaled, against those of the turned surface."""
    shape, size = (64, 64), 64
    centre = 32 + 32j

    def field(points, bump):
        """Normals of a slope plus a bump at ``bump``; ``points`` are relative to the centre."""
        away = points - bump
        slope = 0.4 * bump / abs(bump)
        n = np.stack([slope.real + away.real / 40, slope.imag + away.imag / 40, np.ones(points.shape)])
        return n / np.linalg.norm(n, axis=0)

    bump = 9 + 4j
    x, y = np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5)
    codes = codes_from_normals(field(x + 1j * y - centre, bump))
    record = Record(0, "bump", np.zeros((*shape, 3), np.uint8), {"normals": codes})
    task = (PASCAL_TASKS["normals"],)
    warped = Transform(size, tasks=task, augmentation="astmt").warped_sample(record, warp).labels["normals"].numpy()

    # The surface magnified by s has its bump at s times the place, and the same slope at corresponding points.
    moved = -bump.conjugate() if warp.flip else bump
    moved = moved * np.exp(1j * warp.angle)
    expected = field((output_centres(size) - centre) / warp.scale, moved)
    valid = np.linalg.norm(warped, axis=0) > 0
    assert valid.mean() > 0.5
    np.testing.assert_allclose(np.linalg.norm(warped, axis=0)[valid], 1, atol=1e-6)
    degrees = np.degrees(np.arccos(np.clip((warped * expected).sum(0)[valid], -1, 1)))
    assert degrees.max() < 2  # nearest: up to 0.7 pixels / 0.75 away, at 1 / 40 a pixel


def test_normalise_is_torchvisions():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = torch.from_numpy(image).permute(2, 0, 1) / 255
    reference = tv.normalize(picture, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    torch.testing.assert_close(normalise(image), reference)


def test_cubic_overshoot_is_clipped_and_does_not_wrap():
    """Beside a black-white edge a cubic kernel goes below 0 and above 255: there a wrap would invert the colour."""
    image = np.zeros((20, 20, 3), np.uint8)
    image[:, 10:] = 255
    record = Record(0, "edge", image, {})
    seen = as_bytes(Transform(33, tasks=(), augmentation="astmt").warped_sample(record, Warp()).image)
    assert seen.min() > -0.01
    assert seen.max() < 255.01
    assert (np.diff(seen[0, :, 0]) > -0.01).all()


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_resizes_the_image_only():
    record = make_record(24, 40)
    sample = transform(16).eval_sample(record)
    assert sample.image.shape == (3, 16, 16)
    torch.testing.assert_close(
        sample.image, transform(16, augmentation="none").train_sample(record, seed=0, epoch=0).image
    )
    np.testing.assert_array_equal(sample.labels["semseg"], record.labels["semseg"])
    assert sample.labels["normals"].shape == (3, 24, 40)
    assert sample.labels["depth"].shape == (1, 24, 40)


@pytest.mark.parametrize("evaluation", [True, False])
def test_samples_share_no_memory_with_the_record(evaluation):
    record, untouched = make_record(12, 12), make_record(12, 12)
    plain = transform(12, augmentation="none")
    sample = plain.eval_sample(record) if evaluation else plain.train_sample(record, seed=0, epoch=0)
    for tensor in (sample.image, *sample.labels.values()):
        tensor.zero_()
    np.testing.assert_array_equal(record.image, untouched.image)
    for task, label in untouched.labels.items():
        np.testing.assert_array_equal(record.labels[task], label)
