"""``launch/clean.py``: what it says is what goes, what is kept is still whole, and a run in use is left alone."""

import json
import shutil

import pytest

from ase_dist.commands.clean import main
from ase_dist.deployment.export import export_run
from ase_dist.training.process.folder_lock import FolderLock
from ase_dist.training.state.checkpoint.catalog import list_checkpoints, read_pointer
from tests.training.conftest import start_world
from tests.training.tiny_runs import checkpoint, said, same_bits, tiny_run

pytestmark = pytest.mark.single_gpu

THREE = ("checkpoint.every=1", "checkpoint.keep=3", "train.max_steps=3")


def train(rank, folder):
    """A run with three checkpoints; one that keeps weights alone; and what starting that one again says."""
    scenes = (folder / "scenes").read_text()
    assert tiny_run(scenes, folder / "three", *THREE) == 0
    assert tiny_run(scenes, folder / "small", *THREE, "checkpoint.keep_optimizer=false") == 0
    return said(scenes, folder / "small", *THREE, "checkpoint.keep_optimizer=false", "train.max_steps=4")


@pytest.fixture(scope="module")
def folder(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cleaning")
    (folder / "scenes").write_text(str(scenes))
    codes, results = start_world(train, folder, seconds=200)()
    assert codes == [0]
    (folder / "said").write_text(results[0])
    return folder


@pytest.fixture
def run(folder, tmp_path):
    """A copy of the run, whose best step is its second."""
    run = tmp_path / "run"
    shutil.copytree(folder / "three", run)
    (run / "checkpoints" / "best").write_text("step_2\n")
    return run


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def steps(run):
    return sorted(found.step for found in list_checkpoints(run / "checkpoints"))


def test_a_dry_run_says_what_would_go_and_touches_nothing(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main([str(run), "--dry-run"]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    said = capsys.readouterr().out
    assert "step_1" in said and "step_2" not in said and "nothing was removed" in said


@pytest.mark.parametrize(("keep", "left"), [([], [2, 3]), (["--keep", "best"], [2]), (["--keep", "last"], [3])])
def test_what_is_kept_stays_as_it_was_and_what_is_said_is_freed(run, keep, left, capsys):
    before, kept = size(run), {step: checkpoint(run, step) for step in left}
    assert main([str(run), *keep]) == 0
    assert steps(run) == left
    for step, tensors in kept.items():
        assert same_bits(checkpoint(run, step), tensors) == []
    freed = float(capsys.readouterr().out.splitlines()[-1].split()[0])
    assert freed == pytest.approx((before - size(run)) / 1e6, abs=0.06)
    assert read_pointer(run / "checkpoints", "latest") == f"step_{left[-1]}"
    assert read_pointer(run / "checkpoints", "best") == ("step_2" if 2 in left else None)


def test_weights_alone_are_exported_as_before(run, tmp_path, capsys):
    export_run(run, tmp_path / "before", checkpoint="best")
    weights = {name: tensor for name, tensor in checkpoint(run, 2).items() if name.startswith("weight/")}
    before = size(run)
    assert main([str(run), "--keep", "best", "--weights-only"]) == 0
    now = checkpoint(run, 2)
    assert same_bits(now, weights) == []
    freed = float(capsys.readouterr().out.splitlines()[-1].split()[0])
    assert freed == pytest.approx((before - size(run)) / 1e6, rel=0.05)
    export_run(run, tmp_path / "after")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after"))
    assert one == other
    assert main([str(run), "--weights-only"]) == 0
    assert capsys.readouterr().out == "0.0 MB freed\n"


def test_a_run_keeps_weights_alone_where_it_is_told_to_and_says_why_it_cannot_go_on(folder):
    assert steps(folder / "small") == [1, 2, 3]
    for step in (1, 2, 3):
        assert all(name.startswith("weight/") for name in checkpoint(folder / "small", step))
    assert "holds weights alone" in (folder / "said").read_text()


def test_what_cannot_be_cleaned_is_left_alone(run, tmp_path, capsys):
    with FolderLock(run / "run.lock", folder=run, doing="training", other="output=FOLDER") as lock:
        lock.take()
        assert main([str(run), "--keep", "best"]) == 2
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "exit": "stopped"}))
    assert main([str(run), "--weights-only"]) == 2
    assert main([str(tmp_path)]) == 2
    assert main([str(run), str(tmp_path / "nowhere"), "--keep", "best"]) == 2
    assert steps(run) == [1, 2, 3]
    said = capsys.readouterr().err
    assert "is not done" in said and "is no run" in said and "nowhere" in said


def test_a_checkpoint_that_cannot_be_read_is_left_alone(run):
    (run / "checkpoints" / "step_1" / "manifest.json").write_text("{")
    assert main([str(run), "--keep", "last"]) == 0
    assert steps(run) == [1, 3]
