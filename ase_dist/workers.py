"""What every worker process does first, whatever it is for. Imports no torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def begin_worker() -> None:
    """Signals are the parent's affair (a launcher sends them to all processes), and no worker outlives its parent."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
