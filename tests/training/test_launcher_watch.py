"""Launchers that are killed or interrupted alone: no rank trains on, and what was trained is saved."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from ase_dist.training.process.runtime import free_port
from tests.training.test_command import ENDLESS, SECONDS, Started
from tests.training.tiny_runs import ROOT, checkpoint

TOOLS = Path(sys.executable).parent
# name: how it is started, and what is done to the launcher alone
ENDINGS = {
    "torchrun": (lambda: [str(TOOLS / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())],
                 signal.SIGKILL),
    "deepspeed_interrupted": (lambda: [str(TOOLS / "deepspeed"), "--num_gpus", "1", "--master_port", str(free_port())],
                              signal.SIGINT),
    "deepspeed": (lambda: [str(TOOLS / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())],
                  signal.SIGKILL),
    "max_restarts": (lambda: [sys.executable], signal.SIGKILL),
}  # fmt: skip


def end_the_launcher(run, number):
    """Send it ``number``; the seconds until all that it has started have ended."""
    run._await(run.output / "metrics.jsonl", lines=4)
    family = psutil.Process(run.process.pid).children(recursive=True)
    began = time.monotonic()
    run.process.send_signal(number)
    run.process.wait(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=100)
    for process in alive:
        process.kill()
    return [process.pid for process in alive], time.monotonic() - began


@pytest.fixture(scope="module")
def ended(scenes, tmp_path_factory):
    folder, runs = tmp_path_factory.mktemp("launchers"), {}
    for name, (launcher, _) in ENDINGS.items():
        options = ["--max-restarts", "2"] if name == "max_restarts" else []
        size = "train.batch_size=2" if name in ("torchrun", "deepspeed") else "train.batch_size=4"
        runs[name] = Started(folder, name, launcher(), *options, *ENDLESS, size, f"data.root={scenes}")
    try:
        with ThreadPoolExecutor(len(runs)) as pool:
            found = {name: pool.submit(end_the_launcher, run, ENDINGS[name][1]) for name, run in runs.items()}
            return {name: (runs[name], *done.result(timeout=SECONDS)) for name, done in found.items()}
    finally:
        for run in runs.values():
            run.clear()


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", ENDINGS)
def test_no_rank_outlives_its_launcher_and_what_was_trained_is_saved(ended, name):
    run, alive, seconds = ended[name]
    assert not alive and seconds < 100, run.text.read_text()[-3000:]
    summary = json.loads((run.output / "summary.json").read_text())
    assert summary["exit"] == "stopped" and summary["step"] >= 3
    assert checkpoint(run.output, summary["step"])
    assert not [*run.output.glob("*.beat")]


CHAIN = """
from ase_dist.training.process import launcher_watch
launcher_watch.remember_launchers()
print(len(launcher_watch._watch.launchers), launcher_watch.launcher_has_ended())
"""


@pytest.mark.single_gpu
@pytest.mark.parametrize(("line", "count"), [("{}; true", "0"), ("torchrun=1; {}; true", "1")])
def test_a_shell_is_no_launcher(tmp_path, line, count):
    """So that a run goes on where the shell is closed that has started it in the background."""
    program = tmp_path / "program.py"
    program.write_text(CHAIN)
    words = ["sh", "-c", line.format(f"{sys.executable} {program}")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == [count, "False"]
