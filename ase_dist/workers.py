"""What every worker process does first, whatever it is for. Imports no torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def ignore_signals() -> None:
    """A launcher or a scheduler sends them to all processes of a job; the parent answers, and ends its workers."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)


def begin_worker() -> None:
    """Signals are the parent's affair, and no worker outlives its parent."""
    ignore_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
