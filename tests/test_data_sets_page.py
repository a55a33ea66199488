"""docs/data_sets.md followed to the letter, on small folders in the layout of LibMTL's benchmarks."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ase_dist import load
from ase_dist.tasks import DATA_SETS
from tests.data.libmtl_folders import write_libmtl
from tests.training.conftest import start_world
from tests.training.test_run_nyud import write_folder

pytestmark = pytest.mark.single_gpu

PAGE = (Path(__file__).parents[1] / "docs" / "data_sets.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
SMALL = (
    "data.size=[32, 48]",
    "data.workers=0",
    "model.backbone=vit_tiny_patch16_224",
    "model.backbone_args={embed_dim: 24, depth: 1, num_heads: 2}",
    "model.pretrained=none",
    "model.head=linear",
    "model.moe.num_experts=4",
    "model.moe.k=2",
    "train.epochs=null",
    "train.max_steps=2",
    "train.batch_size=2",
    "train.log_every=1",
    "train.warmup_steps=0",
    "eval.batch_size=2",
    "eval.pictures=1",
    "monitor.tensorboard=false",
)


def follow(rank, folder):
    """Every command of the page in its order, short runs on fewer images than are published."""
    from ase_dist.commands.main import main
    from ase_dist.training.process import runtime
    from ase_dist.training.record import plots

    runtime.stop = lambda: None  # DeepSpeed joins a process group once in a process
    plots.draw_all = lambda folder: None
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    sys.path[:] = [place for place in sys.path if place not in ("", str(folder))]
    codes = []
    for line in COMMANDS:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "ase_dist"]
        more = {"train": SMALL, "prepare_data": ("--subset", "--workers", "1")}.get(words[3], ())
        codes.append(main([*words[3:], *more]))
    other = ["data.root=nyuv2", "--data", "nyuv2_13", "--tasks", "depth", "--out", "scores/other"]
    codes.append(main(["evaluate", "exports/cityscapes", *other]))
    return codes


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data_sets")
    write_libmtl(folder / "nyuv2", "nyuv2_13")
    write_libmtl(folder / "cityscapes2", "cityscapes")
    write_folder(folder / "RGBD")
    codes, results = start_world(follow, folder, seconds=500)()
    assert codes == [0]
    return folder, results[0]


def test_every_command_of_the_page_works(followed):
    _, codes = followed
    assert len(COMMANDS) >= 9 and codes == [*[0] * len(COMMANDS), 2]  # the last: depth scored as disparity


def test_the_scores_are_those_of_balancing_papers(followed):
    folder, _ = followed
    report = json.loads((folder / "scores/compared/metrics.json").read_text())
    assert report["results"]["depth"].keys() >= {"rmse", "abs_err", "rel"}
    comparison = report["comparison"]
    assert comparison["delta_p_percent"] == 0 and comparison["tasks"]["semseg"]["scores"].keys() == {"miou", "accuracy"}
    text = (folder / "scores/compared/metrics.md").read_text()
    assert "Delta_p over 3 tasks: +0.00 %" in text and "pixel accuracy, %" in text
    assert (folder / "scores/compared/metrics.tex").read_text().count(r"$\Delta_p$") == 2
    by_one = json.loads((folder / "scores/delta_m/metrics.json").read_text())["comparison"]
    assert by_one["delta_m_percent"] == 0 and "scores" not in by_one["tasks"]["semseg"]


def test_names_and_what_depth_is_travel_with_the_export(followed):
    folder, _ = followed
    model = load(folder / "exports/cityscapes")
    assert model.tasks == tuple(DATA_SETS["cityscapes"].tasks.values())
    assert model.tasks[0].class_names == ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
    index = json.loads((folder / "predictions/predictions.json").read_text())
    assert index["tasks"][0]["class_names"][6] == "vehicle"
    metrics = json.loads((folder / "runs/rgbd/summary.json").read_text())
    assert metrics["tolerances"] == {"edge": 0.011} and metrics["metrics"]["depth"].keys() >= {"abs_err", "rel"}
    assert np.load(folder / "predictions/0.npz")["depth"].shape == (1, 18, 24)
    assert Image.open(folder / "predictions/1_semseg.png").size == (24, 18)


def test_the_pages_table_is_that_of_the_tasks():
    rows = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `") and line.count("|") == 6}
    assert rows.keys() - {"data.name"} == DATA_SETS.keys()
    for name, data in DATA_SETS.items():
        cells = [cell.strip() for cell in rows[name].split("|")]
        tasks = [re.sub(r" \(.*", "", task) for task in cells[3].split(", ")]
        tolerance = next((f"{task.tolerance:g}" for task in data.tasks.values() if task.tolerance), "")
        assert (tasks, cells[4]) == (list(data.tasks), tolerance), name
