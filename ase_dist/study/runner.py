"""Starts the missing runs of a study, several at once on several devices, each in its own process.

An interrupted study is continued by the same command: finished runs are skipped, the others resume from their newest
checkpoint. A signal that ends the study goes on to the runs as SIGTERM; they save and end.
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

from ase_dist.cores import share_of_cores
from ase_dist.deployment.export import export_run
from ase_dist.errors import UserError
from ase_dist.files import open_regular, refuse_irregular, write_atomic
from ase_dist.read_config import to_yaml
from ase_dist.study.jobs import StudyJob
from ase_dist.training.process.signals import stopping_signals
from ase_dist.training.record.console import clock
from ase_dist.training.record.metrics import read_metrics

LOGGER = logging.getLogger("ase_dist")
POLL = 0.5  # seconds between two checks of the processes
REPORT = 30.0  # seconds between two progress reports
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Slots:
    """How many runs at once (``jobs``), each on one of ``devices`` (ids; empty: on the devices that torch finds)."""

    jobs: int = 1
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError(f"--jobs: got {self.jobs}, wanted 1 or more")


class Runner:
    """Runs ``jobs``; ``run`` returns the names of those that failed.

    The checkpoints of finished runs, which the tables do not need, are deleted unless ``keep_checkpoints`` is set.
    """

    def __init__(self, jobs: Sequence[StudyJob], slots: Slots, *, keep_checkpoints: bool = False) -> None:
        self.slots, self.keep_checkpoints = slots, keep_checkpoints
        self.total = len(jobs)
        self._exported = {job.after.name for job in jobs if job.after is not None}
        self.waiting = [job for job in jobs if not job.is_done()]
        self.running: list[_Running] = []
        self.failed: list[str] = []
        self.stopped = False
        self._signal = ""  # the name of the one that stopped it
        self._began = self._reported = time.monotonic()
        self._finished = 0

    def run(self) -> list[str]:
        """Start the jobs as slots become free; returns when all have ended."""
        LOGGER.info("%d runs, %d of them done already", self.total, self.total - len(self.waiting))
        with self._signals():
            while self.running or (self.waiting and not self.stopped):
                self._start()
                self._collect_ended()
                self._report()
                time.sleep(POLL)
        if self.stopped:
            LOGGER.info("stopped by %s, the runs have saved; the same command goes on from there", self._signal)
        return self.failed

    def _start(self) -> None:
        free = [slot for slot in range(self.slots.jobs) if slot not in {running.slot for running in self.running}]
        for slot in free:
            job = None if self.stopped else self._next()
            if job is None:
                return
            self.waiting.remove(job)
            if job.after is not None and not self._export(job.after):
                self.failed.append(job.name)
                LOGGER.error("failed %s, which starts from %s", job.name, job.after.name)
                continue
            running = _Running(job, slot, self.slots)
            self.running.append(running)
            LOGGER.info("start %s (log: %s)", running.name, running.log)

    def _next(self) -> StudyJob | None:
        """The first job that waits for no other."""
        unfinished = {job.name for job in self.waiting} | {running.name for running in self.running}
        return next((job for job in self.waiting if job.after is None or job.after.name not in unfinished), None)

    def _export(self, job: StudyJob) -> bool:
        """Whether the job's export is there, made now if need be; its checkpoints are then no longer needed."""
        if not job.export.is_dir():
            try:
                job.export.parent.mkdir(parents=True, exist_ok=True)
                export_run(job.folder, job.export)
            except UserError as error:
                LOGGER.error("%s: %s", job.name, error)
                return False
        self._drop_checkpoints(job)
        return True

    def _drop_checkpoints(self, job: StudyJob) -> None:
        if not self.keep_checkpoints:
            shutil.rmtree(job.run.checkpoints, ignore_errors=True)

    def _collect_ended(self) -> None:
        for running in [running for running in self.running if running.process.poll() is not None]:
            self.running.remove(running)
            if running.job.is_done():
                now, rest = time.monotonic(), len(self.waiting) + len(self.running)
                self._finished += 1
                each = (now - self._began) / self._finished  # seconds, over the runs finished in this start
                left = f"; {rest} to go, about {clock(each * rest)}" if rest else ""
                LOGGER.info("done  %s in %s%s", running.name, clock(now - running.began), left)
                if running.name not in self._exported:
                    self._drop_checkpoints(running.job)
            elif not self.stopped:
                self.failed.append(running.name)
                code = running.process.returncode
                LOGGER.error("failed %s, exit code %s: %s", running.name, code, running.last_line())

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
            self._signal = signal.Signals(number).name
            for running in self.running:
                running.process.send_signal(signal.SIGTERM)

        previous = {number: signal.signal(number, forward) for number in stopping_signals()}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _Running:
    """A run in its process; its output is appended to output.log in its folder."""

    def __init__(self, job: StudyJob, slot: int, slots: Slots) -> None:
        self.job, self.slot, self.name = job, slot, job.name
        self.log = job.run.output_log
        write_atomic(job.config, to_yaml(job.settings))
        job.folder.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        command = [sys.executable, "-m", "ase_dist", "train", "--config", str(job.config)]
        if job.settings.train.threads is None and slots.jobs > 1:
            command.append(f"train.threads={share_of_cores(slots.jobs)}")
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        if slots.devices:
            environment["CUDA_VISIBLE_DEVICES"] = slots.devices[slot % len(slots.devices)]
        refuse_irregular(self.log)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches it through this process alone, once
            )

    def progress(self) -> str:
        """The last recorded step, loss and speed."""
        lines = [line for line in read_metrics(self.job.run.metrics) if line["kind"] == "train"]
        if not lines:
            return "starting"
        last, steps = lines[-1], self.job.settings.train.max_steps
        return f"step {last['step']} of {steps}, loss {last['loss']:.4g}, {last['images_per_second']:.3g} images/s"

    def last_line(self) -> str:
        """The last line of its output."""
        with open_regular(self.log) as log:
            lines = log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"
