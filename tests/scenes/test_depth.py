"""Depth of scenes is the ray tracer's: of one surface with the normals at every warp; made only when it is wanted."""

import math

import numpy as np
import pytest

from ase_dist.data.augmentation import Warp
from ase_dist.data.batch import Record
from ase_dist.data.labels import codes_from_normals
from ase_dist.data.loader import open_dataset
from ase_dist.data.transforms import Transform
from ase_dist.read_config import load_settings
from ase_dist.scenes.classes import CONTEXT
from ase_dist.scenes.compose import compose
from ase_dist.scenes.render import DEPTH_RANGE, render_depth, render_scene
from ase_dist.tasks import NYUD_TASKS, select_tasks
from tests.data.test_augmentation import normals_of_depth

pytestmark = pytest.mark.single_gpu

GEOMETRY = (NYUD_TASKS["depth"], NYUD_TASKS["normals"])
SEED, ROOM, SIZE = 5, 4, 320


def test_the_floor_lies_at_the_height_of_the_camera():
    scene, depth = render_scene(seed=SEED, index=ROOM, size=64), render_depth(seed=SEED, index=ROOM, size=64)
    camera = compose(np.random.default_rng([SEED, ROOM])).camera
    down = ((np.arange(64) + 0.5 - 32) * 2 * camera.tangent / 64)[:, None]  # of the ray, per metre along the axis
    height = camera.height - depth * (math.sin(camera.pitch) + down * math.cos(camera.pitch))
    floor = (scene.label_map == CONTEXT["floor"]) & (depth > 0)
    assert floor.sum() > 100
    np.testing.assert_allclose(height[floor], 0, atol=1e-4)
    assert depth.dtype == np.float32 and depth[depth > 0].min() > 0.5 and depth.max() <= DEPTH_RANGE


def test_the_sky_has_no_depth():
    shown = [(render_scene(seed=SEED, index=i, size=32), render_depth(seed=SEED, index=i, size=32)) for i in range(12)]
    sky = [depth[scene.label_map == CONTEXT["sky"]] for scene, depth in shown]
    assert sum(map(len, sky)) > 100 and not any(values.any() for values in sky)


def test_normals_of_the_warped_depth_are_the_warped_normals():
    scene, depth = render_scene(seed=SEED, index=ROOM, size=SIZE), render_depth(seed=SEED, index=ROOM, size=SIZE)
    focal = SIZE / (2 * compose(np.random.default_rng([SEED, ROOM])).camera.tangent)
    labels = {"depth": depth, "normals": codes_from_normals(scene.normals.transpose(2, 0, 1))}
    record = Record(0, "room", scene.image, labels)
    for flip, scale, degrees in ((False, 1, 0), (True, 0.75, 20), (False, 1.25, -13), (True, 1.25, 0)):
        warp = Warp(flip=flip, scale=scale, angle=math.radians(degrees))
        medians = {}
        for preset in ("eigen", "astmt"):
            sample = Transform(40, tasks=GEOMETRY, augmentation=preset).warped_sample(record, warp)
            found = (
                normals_of_depth(
                    sample.labels["depth"][0].numpy().astype(np.float64), warp, shape=(SIZE, SIZE), focal=focal
                )
                * np.array([1, 1, -1])[:, None, None]
            )  # z towards the viewer in PASCAL-Context's labels
            label = sample.labels["normals"].numpy()
            flat = np.ones((38, 38), bool)  # where the label is that of all neighbours
            for y in range(3):
                for x in range(3):
                    flat &= (label[:, 1:-1, 1:-1] * label[:, y : y + 38, x : x + 38]).sum(0) > 0.999
            flat &= np.abs(found[2]) > 0.35
            assert flat.sum() > 100
            angles = np.degrees(np.arccos(np.clip((found * label[:, 1:-1, 1:-1]).sum(0)[flat], -1, 1)))
            medians[preset] = np.median(angles)
        assert medians["eigen"] < 2.5
        assert scale == 1 or medians["astmt"] > medians["eigen"] + 2


def test_depth_is_added_where_a_task_wants_it_and_nothing_else_changes(tmp_path):
    size = ("data.scenes.train_images=3", "data.scenes.val_images=2", "data.scenes.size=40", f"data.root={tmp_path}")
    settings = load_settings(None, size)
    assert [task.name for task in settings.chosen_tasks()] == [task.name for task in select_tasks("scenes")]
    assert "depth" not in [task.name for task in select_tasks("scenes")]
    place = open_dataset(settings, settings.chosen_tasks(), split="train").root
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert not (place / "depth").exists()
    wanted = load_settings(None, [*size, "tasks=[semseg,depth]"])
    for split, count, first in (("train", 3, 0), ("val", 2, 500_000)):
        data = open_dataset(wanted, wanted.chosen_tasks(), split=split)
        assert data.root == place and len(data) == count
        np.testing.assert_array_equal(data[0].labels["depth"], render_depth(seed=0, index=first, size=40))
    after = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert sorted(path.parent.name for path in after.keys() - before.keys()) == ["depth"] * 5
    assert not [path for path in place.iterdir() if path.name.startswith(".depth.making")]
