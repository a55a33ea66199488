"""Ranks stop when their launcher has ended: a killed launcher must not leave ranks that go on training.

``watch_launchers`` is called when the process starts. From then on a thread looks whether the launchers live, and sends
this process SIGTERM where one has ended: a run saves and ends, anything else ends at once.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator

import psutil

LOGGER = logging.getLogger("ase_dist")
INTERVAL = 1.0  # seconds between two checks
# The command lines of torchrun, deepspeed, mpirun, accelerate, --max-restarts and a study; of no shell that runs them.
LAUNCHER = re.compile(
    r"(^|[/ ])(torchrun|deepspeed|mpirun|mpiexec|accelerate)( |$)"
    r"|\b(torch[./]distributed|deepspeed[./]launcher)[./]\w|launch/(train|study)\.py|-m ase_dist (train|study)"
)
# What deepspeed starts on each node of a hostfile, by pdsh or ssh without a terminal: the connection is the launcher's.
NODE_LAUNCHER = re.compile(r"\bdeepspeed[./]launcher[./]launch\b")
CONNECTION = re.compile(r"sshd(-session)?: .*@notty")
SHELL = re.compile(r"(.*/)?-?(ba|da|z|k)?sh( |$)")


@functools.cache
def watch_launchers() -> None:
    """Start the thread, where a launcher has started this process; only a process's first call does anything.

    A process started from a shell has no launcher: the shell may be closed.
    """
    launchers = list(_launchers())
    if launchers:
        threading.Thread(target=_watch, args=(launchers,), name="launcher watch", daemon=True).start()


def _launchers() -> Iterator[psutil.Process]:
    """The parent processes upwards, as far as they are launchers; behind deepspeed's of a node its ssh connection."""
    is_on_node = False
    try:
        for process in psutil.Process().parents():
            words = " ".join(process.cmdline())
            if SHELL.match(words) and is_on_node:
                continue
            if SHELL.match(words) or not (LAUNCHER.search(words) or (is_on_node and CONNECTION.match(words))):
                return
            is_on_node = bool(NODE_LAUNCHER.search(words))
            yield process
    except (psutil.Error, OSError):  # it has just ended, or may not be inspected
        return


def _watch(launchers: list[psutil.Process]) -> None:
    while True:
        time.sleep(INTERVAL)
        for launcher in launchers:
            if not is_alive(launcher):
                LOGGER.warning("the launcher, process %d, has ended: this process saves and stops", launcher.pid)
                os.kill(os.getpid(), signal.SIGTERM)
                return


def is_alive(process: psutil.Process | int) -> bool:
    """Whether a process, or that of a pid, runs: not a zombie, and not another process that has got its pid since."""
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):  # it may not be inspected, or there is no /proc
        return True
