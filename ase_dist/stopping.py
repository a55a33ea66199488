"""The signals that ask a process to stop, and how a command that one of them ends says so. Imports next to nothing."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What a terminal, a launcher or a scheduler sends to all processes of a job. SIGHUP: the terminal was closed. SIGUSR1
# and SIGUSR2: the time limit is near.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
GRACE = 2.0  # seconds that the main thread gets to notice a signal, or to end an import
PAUSE = 0.5  # seconds in which a second Ctrl-C is taken for the first


class Stopped(KeyboardInterrupt):
    """One of ``STOPPING`` has come: what is under way cleans up, and the command ends with 128 + ``number``."""

    def __init__(self, number: int) -> None:
        super().__init__(stopped_by(number))
        self.number = number


def stopped_by(number: int) -> str:
    """The clause that a command ends with: ``interrupted`` for Ctrl-C, else ``ended by SIGTERM``."""
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def end_at_once(number: int, frame: FrameType | None = None) -> None:
    """The handler where nothing is there to be saved or cleaned up: one line, and the code of a process so ended."""
    os.write(2, f"error: {stopped_by(number)}\n".encode())
    os._exit(128 + number)


@contextmanager
def raising_stopped() -> Iterator[list[int]]:
    """Let the signals of ``STOPPING`` raise Stopped in the main thread; gives the numbers of those that have come.

    A signal that is ignored stays so, and one that a caller handles is the caller's. Nothing is raised in the middle of
    an import: torch's aborts. The main thread may be waiting for another rank, where Python runs no handler: where
    ``GRACE`` seconds have raised nothing a thread ends the process, as it would have ended without a handler. Nothing
    happens outside of the main thread, which alone may handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    outer = next((handler for handler in before.values() if isinstance(handler, _Raise)), None)
    if outer is not None:  # a command that another one runs
        yield outer.seen
        return
    _keep_from_forked()
    handler, (read, write) = _Raise(), os.pipe()
    os.set_blocking(write, False)
    watcher = threading.Thread(target=handler.watch, args=(read,), name="signal watch", daemon=True)
    watcher.start()
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    no_ones = (signal.SIG_DFL, signal.default_int_handler, end_at_once)
    ours = [number for number in STOPPING if before[number] in no_ones]
    try:
        for number in ours:
            signal.signal(number, handler)
        yield handler.seen
        if handler.deferred and not handler.seen:
            raise Stopped(handler.deferred)
    finally:
        handler.is_done.set()
        for number in ours:
            signal.signal(number, before[number])
        signal.set_wakeup_fd(wakeup)
        os.write(write, bytes(1))  # ends the thread
        watcher.join()
        os.close(write)
        os.close(read)


@functools.cache
def _keep_from_forked() -> None:
    """A signal of a forked helper is not this process's; only a process's first call does anything."""
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


class _Raise:
    """The handler of ``raising_stopped``: the first signal raises, later ones do not disturb what cleans up.

    Ctrl-C raises again after ``PAUSE``, for whoever does not want to wait for the end of that.
    """

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.deferred = 0  # the number of one that came in the middle of an import
        self.is_done = threading.Event()
        self._deaf_until = 0.0
        self._process = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked helper has nothing to clean up
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if _is_importing(frame):
            self.deferred = number  # ``watch`` sends it again
            return
        now = time.monotonic()
        if self.seen and (number != signal.SIGINT or now < self._deaf_until):
            return
        self.seen.append(number)
        self._deaf_until = now + PAUSE
        self.is_done.set()
        raise Stopped(number)

    def watch(self, read: int) -> None:
        """Send a signal that has raised nothing again and again; after ``GRACE`` end the process."""
        while number := os.read(read, 1)[0]:
            deadline = time.monotonic() + GRACE
            while self._handles(number) and not self.is_done.wait(PAUSE / 10):
                if time.monotonic() > deadline:
                    end_at_once(number)
                os.kill(os.getpid(), number)

    def _handles(self, number: int) -> bool:
        return signal.getsignal(number) is self


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
