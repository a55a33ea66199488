"""launch/cluster/slurm.sbatch on a real Slurm of two nodes: it trains, saves when it is told to, and goes on."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import slurm
from tests.cluster.slurm import Slurm
from tests.training.conftest import start_world
from tests.training.tiny_runs import ROOT, TINY, checkpoint, losses, metric_lines, same_bits, tiny_run

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]

SCRIPT = ROOT / "launch" / "cluster" / "slurm.sbatch"
SMALL = ("train.batch_size=2", "eval.pictures=0", "guard.timeout=60")
CRASHED = (*SMALL, "train.max_steps=400", "checkpoint.every=50", "train.log_every=10")
STEPS = 2000  # of the runs that are told to stop: they last longer than a minute


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := slurm.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    with Slurm(folder) as running:
        yield running


@pytest.fixture
def job(cluster, scenes):
    """Submit the script with a name, options of sbatch and settings; what was submitted is cancelled at the end."""
    submitted = []

    def submit(name, *options, settings=SMALL):
        output = cluster.folder / name
        size = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
        words = [f"--job-name={name}", f"--output={cluster.folder}/%x.log", *size, *options, str(SCRIPT), *TINY]
        words += [f"data.root={scenes}", f"output={output}", *settings]
        said = cluster.run("sbatch", "--parsable", *words, cwd=ROOT, PYTHON=sys.executable, PYTHONPATH=str(ROOT))
        submitted.append(int(said))
        return int(said), output

    yield submit
    for number in submitted:
        cluster.run("scancel", str(number), check=False)


def wait_for_step(cluster, number, output, step, *, seconds=120):
    """Wait until the run has taken ``step``."""
    deadline = time.monotonic() + seconds
    while max(losses(output), default=0) < step if (output / "metrics.jsonl").is_file() else True:
        state = cluster.job(number).get("JobState")
        assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), said(output)
        assert time.monotonic() < deadline, f"{state}; {said(output)}"
        time.sleep(0.2)


def said(output):
    log = output.with_name(f"{output.name}.log")
    return log.read_text() if log.is_file() else "no log"


def stops_and_resumes(output):
    """At which steps the run was stopped and saved, and at which it went on."""
    log = (output / "train.log").read_text()
    return [[int(step) for step in re.findall(words, log)]
            for words in (r"stopped by a signal at step (\d+), saved", r"resumed at step (\d+)")]  # fmt: skip


def has_ended_well(cluster, number, output, steps):
    assert cluster.wait_for_state(number, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", seconds=400) == (
        "COMPLETED"
    ), said(output)
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["exit"], summary["step"], summary["world_size"]) == ("done", steps, 2)


def undisturbed(rank, folder):
    scenes = Path((folder / "scenes").read_text())
    return tiny_run(scenes, folder / "run", *CRASHED, config="z2")


def test_a_crash_is_started_again_and_ends_bit_equal(cluster, job, scenes, tmp_path):
    number, output = job("crashed", settings=CRASHED)
    wait_for_step(cluster, number, output, 120)
    pid = json.loads((output / "rank_1.beat").read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    has_ended_well(cluster, number, output, 400)
    log = said(output)
    assert "start 1 on n1 n2" in log and "queued again" in log and "start 2 on n1 n2" in log
    _, (resumed,) = stops_and_resumes(output)
    assert resumed >= 100
    (tmp_path / "scenes").write_text(str(scenes))
    assert start_world(undisturbed, tmp_path, size=2, seconds=120)().codes == [0, 0]
    assert same_bits(checkpoint(output, 400), checkpoint(tmp_path / "run", 400)) == []
    assert metric_lines(output) == metric_lines(tmp_path / "run")


def test_it_is_warned_before_its_time_is_up(cluster, job):
    """Of the two minutes the last one is for saving; Slurm looks at the clock every half minute."""
    settings = (*SMALL, f"train.max_steps={STEPS}", "checkpoint.every=0", "train.log_every=100")
    number, output = job("warned", "--time=2", "--signal=USR1@60", settings=settings)
    has_ended_well(cluster, number, output, STEPS)
    stopped, resumed = stops_and_resumes(output)
    assert stopped and stopped == resumed
    assert int(cluster.job(number)["Restarts"]) == len(stopped)
    assert "another start" not in said(output) and "queued again" not in said(output)


def test_a_job_that_is_preempted_saves_and_goes_on(cluster, job):
    settings = (*SMALL, f"train.max_steps={STEPS}", "checkpoint.every=0", "train.log_every=100")
    number, output = job("preempted", "--time=30", settings=settings)
    wait_for_step(cluster, number, output, 300)
    urgent = cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--gpus-per-node=1",
                         f"--output={cluster.folder}/urgent.log", "--wrap=sleep 5")  # fmt: skip
    assert cluster.wait_for_state(int(urgent), "COMPLETED", seconds=120) == "COMPLETED"
    has_ended_well(cluster, number, output, STEPS)
    stopped, resumed = stops_and_resumes(output)
    assert stopped == resumed and len(stopped) == 1 and stopped[0] >= 300
