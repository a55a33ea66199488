"""Signals that ask a run to stop: they set a flag, and the loop saves and ends after the current step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from ase_dist.errors import UserError
from ase_dist.stopping import STOPPING


def stopping_signals() -> list[signal.Signals]:
    """``STOPPING`` without a SIGHUP that is ignored, as under nohup."""
    return [s for s in STOPPING if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


class StopFlag:
    """While entered, the signals of ``STOPPING`` only set a flag; the previous handlers are restored on leaving.

    The handler does nothing else, so that a signal at any moment, even a second one while saving, disturbs nothing.
    An ignored SIGHUP stays ignored, as nohup wants it.
    Raises UserError where it is entered outside the main thread, the only one that may handle signals.
    """

    def __init__(self) -> None:
        self.received: list[str] = []  # names of the signals, in order
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether a signal was received."""
        return bool(self.received)

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is not threading.main_thread():
            raise UserError(
                f"StopFlag: entered in thread {threading.current_thread().name!r}, wanted the main thread, "
                "the only one in which Python handles signals"
            )
        self._process = os.getpid()
        self._previous = {number: signal.signal(number, self._handle) for number in stopping_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by C code, not readable

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:
            self.received.append(signal.Signals(number).name)
        elif number == signal.SIGTERM:  # a forked helper has no step to finish, and its parent must be able to end it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
