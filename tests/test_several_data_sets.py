"""docs/partial_labels.md followed to the letter: folders with some labels missing, and two folders for one model."""

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ase_dist import load
from ase_dist.commands.main import main
from ase_dist.read_config import load_settings
from ase_dist.study.jobs import jobs_of
from ase_dist.study.presets import find_preset
from ase_dist.study.variants import STUDIES
from ase_dist.training.state.checkpoint import open_checkpoint
from tests.test_own_data import FILE, SMALL, write_garden
from tests.training.conftest import start_world

pytestmark = pytest.mark.single_gpu

PAGE = (Path(__file__).parents[1] / "docs" / "partial_labels.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
(SETS,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
YARD = """
images: "images/{}.png"
splits: {train: images, val_every: 3}
tasks:
  semseg: {kind: classes, files: "labels/{}.png", classes: [sand, stone, grass]}
  normals: {kind: normals, files: "normals/{}.png"}
"""


def write_yard(root):
    for folder in ("images", "labels", "normals"):
        (root / folder).mkdir(parents=True)
    for i in range(9):
        rng = np.random.default_rng(i)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(root / f"images/{i}.png")
        Image.fromarray(rng.integers(0, 3, (40, 40), dtype=np.uint8)).save(root / f"labels/{i}.png")
        Image.fromarray(np.full((40, 40, 3), (128, 128, 255), np.uint8)).save(root / f"normals/{i}.png")
    (root / "dataset.yaml").write_text(YARD)


def follow(rank, folder):
    """Every command of the page in its order, short runs; the folder is whole again before the second part."""
    from ase_dist.training.process import runtime
    from ase_dist.training.record import plots

    runtime.stop = lambda: None  # DeepSpeed joins a process group once in a process
    plots.draw_all = lambda folder: None  # which takes longer than such a run
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    codes = []
    for line in COMMANDS:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "ase_dist"]
        if "both.yaml" in words and (folder / "lost").exists():
            (folder / "garden/depth").rename(folder / "half")
            (folder / "lost").rename(folder / "garden/depth")
        codes.append(main([*words[3:], *(SMALL if words[3] == "train" else ())]))
    codes.append(main(["train", "--config", "both.yaml", "output=runs/both", *SMALL, "train.max_steps=3"]))
    return codes


def train_on_two(rank, folder):
    """The page's run of two data sets, half of each batch on either rank."""
    from ase_dist.training.process import runtime

    runtime.stop = lambda: None
    os.chdir(folder)
    words = ["train", "--config", "both.yaml", "output=runs/pair", *SMALL, "train.batch_size=2"]
    return [main([*words, f"train.max_steps={steps}"]) for steps in (2, 3)]  # as the page's: with this schedule


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    write_garden(folder / "garden", images=10)
    (folder / "garden/dataset.yaml").write_text(FILE)
    write_yard(folder / "yard")
    (folder / "both.yaml").write_text(SETS)
    (folder / "garden/depth").rename(folder / "lost")  # whole; half of it stays
    (folder / "garden/depth").mkdir()
    for i in range(1, 11, 2):
        name = f"bed {i:02}.png"
        (folder / "garden/depth" / name).write_bytes((folder / "lost" / name).read_bytes())
    codes, results = start_world(follow, folder, seconds=500)()
    assert codes == [0]
    return folder, results[0]


def read(path):
    return json.loads(path.read_text())


def test_every_command_of_the_page_works(followed):
    _, codes = followed
    assert len(COMMANDS) == 11 and codes == [0] * 12


def test_absent_labels_are_counted_in_records_and_scores(followed):
    folder, _ = followed
    counts = {"train": {"semseg": 8, "depth": 4}, "val": {"semseg": 2, "depth": 1}}
    for run in ("garden", "packed"):
        summary = read(folder / f"runs/{run}/summary.json")
        start = json.loads((folder / f"runs/{run}/metrics.jsonl").read_text().splitlines()[0])
        assert summary["labelled_images"] == start["labelled_images"] == counts
        assert {task: scores["images"] for task, scores in summary["metrics"].items()} == counts["val"]
    first, second = (read(folder / f"runs/{run}/summary.json")["metrics"] for run in ("garden", "packed"))
    assert first == second
    assert re.search(r"labelled images, train +semseg 8, depth 4", (folder / "runs/garden/train.log").read_text())


def test_two_folders_train_one_model_that_goes_on_is_scored_and_exported(followed):
    folder, _ = followed
    summary = read(folder / "runs/both/summary.json")
    assert (summary["data"], summary["step"]) == ("garden+yard", 3)
    assert summary["metrics"].keys() == {"semseg", "depth", "ground", "normals"}
    assert summary["labelled_images"]["train"] == {"semseg": 8, "depth": 8, "ground": 6, "normals": 6}
    with open_checkpoint(folder / "runs/both/checkpoints/step_3") as checkpoint:
        sampler = checkpoint.meta["sampler"]["sets"]  # 3 steps of 4 images, 1 of 3 from the garden
    assert {title: part["epoch"] * part["length"] + part["consumed"] for title, part in sampler.items()} == {
        "garden": 4,
        "yard": 8,
    }
    card = load(folder / "exports/both").card
    assert [each.title for each in card.sets] == ["garden", "yard"] and all(each.root is None for each in card.sets)
    assert card.labelled_images == summary["labelled_images"]["train"]
    whole = read(folder / "runs/both/evaluation/metrics.json")["results"]
    yard = read(folder / "yard_scores/metrics.json")
    assert yard["results"] == {task: whole[task] for task in ("ground", "normals")} and yard["images"] == 3
    garden = read(folder / "exports/both/evaluation/metrics.json")["results"]
    assert garden.keys() == {"semseg", "depth"} and garden["depth"]["images"] == 2
    assert garden["depth"]["rmse"] == pytest.approx(whole["depth"]["rmse"], rel=1e-5)
    assert "Ground" in (folder / "runs/both/report.html").read_text()


@pytest.mark.multi_gpu
def test_two_ranks_train_on_two_data_sets_as_one_does(followed):
    folder, _ = followed
    (folder / "rendezvous").unlink(missing_ok=True)
    assert start_world(train_on_two, folder, size=2, seconds=200)()[:2] == ([0, 0], [[0, 0]] * 2)
    pair, one = (
        [json.loads(line) for line in (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("pair", "both")
    )
    trained, wanted = ({line["step"]: line for line in lines if line["kind"] == "train"} for lines in (pair, one))
    assert trained.keys() == wanted.keys() == {1, 2, 3}
    for step, line in wanted.items():
        assert trained[step]["losses"] == pytest.approx(line["losses"], rel=1e-4), step
    scores, wanted = (read(folder / f"runs/{name}/summary.json")["metrics"] for name in ("pair", "both"))
    for task, metrics in wanted.items():
        assert scores[task] == pytest.approx(metrics, rel=1e-3, abs=1e-3), task


def test_plans_and_studies_take_several_data_sets(followed, monkeypatch, capsys, tmp_path):
    folder, _ = followed
    monkeypatch.chdir(folder)
    assert (
        main(["plan", "--config", "both.yaml", "--world", "2", "--zero", "1", "train.balancing.method=mgda", *SMALL])
        == 0
    )
    assert "balancing: task gradients" in capsys.readouterr().out
    preset = find_preset("both.yaml")
    assert (preset.title, preset.pair) == ("garden+yard", ("semseg", "depth"))
    for name in ("balancing", "topk"):
        jobs = jobs_of(STUDIES[name].variants(preset), preset, seeds=1, out=tmp_path, overrides=SMALL[:5])
        assert all([each.title for each in job.settings.data.sets] == ["garden", "yard"] for job in jobs) and jobs


def test_a_file_that_describes_a_set_is_its_folder(followed, tmp_path, monkeypatch):
    """Also where that set has no root of its own."""
    folder, _ = followed
    monkeypatch.chdir(tmp_path)
    sets = f"data.sets=[{{name: {folder}/garden/dataset.yaml}}, {{name: {folder}/yard, as: {{semseg: ground}}}}]"
    data = load_settings(None, [sets]).data
    assert [data.of_set(each).root for each in data.sets] == [folder / "garden", folder / "yard"]
    assert [each.title for each in data.sets] == ["garden", "yard"]
    data = load_settings(None, ["data.root=/elsewhere", sets]).data
    assert [data.of_set(each).root for each in data.sets] == [folder / "garden", folder / "yard"]
