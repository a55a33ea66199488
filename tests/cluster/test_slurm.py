"""The sbatch script: its header, and what it does with a Slurm that only pretends."""

import os
import re
import signal
import subprocess
import time

import pytest

from tests.training.tiny_runs import ROOT

pytestmark = pytest.mark.single_gpu

SCRIPT = ROOT / "launch" / "cluster" / "slurm.sbatch"
NUMBER = r"[1-9]\d*"
HEADER = {  # of sbatch's manual, what each option takes
    "job-name": r"[\w-]+",
    "nodes": NUMBER,
    "ntasks-per-node": NUMBER,
    "gpus-per-node": NUMBER,
    "cpus-per-task": NUMBER,
    "time": r"(\d+-)?\d{1,2}:\d{2}:\d{2}",
    "signal": r"(B:)?(USR1|TERM)@\d+",
    "requeue": "",
    "open-mode": "append|truncate",
    "output": r"[\w%./-]+",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_CPUS_PER_TASK": "8",
}


def header():
    """The options of the header: every #SBATCH line, all of them before the first command."""
    lines = SCRIPT.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    marked = [i for i, line in enumerate(lines) if "#SBATCH" in line]
    assert max(marked) < first  # sbatch stops reading there
    return dict(re.fullmatch(r"#SBATCH --([\w-]+)(?:=(\S+))?", lines[i]).groups(default="") for i in marked)


def test_the_header_is_one_that_sbatch_takes():
    found = header()
    assert found.keys() == HEADER.keys()
    assert {name: value for name, value in found.items() if not re.fullmatch(HEADER[name], value)} == {}


def test_there_is_time_to_save_and_the_log_outlives_a_requeue():
    found = header()
    name, seconds = found["signal"].split("@")
    assert name == "USR1" and int(seconds) >= 60  # to the ranks, not to the batch shell alone (B:)
    assert found["open-mode"] == "append" and "requeue" in found


@pytest.fixture
def slurm(tmp_path):
    """A PATH on which srun ends with the code in $CODE and scontrol notes what it is asked."""
    tools = {
        "scontrol": 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else echo "$*" >> "$NOTES/asked"; fi',
        "srun": 'echo "$*" >> "$NOTES/ran"; echo "$MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS" >> "$NOTES/ran"\n'
                'if [ "$CODE" = wait ]; then trap "sleep 0.5; exit 75" USR1 TERM; touch "$NOTES/up"; '
                "while :; do sleep 0.1; done; fi\nexit $CODE",
    }  # fmt: skip
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    return tmp_path, {**SLURM, "PATH": path, "NOTES": str(tmp_path)}


def run(slurm, *words, **variables):
    folder, environment = slurm
    done = subprocess.run(
        ["bash", SCRIPT, *words],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    asked = folder / "asked"
    return done.returncode, done.stdout, asked.read_text() if asked.exists() else ""


def test_every_rank_is_started_with_the_meeting_point(slurm):
    code, said, asked = run(slurm, "output=/shared/runs/x", "a b", CODE="0")
    ran, meeting = (slurm[0] / "ran").read_text().splitlines()
    assert code == 0 and asked == "" and "start 1 on n1 n2" in said
    assert ran == ("--kill-on-bad-exit=0 --wait=60 --cpus-per-task=8 python launch/train.py "
                   "--deepspeed_config ds_configs/z2.json train.threads=8 output=/shared/runs/x a b")  # fmt: skip
    assert meeting == "n1 24711 8"


@pytest.mark.parametrize(
    ("code", "count", "is_queued"),
    [(75, 0, True), (75, 9, True), (1, 0, True), (71, 0, True), (77, 2, True), (77, 3, False), (137, 0, True),
     (2, 0, False), (74, 0, False), (76, 0, False)],
)  # fmt: skip
def test_what_another_start_can_mend_is_queued_again(slurm, code, count, is_queued):
    ended, _, asked = run(slurm, CODE=str(code), SLURM_RESTART_COUNT=str(count))
    assert ended == code
    assert asked == ("requeue 4711\n" if is_queued else "")


def test_a_signal_to_the_batch_shell_waits_for_the_ranks(slurm):
    """Preemption with SIGTERM for all: the ranks save, end with 75, and the job is queued again."""
    folder, environment = slurm
    script = subprocess.Popen(["bash", SCRIPT], env={**environment, "CODE": "wait"}, start_new_session=True)
    deadline = time.monotonic() + 30
    while not (folder / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(script.pid, signal.SIGTERM)
    assert script.wait(timeout=30) == 75
    assert (folder / "asked").read_text() == "requeue 4711\n"
