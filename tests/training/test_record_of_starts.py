"""A run's record is of what trained it: a finished run is left alone, every start and its changes are written down."""

import json

import pytest

from ase_dist.commands.train import main
from ase_dist.config import flat
from ase_dist.read_config import load_settings
from ase_dist.report.page import write_report
from ase_dist.training.record.metrics import read_metrics
from tests.training.conftest import start_world
from tests.training.tiny_runs import tiny_run

pytestmark = pytest.mark.single_gpu


def contents(folder):
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def train(rank, folder):
    """Two steps; the same run again; again with other settings; two more steps with other settings; by --resume."""
    scenes, out, found = (folder / "scenes").read_text(), folder / "run", {}
    common = ("checkpoint.every=1",)
    assert tiny_run(scenes, out, *common, "train.max_steps=2") == 0
    before = contents(out)
    for name, overrides in {"same": (), "other": ("train.lr=0.123", "train.batch_size=2")}.items():
        assert tiny_run(scenes, out, *common, "train.max_steps=2", *overrides) == 0
        found[name] = contents(out) == before
    assert tiny_run(scenes, out, *common, "train.max_steps=3", "train.lr=0.002") == 0
    found["resumed"] = main(["--resume", str(out), "train.max_steps=4"])
    (folder / "no run").mkdir()
    found["no run"] = main(["--resume", str(folder / "no run")])
    found["two configs"] = main(["--resume", str(out), "--config", "ccp"])
    return found


@pytest.fixture(scope="module")
def folder(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts")
    (folder / "scenes").write_text(str(scenes))
    codes, results = start_world(train, folder, seconds=300)()
    assert codes == [0]
    (folder / "found.json").write_text(json.dumps(results[0]))
    return folder


def test_a_finished_run_is_left_alone_whatever_the_command_says(folder):
    found = json.loads((folder / "found.json").read_text())
    assert found["same"] and found["other"]


def test_every_start_is_a_record_with_its_settings_and_what_it_changed(folder):
    records = read_metrics(folder / "run" / "metrics.jsonl")
    first, second, third = (record for record in records if record["kind"] == "run")
    assert [record["step"] for record in (first, second, third)] == [0, 2, 3]
    assert [record["attempt"] for record in (first, second, third)] == [1, 2, 3]
    assert first["changed"] == []
    lr = first["settings"]["train.lr"]
    assert second["changed"] == ["train.max_steps 2 -> 3", f"train.lr {lr} -> 0.002"]
    assert third["changed"] == ["train.max_steps 3 -> 4"]
    assert third["settings"] == flat(load_settings(folder / "run" / "config.yaml").model_dump(mode="json"))
    assert first["versions"]["torch"]
    log = (folder / "run" / "train.log").read_text()
    assert f"changed since step 2: train.max_steps 2 -> 3, train.lr {lr} -> 0.002" in log


def test_the_page_shows_what_each_start_changed(folder):
    page = write_report(folder / "run").read_text()
    assert "Changed since then" in page and "train.lr" in page and "train.max_steps 3 -&gt; 4" in page


def test_a_run_goes_on_by_its_own_settings(folder):
    found = json.loads((folder / "found.json").read_text())
    assert found["resumed"] == 0 and found["no run"] == found["two configs"] == 2
    settings = load_settings(folder / "run" / "config.yaml")
    assert settings.train.max_steps == 4 and settings.train.lr == 0.002
    assert json.loads((folder / "run" / "summary.json").read_text())["step"] == 4
