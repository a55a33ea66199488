"""The start of a command: Ctrl-C ends it in one line, also while its modules are imported. Imports next to nothing."""

from __future__ import annotations

import os
import signal
from importlib import import_module
from types import FrameType

INTERRUPTED = 130  # as in ExitCode, whose module takes longer to import
SENTENCE = b"error: interrupted\n"


def start(name: str) -> int:
    """Import ``ase_dist.commands.NAME`` and run its ``main``; the exit code.

    An import that Ctrl-C breaks off in the middle would end with a traceback, if at all: some libraries catch it. So it
    ends the process until ``run_command`` takes over, and again when the command is over and Python ends.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background
        signal.signal(signal.SIGINT, end_at_once)
    code: int = import_module(f"ase_dist.commands.{name}").main()
    return code


def ase_dist() -> int:
    """The program ``ase-dist``; the exit code."""
    return start("main")


def end_at_once(number: int, frame: FrameType | None) -> None:
    """The handler of SIGINT where nothing is there to be saved or cleaned up."""
    os.write(2, SENTENCE)
    os._exit(INTERRUPTED)
