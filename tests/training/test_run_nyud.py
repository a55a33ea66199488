"""NYUD-v2 from files to scores: a run on its four tasks, with the depth loss and every metric."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.conftest import start_world
from tests.training.tiny_runs import losses, tiny_run

pytestmark = pytest.mark.single_gpu

TASKS = ("semseg", "depth", "normals", "edge")


def write_folder(root):
    """NYUD_MT with the file types of the public repacks: a floor whose depth and colour go from left to right."""
    rng = np.random.default_rng(0)
    names = [f"{i:04d}" for i in range(6)]
    for folder in ("images", "segmentation", "depth", "normals", "edge", "gt_sets"):
        (root / folder).mkdir(parents=True)
    for name in names:
        ramp = np.linspace(1, 8, 48)[None].repeat(36, 0) + rng.uniform(0, 1)
        Image.fromarray((ramp[..., None] * (25, 10, 20)).astype(np.uint8)).save(root / f"images/{name}.jpg")
        Image.fromarray((ramp * 4).astype(np.uint8)).save(root / f"segmentation/{name}.png")
        np.save(root / f"depth/{name}.npy", ramp.astype(np.float32))
        np.save(root / f"normals/{name}.npy", np.float32([0, -0.6, 0.8])[None, None].repeat(36, 0).repeat(48, 1))
        np.save(root / f"edge/{name}.npy", np.eye(36, 48, dtype=np.float32))
    (root / "gt_sets/train.txt").write_text("\n".join(names[:4]))
    (root / "gt_sets/val.txt").write_text("\n".join(names[4:]))
    return root


def one_run(rank, folder):
    return tiny_run(folder / "NYUD_MT", folder / "run", "data.name=nyud", "eval.at_start=true", "train.max_steps=12",
                    "checkpoint.every=0", "train.lr=5e-3", "data.augmentation=none")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nyud")
    write_folder(folder / "NYUD_MT")
    codes, results = start_world(one_run, folder, seconds=200)()
    assert (codes, results) == ([0], [0])
    return folder / "run"


def test_every_task_has_a_finite_loss_that_falls(run):
    found = losses(run)
    first, last = found[min(found)], found[max(found)]
    assert set(TASKS) <= set(first)
    assert all(math.isfinite(value) for step in found.values() for value in step.values())
    assert last["depth"] < first["depth"]


def test_every_metric_of_its_table_is_scored(run):
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    for task, wanted in (("semseg", "miou"), ("depth", "rmse"), ("normals", "mean"), ("edge", "bce")):
        assert math.isfinite(metrics[task][wanted])
    assert 0 < metrics["depth"]["rmse"] < 10
    assert 0 <= metrics["normals"]["mean"] <= 180
