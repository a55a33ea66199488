"""Ranks stop when their launcher has ended: a killed launcher must not leave ranks that go on training.

``remember_launchers`` is called when the process starts, ``launcher_has_ended`` in every step (by ``StopFlag``).
"""

from __future__ import annotations

import logging
import re
import time

import psutil

LOGGER = logging.getLogger("ase_dist")
INTERVAL = 1.0  # seconds between two checks
# The command lines of torchrun, deepspeed, mpirun, accelerate, --max-restarts and a study.
LAUNCHER = re.compile(
    r"torchrun|torch[./]distributed|deepspeed|mpirun|accelerate|launch/(train|study)\.py|-m ase_dist (train|study)"
)


class _Watch:
    """The launchers of this process, and whether one has ended."""

    def __init__(self) -> None:
        self.launchers: list[psutil.Process] | None = None  # None: not looked up yet
        self.looked_at, self.has_ended = 0.0, False


_watch = _Watch()


def remember_launchers() -> None:
    """Record the parent processes upwards, as far as they are launchers; only a process's first call does anything.

    A process started from a shell has no launcher: the shell may be closed.
    """
    if _watch.launchers is not None:
        return
    _watch.launchers = []
    try:
        for process in psutil.Process().parents():
            if not LAUNCHER.search(" ".join(process.cmdline())):
                break
            _watch.launchers.append(process)
    except psutil.Error:  # it has just ended, or may not be inspected
        pass


def launcher_has_ended() -> bool:
    """Whether one of the launchers has ended; checks at most once a second, and warns the first time."""
    now = time.monotonic()
    if _watch.has_ended or now - _watch.looked_at < INTERVAL:
        return _watch.has_ended
    _watch.looked_at = now
    for launcher in _watch.launchers or []:
        if not is_alive(launcher):
            LOGGER.warning("the launcher, process %d, has ended: this run saves and stops", launcher.pid)
            _watch.has_ended = True
            break
    return _watch.has_ended


def is_alive(process: psutil.Process | int) -> bool:
    """Whether a process, or that of a pid, runs: not a zombie, and not another process that has got its pid since."""
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
