"""Commands on other machines over ssh, which is never given the chance to ask for anything."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import NamedTuple

UNREACHABLE = 255  # ssh's own exit code
TIMED_OUT = 124  # as coreutils' timeout has it


class Done(NamedTuple):
    """A command that has ended: its exit code, what it wrote, and the last line of its errors."""

    code: int
    output: str
    complaint: str


Shell = Callable[[str, str], Done]  # (host, command line) -> Done


def over_ssh(*, port: int | None = None, timeout: float = 120.0) -> Shell:
    """A shell on whatever host it is given. ``timeout`` in seconds bounds each command."""
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *([] if port is None else ["-p", str(port)])]
    return lambda host, command: _run(["ssh", *options, "--", host, command], timeout)


def _run(arguments: list[str], timeout: float) -> Done:
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return Done(TIMED_OUT, "", f"no answer within {timeout:g} s")
    except OSError as error:
        return Done(UNREACHABLE, "", f"cannot start {arguments[0]}: {error.strerror}")
    lines = done.stderr.strip().splitlines() or ["no reason given"]
    return Done(done.returncode, done.stdout, lines[-1].strip().rstrip("."))
