"""Kill a run of two ranks again and again at random moments; it must end as if nothing had happened.

    pytest -m nightly tests/test_soak.py        with ASE_SOAK_KILLS (30) and ASE_SOAK_SEED (0)

Every kill is a SIGKILL at a moment drawn at random: some time after the start, some time after a step, or while a
checkpoint is being written.

- Most hit one rank of a pair, forked from a process that has the imports done. The other must end by itself.
- A fifth hit the launcher, torchrun or deepspeed, and leave its ranks orphaned: they must save and end, while the next
  start, which comes at once, must not train beside them.
- A fifth hit one rank of ``torchrun --max-restarts N launch/train.py``, which goes on by itself.

At last a run on two "nodes" loses one of them and goes on with the other. Every start has to go on from the newest
checkpoint that was whole, no step may be lost but those since, and in the end weights, moments, random states and every
line of metrics are bit for bit those of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from rich.table import Table

from ase_dist.training.process.launcher_watch import is_alive
from ase_dist.training.process.runtime import free_port
from ase_dist.training.record.metrics import read_metrics
from ase_dist.training.state.checkpoint.catalog import list_checkpoints
from ase_dist.training.state.checkpoint.verify import verify
from tests.training.conftest import start_world
from tests.training.tiny_runs import ROOT, TINY, checkpoint, metric_lines, same_bits, tiny_run

EVERY = 3  # steps between checkpoints
LAUNCHER = -1  # in place of the number of a rank
STEPS_PER_KILL = 6  # so that the run lasts longer than its troubles
LIMIT = 300  # seconds that anything may take
ORPHANS_END = 60  # seconds within which ranks without a launcher have saved and ended, on a busy machine
SHARDED = ("model.moe.ep_size=2", "model.moe.dispatch=gather", "model.drop_path=0.2", "train.batch_size=2")
CONFIG = "z2"
console = Console(highlight=False, soft_wrap=True)


@dataclass
class Kill:
    """One of them: what was drawn, and what was found afterwards."""

    way: str
    rank: int
    moment: str
    step: int = 0  # the last that was taken before it
    resumes_at: int = 0  # the newest whole checkpoint on disk
    inside: bool = False  # a half-written checkpoint was left
    survivor_seconds: float = 0.0

    @property
    def lost(self) -> int:
        """Steps that have to be taken again."""
        return self.step - self.resumes_at


@dataclass
class Soak:
    """The disturbed run."""

    scenes: Path
    folder: Path
    steps: int
    draw: random.Random
    kills: list[Kill] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    refused: int = 0  # starts while ranks of an earlier one lived

    @property
    def output(self) -> Path:
        """Its run folder."""
        return self.folder / "disturbed"

    def options(self) -> list[str]:
        """Its settings in addition to those of every tiny run."""
        return [*SHARDED, f"train.max_steps={self.steps}", f"checkpoint.every={EVERY}", "eval.every=0",
                "eval.pictures=0", "guard.timeout=60"]  # fmt: skip

    # -----------------------------------------------------------------------------------------------------------------
    # What is on disk

    def last_step(self) -> int:
        """The last step whose line was written."""
        return max((record["step"] for record in read_metrics(self.output / "metrics.jsonl")), default=0)

    def newest_whole(self) -> int:
        """The step that the next start has to go on from."""
        folder = self.output / "checkpoints"
        for found in list_checkpoints(folder) if folder.is_dir() else []:
            if verify(folder / found.name)[0] is not None:
                return found.step
        return 0

    def resumed_at(self) -> list[int]:
        """Where the starts so far went on, in order."""
        log = self.output / "train.log"
        return [int(step) for step in re.findall(r"resumed at step (\d+)", log.read_text())] if log.is_file() else []

    def half_written(self) -> bool:
        """Whether a checkpoint is being, or was left, half written."""
        return any((self.output / "checkpoints").glob(".tmp-step_*"))

    # -----------------------------------------------------------------------------------------------------------------
    # Moments

    def wait_for_moment(self, moment: str, *, goes_on: Callable[[], bool], start_seconds: float) -> None:
        """Return at the moment that was drawn, or when the run is over."""
        wanted = self.last_step() + self.draw.randint(1, 2 * EVERY - 1)
        if moment == "start":
            _wait(lambda: self.last_step() >= wanted, goes_on, seconds=self.draw.uniform(0, start_seconds))
        elif moment == "step":
            _wait(lambda: self.last_step() >= wanted, goes_on)
            time.sleep(self.draw.uniform(0, 0.1))
        else:
            for _ in range(self.draw.randint(1, 2)):
                _wait(lambda: not self.half_written(), goes_on)  # of an earlier kill; swept away at the start
                _wait(self.half_written, goes_on)
            time.sleep(self.draw.uniform(0, 0.03))

    def note(self, kill: Kill) -> None:
        """Look at what a kill has left, and say so."""
        kill.step, kill.resumes_at, kill.inside = self.last_step(), self.newest_whole(), self.half_written()
        if not 0 <= kill.lost <= EVERY:
            self.problems.append(f"kill {len(self.kills) + 1}: {kill.lost} steps lost, wanted at most {EVERY}")
        self.kills.append(kill)
        inside = ", inside a save" if kill.inside else ""
        whom = f"rank {kill.rank}" if kill.rank != LAUNCHER else "launcher"
        console.print(f"kill {len(self.kills):3}  {kill.way:16} {whom:8}  drawn: {kill.moment:5}  "
                      f"at step {kill.step:3}, goes on at {kill.resumes_at:3}{inside}")  # fmt: skip

    def check_resumed(self, wanted: int, before: int) -> None:
        """The start since ``before`` such lines, if it came so far, went on where it had to."""
        found = self.resumed_at()[before:]
        if found and found != [wanted]:
            self.problems.append(f"after kill {len(self.kills)} the run resumed at {found}, wanted {wanted}")


def _wait(condition: Callable[[], bool], goes_on: Callable[[], bool], *, seconds: float = LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and goes_on() and time.monotonic() < deadline:
        time.sleep(0.001)


# ---------------------------------------------------------------------------------------------------------------------
# Forked ranks


def train(rank: int, folder: Path) -> int:
    """A rank; what it says goes to a file."""
    with (folder / f"said_{rank}").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    given = json.loads((folder / "given.json").read_text())
    return tiny_run(given["scenes"], given["output"], *given["options"], config=CONFIG)


def start(soak: Soak, output: Path, name: str) -> Any:
    """A world of two that trains into ``output``."""
    folder = soak.folder / name
    folder.mkdir()
    given = {"scenes": str(soak.scenes), "output": str(output), "options": soak.options()}
    (folder / "given.json").write_text(json.dumps(given))
    return start_world(train, folder, size=2, seconds=LIMIT)


def undisturbed(soak: Soak) -> float:
    """The run to compare with; seconds until its first checkpoint was there."""
    output, began = soak.folder / "undisturbed", time.monotonic()
    world = start(soak, output, "world_undisturbed")
    _wait((output / "checkpoints" / f"step_{EVERY}").is_dir, world.processes[0].is_alive)
    seconds = time.monotonic() - began
    if world().codes != [0, 0]:
        pytest.fail(f"the undisturbed run failed: see {soak.folder / 'world_undisturbed'}")
    return seconds


def kill_forked(soak: Soak, number: int, *, start_seconds: float) -> None:
    """Start, kill one rank, see the other one end."""
    kill = Kill("forked", soak.draw.randrange(2), soak.draw.choice(["start", "step", "save"]))
    wanted, before = soak.newest_whole(), len(soak.resumed_at())
    world = start(soak, soak.output, f"world_{number}")
    victim, other = world.processes[kill.rank], world.processes[1 - kill.rank]
    soak.wait_for_moment(kill.moment, goes_on=lambda: victim.is_alive() and other.is_alive(),
                         start_seconds=start_seconds)  # fmt: skip
    victim.kill()
    began = time.monotonic()
    codes = world().codes
    kill.survivor_seconds = time.monotonic() - began
    if codes[kill.rank] != -signal.SIGKILL or codes[1 - kill.rank] not in (1, 77):
        soak.problems.append(f"kill {number}: exit codes {codes}, wanted -9 and 1 or 77")
    soak.check_resumed(wanted, before)
    soak.note(kill)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def command(*launcher: str) -> list[str]:
    """launch/train.py under torchrun."""
    torchrun = str(Path(sys.executable).parent / "torchrun")
    return [torchrun, *launcher, str(ROOT / "launch" / "train.py"), "--deepspeed_config",
            str(ROOT / "ds_configs" / f"{CONFIG}.json"), *TINY]  # fmt: skip


def deepspeed_command() -> list[str]:
    """launch/train.py under deepspeed, on a port of its own."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    return [*launcher, *command()[1:]]


def kill_launchers(soak: Soak, kills: int) -> None:
    """Kill the launcher alone; its ranks must save and end, and the next start, at once, may not train with them."""
    settings = [*soak.options(), f"data.root={soak.scenes}", f"output={soak.output}"]

    def start_launcher(number: int) -> subprocess.Popen[bytes]:
        words = deepspeed_command() if number % 2 else command("--standalone", "--nproc_per_node", "2")
        with (soak.folder / f"launcher_{number}").open("a") as said:
            return subprocess.Popen([*words, *settings], stdout=said, stderr=said)

    wanted, before = soak.newest_whole(), len(soak.resumed_at())
    launcher = start_launcher(0)
    for number in range(kills):
        kill = Kill("torchrun" if number % 2 == 0 else "deepspeed", LAUNCHER, soak.draw.choice(["step", "save"]))
        deadline = time.monotonic() + LIMIT
        while len(soak.resumed_at()) == before and time.monotonic() < deadline:
            if launcher.poll() is not None:  # it came before the orphans were gone
                soak.refused += 1
                launcher = start_launcher(number)
            time.sleep(0.01)
        soak.check_resumed(wanted, before)
        soak.wait_for_moment(kill.moment, goes_on=lambda process=launcher: process.poll() is None, start_seconds=0)
        orphans = [process.pid for process in psutil.Process(launcher.pid).children(recursive=True)]
        before = len(soak.resumed_at())
        launcher.kill()
        launcher.wait()
        began = time.monotonic()
        if number + 1 < kills:
            launcher = start_launcher(number + 1)
        _wait(lambda pids=orphans: not any(map(is_alive, pids)), lambda: True)
        kill.survivor_seconds = time.monotonic() - began
        wanted = soak.newest_whole()
        if kill.survivor_seconds > ORPHANS_END:
            soak.problems.append(f"the orphaned ranks of {kill.way} lived for {kill.survivor_seconds:.0f} s")
        soak.note(kill)


def kill_under_torchrun(soak: Soak, kills: int) -> None:
    """One start of the command; it has to survive all of them and to reach the last step."""
    launcher = ("--standalone", "--nproc_per_node", "2", "--max-restarts", str(kills))
    arguments = [*command(*launcher), *soak.options(), f"data.root={soak.scenes}", f"output={soak.output}"]
    with (soak.folder / "torchrun").open("w") as said:
        process = subprocess.Popen(arguments, stdout=said, stderr=said)
    for _ in range(kills):
        kill = Kill("torchrun", soak.draw.randrange(2), soak.draw.choice(["step", "save"]))
        wanted, before = soak.newest_whole(), len(soak.resumed_at())
        _wait(lambda before=before: len(soak.resumed_at()) > before, lambda: process.poll() is None)
        soak.check_resumed(wanted, before)
        soak.wait_for_moment(kill.moment, goes_on=lambda: process.poll() is None, start_seconds=0)
        with contextlib.suppress(OSError):  # no file: the run is over
            pids = [json.loads((soak.output / f"rank_{rank}.beat").read_text())["pid"] for rank in range(2)]
            began = time.monotonic()
            os.kill(pids[kill.rank], signal.SIGKILL)
            _wait(lambda pids=pids: not any(map(psutil.pid_exists, pids)), lambda: process.poll() is None)
            kill.survivor_seconds = time.monotonic() - began
            soak.note(kill)
    if process.wait(timeout=10 * LIMIT):
        soak.problems.append(f"torchrun ended with code {process.returncode}: see {soak.folder / 'torchrun'}")


def lose_a_node(soak: Soak) -> str:
    """Two agents of one rank each; one of them is killed with its rank, the other goes on alone. What happened."""
    output = soak.folder / "elastic"
    endpoint = f"127.0.0.1:{free_port()}"
    nodes = []
    for name, is_host in (("node_0", 1), ("node_1", 0)):  # the first one keeps the rendezvous
        place = ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "--rdzv_id", "soak",
                 "--rdzv_conf", f"is_host={is_host},last_call_timeout=3"]  # fmt: skip
        launcher = ("--nnodes", "1:2", "--nproc_per_node", "1", "--max-restarts", "3", *place)
        arguments = [*command(*launcher), *soak.options(), "model.moe.ep_size=1", f"data.root={soak.scenes}",
                     f"output={output}"]  # fmt: skip
        with (soak.folder / name).open("w") as said:
            nodes.append(subprocess.Popen(arguments, stdout=said, stderr=said))
    _wait((output / "checkpoints" / f"step_{EVERY}").is_dir, lambda: nodes[0].poll() is None)
    before = json.loads((output / "env.json").read_text())["world_size"]
    for process in [*psutil.Process(nodes[1].pid).children(recursive=True), psutil.Process(nodes[1].pid)]:
        process.kill()
    began = time.monotonic()
    code = nodes[0].wait(timeout=10 * LIMIT)
    nodes[1].wait()
    seconds, log = time.monotonic() - began, (output / "train.log").read_text()
    summary = json.loads((output / "summary.json").read_text()) if code == 0 else {}
    after, step = summary.get("world_size"), summary.get("step")
    resumed = re.findall(r"resumed at step (\d+)", log)
    if (code, before, after, step, len(resumed)) != (0, 2, 1, soak.steps, 1):
        soak.problems.append(f"lost node: code {code}, {before} then {after} ranks, step {step}, resumed at {resumed}")
    return f"{before} ranks, then {after}: resumed at step {resumed}, done {seconds:.0f} s after the loss"


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def compare(soak: Soak) -> str:
    """The last checkpoint and all metrics against those of the undisturbed run."""
    one, other = (checkpoint(soak.folder / name, soak.steps) for name in ("undisturbed", "disturbed"))
    odd = same_bits(one, other)
    if odd:
        soak.problems.append(f"{len(odd)} tensors differ from the undisturbed run's, such as {odd[0]}")
    if metric_lines(soak.folder / "undisturbed") != metric_lines(soak.output):
        soak.problems.append("lines of metrics differ from the undisturbed run's")
    return f"{len(one) - len(odd)} of {len(one)} tensors bit-equal"


def report(soak: Soak, rows: dict[str, str]) -> None:
    """The summary."""
    kills = soak.kills
    table = Table("what", "figure", title="soak")
    by = {f"{way}, {f'rank {rank}' if rank != LAUNCHER else 'launcher'}":
          sum(k.way == way and k.rank == rank for k in kills)
          for way, rank in sorted({(k.way, k.rank) for k in kills})}  # fmt: skip
    shown = {
        "kills": f"{len(kills)} ({', '.join(f'{count} {name}' for name, count in by.items() if count)})",
        "drawn for start / step / save": " / ".join(
            str(sum(k.moment == moment for k in kills)) for moment in ("start", "step", "save")
        ),
        "left a half-written checkpoint": str(sum(k.inside for k in kills)),
        "steps lost, most / sum": f"{max(k.lost for k in kills)} / {sum(k.lost for k in kills)} of {soak.steps}",
        "the other rank's end, most seconds": f"{max(k.survivor_seconds for k in kills):.1f}",
        "starts refused while ranks lived": str(soak.refused),
        **rows,
        "problems": "none" if not soak.problems else str(len(soak.problems)),
    }
    for name, value in shown.items():
        table.add_row(name, value)
    console.print(table)
    for problem in soak.problems:
        console.print(f"PROBLEM {problem}")


@pytest.mark.nightly
@pytest.mark.multi_gpu
@pytest.mark.timeout(3600)
def test_a_run_that_is_killed_again_and_again_ends_bit_equal(scenes, tmp_path):
    kills = int(os.environ.get("ASE_SOAK_KILLS", "30"))
    began, seldom = time.monotonic(), kills // 5
    steps = EVERY * (STEPS_PER_KILL * (kills + 2) // EVERY)
    soak = Soak(scenes, tmp_path, steps, random.Random(int(os.environ.get("ASE_SOAK_SEED", "0"))))
    start_seconds = 1.3 * undisturbed(soak)
    console.print(f"undisturbed: {steps} steps, {time.monotonic() - began:.0f} s")
    for number in range(kills - 2 * seldom):
        kill_forked(soak, number, start_seconds=start_seconds)
    if seldom:
        kill_launchers(soak, seldom)
    kill_under_torchrun(soak, seldom)
    if len(soak.kills) < kills:
        soak.problems.append(f"the run was over after {len(soak.kills)} kills, wanted {kills}")
    if not any(kill.inside for kill in soak.kills):
        soak.problems.append("no kill hit inside a save: try another seed, or more kills")
    rows = {"last checkpoint": compare(soak), "a node lost": lose_a_node(soak)}
    rows["minutes"] = f"{(time.monotonic() - began) / 60:.1f}"
    report(soak, rows)
    assert soak.problems == []
