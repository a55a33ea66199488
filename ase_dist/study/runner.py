"""Runs the missing runs of a study, several at once on several devices; each is a process of its own.

An interrupted study is continued by the same command: finished runs are skipped, the others resume from their newest
checkpoint. SIGINT and SIGTERM go on to the runs, which save and end.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from ase_dist.config import to_yaml
from ase_dist.cores import share_of_cores
from ase_dist.errors import UserError
from ase_dist.files import write_atomic
from ase_dist.study.jobs import Job
from ase_dist.training.record.console import clock
from ase_dist.training.record.metrics import read_metrics

LOGGER = logging.getLogger("ase_dist")
POLL = 0.5  # seconds between two looks at the processes
REPORT = 30.0  # seconds between two lines of progress
FORWARDED = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Slots:
    """Where runs may go: ``jobs`` at once, each on one of ``devices`` (their ids; none: all on what torch finds)."""

    jobs: int = 1
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError(f"--jobs: got {self.jobs}, wanted 1 or more")


class Runner:
    """Carries out ``jobs``; ``run`` gives the names of those that failed.

    ``keep_checkpoints`` keeps those of finished runs, which the tables do not need.
    """

    def __init__(self, jobs: Sequence[Job], slots: Slots, *, keep_checkpoints: bool = False) -> None:
        self.slots, self.keep_checkpoints = slots, keep_checkpoints
        self.total = len(jobs)
        self.waiting = [job for job in jobs if not job.is_done()]
        self.running: list[_Running] = []
        self.failed: list[str] = []
        self.stopped = False
        self._began = self._reported = time.monotonic()
        self._finished = 0

    def run(self) -> list[str]:
        """Start, watch and end everything; returns when nothing runs any more."""
        LOGGER.info("%d runs, %d of them done already", self.total, self.total - len(self.waiting))
        with self._signals():
            while self.running or (self.waiting and not self.stopped):
                self._start()
                self._reap()
                self._report()
                time.sleep(POLL)
        return self.failed

    def _start(self) -> None:
        free = [slot for slot in range(self.slots.jobs) if slot not in {running.slot for running in self.running}]
        for slot in free:
            if self.waiting and not self.stopped:
                running = _Running(self.waiting.pop(0), slot, self.slots)
                self.running.append(running)
                LOGGER.info("start %s (log: %s)", running.name, running.log)

    def _reap(self) -> None:
        for running in [running for running in self.running if running.process.poll() is not None]:
            self.running.remove(running)
            self._finish_step(running)

    def _finish_step(self, running: _Running) -> None:
        if running.job.is_done():
            self._finished += 1
            LOGGER.info("done  %s in %s%s", running.name, clock(time.monotonic() - running.began), self._left())
            if not self.keep_checkpoints:
                shutil.rmtree(running.job.run.checkpoints, ignore_errors=True)
        elif not self.stopped:
            self.failed.append(running.name)
            LOGGER.error("failed %s, exit code %s: %s", running.name, running.process.returncode, running.last_line())

    def _left(self) -> str:
        """How long the rest will take, judged by the runs finished in this start."""
        rest = len(self.waiting) + len(self.running)
        if not rest:
            return ""
        each = (time.monotonic() - self._began) / self._finished
        return f"; {rest} to go, about {clock(each * rest)}"

    def _report(self) -> None:
        if time.monotonic() - self._reported < REPORT:
            return
        self._reported = time.monotonic()
        for running in self.running:
            LOGGER.info("      %s: %s", running.name, running.progress())

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass signals on to the runs, and start none after one."""

        def forward(number: int, frame: FrameType | None) -> None:
            self.stopped = True
            for running in self.running:
                running.process.send_signal(signal.SIGTERM)

        previous = {number: signal.signal(number, forward) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _Running:
    """A run in its process; its output is appended to output.log in its folder."""

    def __init__(self, job: Job, slot: int, slots: Slots) -> None:
        self.job, self.slot, self.name = job, slot, job.name
        self.log = job.run.output_log
        write_atomic(job.config, to_yaml(job.settings))
        job.folder.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        command = [sys.executable, "-m", "ase_dist", "train", "--config", str(job.config), *_threads(job, slots)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(slot, slots),
                start_new_session=True,  # Ctrl-C reaches it through this process alone, once
            )

    def progress(self) -> str:
        """Its last numbers."""
        lines = [line for line in read_metrics(self.job.run.metrics) if line["kind"] == "train"]
        if not lines:
            return "starting"
        last, steps = lines[-1], self.job.settings.train.max_steps
        return f"step {last['step']} of {steps}, loss {last['loss']:.4g}, {last['images_per_second']:.3g} images/s"

    def last_line(self) -> str:
        """What it said last."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _threads(job: Job, slots: Slots) -> list[str]:
    """The cores are shared out among runs at once, unless the settings say how many a run takes."""
    if job.settings.train.threads is not None or slots.jobs == 1:
        return []
    return [f"train.threads={share_of_cores(slots.jobs)}"]


def _environment(slot: int, slots: Slots) -> dict[str, str]:
    """Without what a launcher set for this process; with the one device of the slot."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    if slots.devices:
        kept["CUDA_VISIBLE_DEVICES"] = slots.devices[slot % len(slots.devices)]
    return kept
