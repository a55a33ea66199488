"""Launchers that are killed or interrupted alone: no rank trains on, and what was trained is saved."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from ase_dist.errors import ExitCode
from ase_dist.training.process.runtime import free_port
from tests.training.test_command import ENDLESS, SECONDS, TRAIN, Started
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


def end_the_launcher(run, number, *, with_second):
    """Send it ``number``: who lives on after that, the seconds until all have ended, a second start before it."""
    run.wait_for(run.output / "metrics.jsonl", lines=4)
    second = [sys.executable, TRAIN, f"output={run.output}"]
    refused = subprocess.run(second, capture_output=True, text=True, check=False) if with_second else None
    family = psutil.Process(run.process.pid).children(recursive=True)
    began = time.monotonic()
    run.process.send_signal(number)
    run.process.wait(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=100)
    for process in alive:
        process.kill()
    return [process.pid for process in alive], time.monotonic() - began, refused


@pytest.fixture(scope="module")
def ended(scenes, tmp_path_factory):
    folder, runs = tmp_path_factory.mktemp("launchers"), {}
    for name, (launcher, _) in ENDINGS.items():
        options = ["--max-restarts", "2"] if name == "max_restarts" else []
        size = "train.batch_size=2" if name in ("torchrun", "deepspeed") else "train.batch_size=4"
        runs[name] = Started(folder, name, launcher(), *options, *ENDLESS, size, f"data.root={scenes}")
    try:
        with ThreadPoolExecutor(len(runs)) as pool:
            found = {name: pool.submit(end_the_launcher, run, ENDINGS[name][1], with_second=name == "torchrun")
                     for name, run in runs.items()}  # fmt: skip
            return {name: (runs[name], *done.result(timeout=SECONDS)) for name, done in found.items()}
    finally:
        for run in runs.values():
            run.clear()


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", ENDINGS)
def test_no_rank_outlives_its_launcher_and_what_was_trained_is_saved(ended, name):
    run, alive, seconds, _ = ended[name]
    assert not alive and seconds < 100, run.text.read_text()[-3000:]
    summary = json.loads((run.output / "summary.json").read_text())
    assert summary["exit"] == "stopped" and summary["step"] >= 3
    assert checkpoint(run.output, summary["step"])
    assert not [*run.output.glob("*.beat")]


@pytest.mark.multi_gpu
def test_a_second_start_beside_the_first_is_refused_and_disturbs_nothing(ended):
    run, _, _, second = ended["torchrun"]
    assert second.returncode == ExitCode.USAGE
    wanted = rf"error: '{run.output}' is in use: process \d+ on .+ has been training there since .+; .+\n"
    assert re.fullmatch(wanted, second.stderr)
    assert not (run.output / "run.lock").exists()


# Prints the processes that it would watch, waits until they are watched no longer, and says which signal it got.
WATCHED = """
import signal, time
from ase_dist.training.process import launcher_watch
from ase_dist.training.process.signals import StopFlag
launcher_watch.INTERVAL = 0.05
with StopFlag() as flag:
    launcher_watch.watch_launchers()  # first: the test kills a launcher as soon as it has read who they are
    print(*[process.pid for process in launcher_watch._launchers()], flush=True)
    deadline = time.monotonic() + 20
    while not flag.requested and time.monotonic() < deadline:
        time.sleep(0.05)
    print(*flag.received, flush=True)
"""
STARTER = """
import os, subprocess, sys
print(os.getpid(), flush=True)
subprocess.run(sys.argv[1:])
"""
# What starts the next, and whether it is watched. All say their pid first.
TORCHRUN = ([sys.executable, "{}/torchrun"], True)
SSH = """export NEXT=$(printf "%q " "$@"); exec -a "sshd: root@notty" bash -c 'echo $$; eval "$NEXT"; true'"""
CHAINS = {
    "shell": [(["sh", "-c", 'echo $$; "$@"; true', "sh"], False)],
    "shell that names a launcher": [(["sh", "-c", 'torchrun=1; echo $$; "$@"; true', "sh"], False)],
    "torchrun": [(["sh", "-c", 'echo $$; "$@"; true', "sh"], False), TORCHRUN],
    "a node of pdsh": [
        (["bash", "-c", SSH, "bash"], True),
        (["bash", "-c", 'echo $$; "$@"; true', "bash"], False),
        ([sys.executable, "{}/deepspeed/launcher/launch.py"], True),
    ],
    "torchrun by ssh": [(["bash", "-c", SSH, "bash"], False), TORCHRUN],  # with nohup it may outlive the connection
}


@pytest.mark.single_gpu
@pytest.mark.parametrize("name", CHAINS)
def test_who_is_watched_and_that_its_end_is_a_signal(tmp_path, name):
    """No shell, so that a run goes on where the shell is closed that has started it in the background."""
    for file, text in [("torchrun", STARTER), ("deepspeed/launcher/launch.py", STARTER), ("watched.py", WATCHED)]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    words = [word.format(tmp_path) for start, _ in CHAINS[name] for word in start]
    process = subprocess.Popen([*words, sys.executable, tmp_path / "watched.py"], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path)  # fmt: skip
    pids = [int(process.stdout.readline()) for _ in CHAINS[name]]
    wanted = [pid for pid, (_, is_watched) in zip(pids, CHAINS[name], strict=True) if is_watched]
    seen = [int(word) for word in process.stdout.readline().split()]
    (last,) = psutil.Process(pids[-1]).children()
    assert seen == wanted[::-1]
    if wanted:
        os.kill(wanted[0], signal.SIGKILL)  # the first, over which there may be others that live on
        assert process.stdout.readline() == "SIGTERM\n"
    for pid in (*pids, last.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
