"""Where prepared data sets are kept; the lock while one is made, and its progress.

The first process that finds a data set missing makes it in a temporary folder next to the final one and renames it.
The others wait for a lock, which the operating system frees if that process dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ase_dist.files import home_folder, refuse_irregular

log = logging.getLogger(__name__)

LOG_EVERY = 10.0  # seconds between lines of progress where there is no terminal


def cache_folder() -> Path:
    """Where data sets are kept unless told otherwise: ``$XDG_CACHE_HOME/ase_dist`` or ``~/.cache/ase_dist``.

    Raises UserError where there is no home folder, as for a user id that the host does not know.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if base.startswith("/"):
        return Path(base) / "ase_dist"
    return home_folder() / ".cache" / "ase_dist"


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """Hold the lock of ``place``, a hidden file next to it; the lock ends with its holder, the file itself stays.

    Raises OSError where the parent folder cannot be written, UserError where a pipe or a device has the lock's name.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = place.parent / f".{place.name}.lock"
    refuse_irregular(lock)
    with lock.open("a", encoding="ascii") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is making %s; waiting for it", place)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def track_progress(done: Iterable[int], total: int, *, doing: str, did: str, things: str, where: str) -> None:
    """Consume ``done``, numbers of things finished one after another, showing a bar on a terminal, else log lines.

    The words are for the lines: ``doing="rendering", did="rendered", things="scenes", where="into FOLDER"``.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(f"{doing.capitalize()} {things}", total=total)
            for finished in done:
                bar.advance(task, finished)
        return
    log.info("%s %d %s %s", doing, total, things, where)
    started = last = time.monotonic()
    count = 0
    for finished in done:
        count, now = count + finished, time.monotonic()
        if now - last > LOG_EVERY and count < total:
            log.info("%s %d of %d %s, %.0f a second", did, count, total, things, count / (now - started))
            last = now
    log.info("%s %d %s in %.1f s", did, total, things, time.monotonic() - started)
