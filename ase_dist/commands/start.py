"""The start of a command: a signal ends it in one line, while its modules are imported too. Imports next to nothing."""

from __future__ import annotations

import signal
from importlib import import_module

from ase_dist.stopping import STOPPING, end_at_once


def start(name: str) -> int:
    """Import ``ase_dist.commands.NAME`` and run its ``main``; the exit code.

    An import that Ctrl-C breaks off in the middle would end with a traceback, if at all: some libraries catch it. So a
    signal ends the process until ``run_command`` takes over, and again when the command is over and Python ends.
    """
    for number in STOPPING:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # else it is ignored, as by nohup
            signal.signal(number, end_at_once)
    code: int = import_module(f"ase_dist.commands.{name}").main()
    return code


def ase_dist() -> int:
    """The program ``ase-dist``; the exit code."""
    return start("main")
