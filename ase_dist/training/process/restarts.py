"""``--max-restarts``: a parent that starts the same command again after a crash. It imports no torch and never hangs.

It is for one process; where a launcher starts several ranks, the launcher must restart them together
(``torchrun --max-restarts N``). A restarted run goes on from its newest whole checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from ase_dist.config import Settings
from ase_dist.errors import ExitCode, UserError
from ase_dist.printable import say
from ase_dist.training.process.signals import stopping_signals
from ase_dist.training.record.run_folder import RunFolder

FINAL_CODES = frozenset(  # another start would end the same way, or is not wanted
    {
        ExitCode.DONE,
        ExitCode.USAGE,
        ExitCode.NOT_SAVED,
        ExitCode.STOPPED,
        ExitCode.NON_FINITE,
        ExitCode.INTERRUPTED,
    }
)
PAUSE = 1.0  # seconds before another start


def supervise(arguments: Sequence[str], settings: Settings, *, restarts: int) -> int:
    """Run ``arguments`` in a child until it ends by a final code or ``restarts`` are used up; the last exit code.

    Signals go on to the child, which saves and ends; then it is not started again. Raises UserError under a launcher.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--max-restarts: a launcher started several ranks; use torchrun --max-restarts N instead")
    attempt = 0
    while True:
        # a restarted run resumes from its own checkpoints, even where the first start began from another one
        has_saved = any(RunFolder(settings.output).checkpoints.glob("step_*"))
        resume = ["resume=auto"] if attempt and (has_saved or settings.resume == "never") else []
        child = _Child([*arguments, *resume])
        code = child.wait()
        if code in FINAL_CODES or child.signalled or attempt == restarts:
            return code
        attempt += 1
        say(f"the run ended with code {code}; start {attempt} of {restarts} more")
        time.sleep(PAUSE)


class _Child:
    """A process that gets every signal of this one; its exit code is 128 + n where signal n ended it."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.signalled = False
        self._previous = {number: signal.signal(number, self._forward) for number in stopping_signals()}
        self._process = subprocess.Popen([sys.executable, *arguments])

    def wait(self) -> int:
        """Wait for its end."""
        try:
            code = self._process.wait()
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
        return 128 - code if code < 0 else code

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        self._process.send_signal(number)
