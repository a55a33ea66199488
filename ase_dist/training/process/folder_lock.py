"""One writer per folder: a lock for the time of a run or a study, which a process that dies lets go of.

On one host, and on a network file system that carries locks between hosts, ``flock`` decides. Where it does not reach
the other host, the lock file's time of change does: its holder renews it every ``BEAT`` seconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import platform
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from ase_dist.errors import UserError, describe, file_error
from ase_dist.files import LONG_NAME, read_bytes, refuse_irregular, wait_until
from ase_dist.training.record.logs import TIME_FORMAT

LOGGER = logging.getLogger("ase_dist")
BEAT = 5.0  # seconds between two signs of life of the holder
PATIENCE = 3 * BEAT + 1  # seconds without one after which a holder on another host counts as dead
LONGEST = 10_000  # bytes of a lock file that are read
_descriptors: set[int] = set()  # of the lock files that this process has open


class Holder(NamedTuple):
    """Who holds a lock: what the lock file says."""

    host: str
    boot: str  # the kernel's id of this start of the host, which tells two hosts of one name apart
    pid: int
    since: str

    @property
    def is_on_this_host(self) -> bool:
        """Whether ``flock`` alone decides."""
        return (self.host, self.boot) == (platform.node(), _boot_id())


class FolderLock:
    """The lock file ``path``; a context manager that releases on leaving what ``take`` took.

    1. ``take`` opens the file and asks for its ``flock`` without waiting.
    2. Where a process on this host has it, that is the answer. Where another host's process is named in it, up to
       ``PATIENCE`` seconds show whether that one still renews it; one that is dead is passed over.
    3. The file then names this process, and a thread renews it. A forked child does not hold it.

    ``folder`` is what is locked; ``doing`` what the holder does there, such as "training"; ``other`` what names another
    folder, such as output=FOLDER.
    """

    def __init__(self, path: Path, *, folder: Path, doing: str, other: str) -> None:
        self.path, self.folder, self.doing, self.other = path, folder, doing, other
        self._descriptor = -1
        self._leaving = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="folder lock", daemon=True)

    def take(self) -> None:
        """Take the lock. Raises UserError, which names the holder, where another process has it."""
        try:
            self._take()
        except OSError as error:
            raise file_error(
                error, f"{self.path}: cannot be locked ({describe(error)}); name another folder with {self.other}"
            ) from None

    def _take(self) -> None:
        while True:
            refuse_irregular(self.path)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
            _descriptors.add(descriptor)
            is_free = _try_flock(descriptor)
            if self._is_current(descriptor):
                break
            self._close(descriptor)  # the holder has ended and removed the file meanwhile
        try:
            self._refuse_while_held(is_free=is_free)
            holder = Holder(platform.node(), _boot_id(), os.getpid(), time.strftime(TIME_FORMAT))
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder._asdict()).encode() + b"\n", 0)
        except BaseException:
            self._close(descriptor)
            raise
        self._descriptor = descriptor
        _let_children_forget()
        self._renewing.start()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor < 0:
            return
        self._leaving.set()
        self._renewing.join(timeout=BEAT)
        with contextlib.suppress(OSError):  # a file that stays is taken for a dead process's
            if self._is_current(self._descriptor):
                self.path.unlink()
        self._close(self._descriptor)

    def _refuse_while_held(self, *, is_free: bool | None) -> None:
        """Raise UserError where another process holds the lock; ``is_free`` is what ``flock`` says, None: nothing."""
        if is_free is False:  # the holder may not have written its name yet
            wait_until(lambda: _read(self.path) is not None, patience=2)
        holder = _read(self.path)
        if holder is None and is_free is False:
            raise UserError(self._sentence("another process"))
        if holder is None or (holder.is_on_this_host and is_free):
            return
        is_alive = True
        if not holder.is_on_this_host or is_free is None:
            LOGGER.warning(
                "%s names process %s on %s: waiting up to %.0f s for a sign of life of it",
                *(self.path, holder.pid, holder.host, PATIENCE),
            )
            before = _changed_at(self.path)
            is_alive = wait_until(lambda: _changed_at(self.path) not in (before, None), patience=PATIENCE, pause=0.5)
        if is_alive:
            raise UserError(self._sentence(f"process {holder.pid} on {holder.host}", since=holder.since))

    def _sentence(self, who: str, *, since: str | None = None) -> str:
        when = f" since {since}" if since else ""
        return (
            f"{str(self.folder)!r} is in use: {who} has been {self.doing} there{when}; wait until it has ended, "
            f"stop it, or name another folder with {self.other}"
        )

    def _is_current(self, descriptor: int) -> bool:
        """Whether the path still leads to the open file."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def _renew(self) -> None:
        while not self._leaving.wait(BEAT):
            with contextlib.suppress(OSError):  # the disk may be full, or away for a moment
                os.utime(self._descriptor)

    @staticmethod
    def _close(descriptor: int) -> None:
        _descriptors.discard(descriptor)
        os.close(descriptor)


def lock_beside(folder: Path) -> Path:
    """The lock file of a folder that is made by a rename, or may not exist yet: hidden, in the same parent folder."""
    is_long = len(os.fsencode(folder.name)) > LONG_NAME
    name = hashlib.sha256(os.fsencode(folder.name)).hexdigest() if is_long else folder.name
    return folder.with_name(f".{name}.lock")


def _try_flock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _read(path: Path) -> Holder | None:
    """Who is named in the lock file; None where nobody is."""
    try:
        return Holder(**json.loads(read_bytes(path, max_bytes=LONGEST)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _changed_at(path: Path) -> int | None:
    """The file's time of change. It is opened for it: then a network file system asks its server."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


@functools.cache
def _let_children_forget() -> None:
    """From now on a child that is forked closes the lock files: it must not hold them once its parent has died."""

    def close_all() -> None:
        for descriptor in _descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        _descriptors.clear()

    os.register_at_fork(after_in_child=close_all)
