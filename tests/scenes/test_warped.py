"""The augmentation of a scene is the scene seen through a mirror or by a turned camera: picture and every label."""

import math

import numpy as np
import pytest

from ase_dist import imagenet
from ase_dist.data.augmentation import Warp
from ase_dist.data.pascal_context import PascalContext
from ase_dist.data.transforms import Transform
from ase_dist.scenes.layout import make_folders, write_lists, write_scene
from ase_dist.scenes.render import render_scene
from ase_dist.tasks import select_tasks

pytestmark = pytest.mark.single_gpu

ALL = select_tasks("pascal_context")
FLAT = ("semseg", "human_parts", "saliency")
SIZE = 61
SCENES = (2, 4, 7)  # rooms: large surfaces with normals
EXACT = {"mirror": (True, 0.0), "quarter": (False, 90.0), "half": (False, 180.0), "mirror and quarter": (True, 90.0)}


def read(root, *, warp, **camera):
    """The training samples, under ``warp``, of the scenes rendered by ``camera`` and read from files."""
    make_folders(root)
    write_lists(root, seed=5, train=SCENES, val=())
    (root / "ImageSets/Context/val.txt").unlink()
    names = [path.strip() for path in (root / "ImageSets/Context/train.txt").read_text().split()]
    for name, index in zip(names, SCENES, strict=True):
        write_scene(root, name, render_scene(seed=5, index=index, size=SIZE, **camera))
    transform = Transform(SIZE, tasks=ALL, augmentation="astmt")
    return [transform.warped_sample(record, warp) for record in PascalContext(root, "train", ALL)]


def pairs(tmp_path, *, flip, roll):
    """(warped sample, sample of the scene rendered so); a positive roll turns the picture counter-clockwise."""
    warped = read(tmp_path / "upright", warp=Warp(flip=flip, angle=-math.radians(roll)))
    return zip(warped, read(tmp_path / "turned", warp=Warp(), flip=flip, roll=roll), strict=True)


def degrees(a, b):
    """Angles between unit vectors where both are valid."""
    valid = (a.norm(dim=0) > 0) & (b.norm(dim=0) > 0)
    return np.degrees(np.arccos(np.clip((a * b).sum(0)[valid].numpy(), -1, 1)))


@pytest.mark.parametrize(("flip", "roll"), EXACT.values(), ids=EXACT)
def test_exact_views(tmp_path, flip, roll):
    for warped, rendered in pairs(tmp_path, flip=flip, roll=roll):
        for task in FLAT:
            np.testing.assert_array_equal(warped.labels[task], rendered.labels[task])
        normals, wanted = warped.labels["normals"], rendered.labels["normals"]
        np.testing.assert_array_equal(normals.norm(dim=0) > 0, wanted.norm(dim=0) > 0)
        assert degrees(normals, wanted).max() < 0.6  # two roundings to 8 bits
        difference = np.abs((warped.image - rendered.image).numpy()) * np.array(imagenet.STD)[:, None, None] * 255
        assert difference.mean() < 4  # two JPEG files


@pytest.mark.parametrize(("flip", "roll"), [(False, 15.0), (True, -20.0)])
def test_any_turn(tmp_path, flip, roll):
    for warped, rendered in pairs(tmp_path, flip=flip, roll=roll):
        inside = warped.labels["semseg"] != 255
        assert 0.7 < inside.float().mean() < 1
        for task in ("semseg", "saliency"):
            same = warped.labels[task][inside] == rendered.labels[task][inside]
            assert same.float().mean() > 0.93  # all but borders, which are sampled anew
        turned = degrees(warped.labels["normals"], rendered.labels["normals"])
        assert np.median(turned) < 1
        assert (turned < 5).mean() > 0.6  # fine relief is sampled anew too
