"""Ranks stop when their launcher has ended: one that was killed must not leave ranks that train on unseen.

``remember_launchers`` is called when the process starts, ``launcher_has_ended`` in every step (by ``StopFlag``).
"""

from __future__ import annotations

import logging
import re
import time

import psutil

LOGGER = logging.getLogger("ase_dist")
INTERVAL = 1.0  # seconds between two looks
# The command lines of torchrun, deepspeed, mpirun, accelerate, --max-restarts and a study.
LAUNCHER = re.compile(
    r"torchrun|torch[./]distributed|deepspeed|mpirun|accelerate|launch/(train|study)\.py|-m ase_dist (train|study)"
)


class _Watch:
    """What this process knows of its launchers."""

    def __init__(self) -> None:
        self.launchers: list[psutil.Process] | None = None  # None: nobody has looked yet
        self.looked_at, self.has_ended = 0.0, False


_watch = _Watch()


def remember_launchers() -> None:
    """Note the parent and so on upwards, as far as they are launchers; only the first call of a process does.

    A process that no launcher started has none: the shell from which it was started may be closed.
    """
    if _watch.launchers is not None:
        return
    _watch.launchers = []
    try:
        for process in psutil.Process().parents():
            if not LAUNCHER.search(" ".join(process.cmdline())):
                break
            _watch.launchers.append(process)
    except psutil.Error:  # it has just ended, or may not be looked at
        pass


def launcher_has_ended() -> bool:
    """Whether one of the launchers has ended; looks at most once a second, and warns the first time."""
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


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs: a zombie does not, nor another process that has got its number since."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
