"""Monitors with the real libraries, read back by their own readers; and monitors that fail, which end no run."""

import importlib.util
import json
import logging
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ase_dist.read_config import load_settings
from ase_dist.training.record import monitor
from ase_dist.training.record.metrics import read_metrics
from ase_dist.training.record.monitor import Monitors
from ase_dist.training.record.plots import draw_experts
from ase_dist.training.record.run_folder import RunFolder
from tests.training.conftest import start_world
from tests.training.tiny_runs import ROOT, tiny_run

pytestmark = pytest.mark.single_gpu
EXTRAS = [name for name in ("wandb", "mlflow") if importlib.util.find_spec(name)]
PAGE = (ROOT / "docs" / "monitors.md").read_text(encoding="utf-8")
STEPS = (2, 4)  # of the evaluations


def words_of_the_page(start):
    """The settings of the page's command that begins with ``start``."""
    (line,) = (line for line in PAGE.splitlines() if line.startswith(start))
    return [word for word in shlex.split(line) if word.startswith("monitor.")]


def run_with_all(rank, folder):
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    settings = words_of_the_page("WANDB_MODE=offline ase-dist train")
    assert settings == ["monitor.wandb=true", "monitor.mlflow=true", "monitor.csv=true"]
    os.environ["WANDB_MODE"] = "offline"
    code = tiny_run(Path((folder / "scenes").read_text()), folder / "all", *settings, "monitor.tensorboard=true",
                    "train.max_steps=4", "eval.every=2", "eval.pictures=1",
                    "monitor.project=a project")  # fmt: skip
    # one that cannot be started, and one that its library does not know
    (folder / "broken").mkdir()
    (folder / "broken" / "tensorboard").write_text("a file")
    sys.modules["mlflow"] = None
    broken = tiny_run(Path((folder / "scenes").read_text()), folder / "broken", "monitor.tensorboard=true",
                      "monitor.mlflow=true", "train.max_steps=1")  # fmt: skip
    return code, broken


@pytest.fixture(scope="module")
def ran(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitors")
    (folder / "scenes").write_text(str(scenes))
    world = start_world(run_with_all, folder, seconds=200)()
    assert world.codes == [0] and world.results == [[0, 0]]
    return folder


@pytest.fixture(scope="module")
def lines(ran):
    return read_metrics(ran / "all" / "metrics.jsonl")


def losses(lines):
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def settings_of(folder):
    return load_settings(folder / "config.yaml")


def test_tensorboard_has_scalars_settings_and_pictures(ran, lines):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(ran / "all" / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()
    assert {e.step: pytest.approx(e.value) for e in found.Scalars("train/loss")} == losses(lines)
    assert not [name for name in found.Tags()["scalars"] if name.startswith("Train/Samples")]
    assert "eval/semseg/miou" in found.Tags()["scalars"]
    for name in ("predictions", "experts"):
        assert [image.step for image in found.Images(name)] == list(STEPS)
    with Image.open(ran / "all" / "predictions" / "step_000004.png") as grid:
        assert (found.Images("predictions")[-1].width, found.Images("predictions")[-1].height) == grid.size
    (text,) = found.Tensors("settings/text_summary")
    assert b"| model.moe.num_experts | 5 |" in text.tensor_proto.string_val[0]


def test_csv_has_scalars(ran, lines):
    rows = (ran / "all" / "csv" / "train_loss.csv").read_text().split()[1:]
    assert {int(step): pytest.approx(float(value)) for step, value in (row.split(",") for row in rows)} == losses(lines)


@pytest.mark.skipif("mlflow" not in EXTRAS, reason="mlflow is not installed; it comes with the dev extra")
def test_mlflow_has_scalars_settings_and_pictures(ran, lines, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(ran / "all" / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("a project")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("all", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {metric.step: pytest.approx(metric.value) for metric in history} == losses(lines)
    assert run.data.params["model.moe.num_experts"] == "5"
    for name in ("predictions", "experts"):
        files = client.list_artifacts(run.info.run_id, name)
        assert [file.path for file in files] == [f"{name}/step_{step:06d}.png" for step in STEPS]
    kept = json.loads(Path(client.download_artifacts(run.info.run_id, "settings.json")).read_text())
    assert kept["train.max_steps"] == settings_of(ran / "all").train.max_steps == 4


def records_of_wandb(log):
    """The records of a log as LevelDB has them: blocks of 32 KiB, of chunks (checksum, length, type; 2 to 4: parts)."""
    position, parts = 7, b""  # after wandb's own header
    while position + 7 < len(log):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        length, kind = int.from_bytes(log[position + 4 : position + 6], "little"), log[position + 6]
        parts += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.mark.skipif("wandb" not in EXTRAS, reason="wandb is not installed; it comes with the dev extra")
def test_wandb_has_scalars_settings_and_pictures_offline(ran, lines):
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (ran / "all" / "wandb").glob("offline-run-*/*.wandb")
    config, history = {}, {}
    for data in records_of_wandb(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        for item in [*record.run.config.update, *record.config.update]:
            config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        history.setdefault(row.get("_step"), {}).update(row)
    assert config["model.moe.num_experts"] == 5 and config["train.max_steps"] == 4
    found = {step: row["train/loss"] for step, row in history.items() if "train/loss" in row}
    assert found == {step: pytest.approx(loss) for step, loss in losses(lines).items()}
    for step in STEPS:
        for name in ("predictions", "experts"):
            assert (file.parent / "files" / history[step][f"{name}.path"]).is_file()


def test_a_monitor_that_cannot_be_started_ends_no_run(ran):
    log = (ran / "broken" / "train.log").read_text()
    told = re.findall(r"WARNING the monitor (\w+) cannot be started \((.*)\) and is off; the run goes on, and", log)
    assert [name for name, _ in told] == ["tensorboard", "mlflow"]
    assert told[0][1].startswith("File exists") and told[1][1].endswith("pip install 'ase-dist[mlflow]'")
    assert "Traceback" not in log
    assert json.loads((ran / "broken" / "summary.json").read_text())["exit"] == "done"


class Fake(monitor.Monitor):
    """Keeps what it is shown, and fails where it is told to."""

    def __init__(self, section, run):
        self.shown, self.fails = section["shown"], section.get("fails")
        self._do("open")

    def _do(self, what):
        self.shown.append(what)
        if what == self.fails:
            raise RuntimeError("no\x1b[31m route to host")

    def scalars(self, events):
        self._do(events[0][0])

    def picture(self, name, picture, step):
        self._do(f"{name} {picture.mode} {step}")

    def close(self, *, failed):
        self._do(f"close {failed}")


@pytest.mark.parametrize("fails", ["open", "loss", "grid RGB 3", "close True"])
def test_a_monitor_that_fails_is_told_once_and_the_others_go_on(fails, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(monitor, "MONITORS", {"bad": Fake, "good": Fake, "off": Fake})
    sections = {"bad": {"enabled": True, "shown": [], "fails": fails}, "good": {"enabled": True, "shown": []},
                "off": {"enabled": False, "shown": []}}  # fmt: skip
    with caplog.at_level(logging.WARNING, "ase_dist"):
        found = Monitors(sections, RunFolder(tmp_path), enabled=True)
        for _ in range(2):
            found.write_scalars([("loss", 1.0, 3)])
            found.write_picture("grid", Image.new("L", (2, 2)), 3)
        found.close(failed=True)
        found.close()
    every = ["open", "loss", "grid RGB 3", "loss", "grid RGB 3", "close True"]
    assert sections["good"]["shown"] == every and sections["off"]["shown"] == []
    assert sections["bad"]["shown"] == every[: every.index(fails) + 1]
    (said,) = (record.getMessage() for record in caplog.records)
    assert re.match(
        r"the monitor bad (cannot be started|failed) \(RuntimeError: no.*route to host\) and is off; ", said
    )
    assert "\x1b" not in said


def test_only_the_first_rank_has_monitors(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "MONITORS", {"bad": Fake})
    section = {"enabled": True, "shown": []}
    assert not Monitors({"bad": section}, RunFolder(tmp_path), enabled=False).take_pictures
    assert section["shown"] == []


def test_the_picture_of_experts_has_a_map_for_each_task():
    """The brightest colour is where the one cell of load 1 is, from task to task further to the right."""
    columns = []
    for task in range(3):
        load = np.zeros((2, 3, 4))
        load[:, task, 3] = 1.0
        picture = np.asarray(draw_experts({"Share of tokens": load}, titles=["a", "b", "c"], num_shared=1))
        distance = np.abs(picture.astype(int) - (253, 231, 37)).sum(axis=2)  # from viridis at 1
        columns.append({*(distance < 12).nonzero()[1].tolist()})
    scale = set.intersection(*columns)  # where it reaches the brightest colour
    left, middle, right = (found - scale for found in columns)
    assert min(map(len, (left, middle, right))) > 10
    assert max(left) < min(middle) <= max(middle) < min(right)
