"""What is shown while a run goes: log lines and progress.

Rank 0 of a terminal gets rich's colours and a live bar; everything else (a file, a cluster's log, another rank) gets
plain lines, and of the other ranks only warnings. Everything goes to the standard error.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ase_dist.printable import PrintableFormatter
from ase_dist.training.record.logs import LOGGER, PrefixFormatter

FILES_ONLY = "is_for_log_files"  # attribute of records that the terminal gets in another way
_HANDLER = "ase_dist console"


def set_up_logging(*, rank: int, terminal: bool | None = None) -> Console | None:
    """Send the package's log to the standard error; called again it replaces what the call before set up.

    Returns rich's console on rank 0 of a terminal (``terminal`` None: find out), for ``StepProgress``, else None.
    """
    close_console()
    console = Console(stderr=True)
    is_rich = rank == 0 and (console.is_terminal if terminal is None else terminal)
    if is_rich:
        handler: logging.Handler = RichHandler(console=console, show_path=False, markup=False, log_time_format="[%X]")
        handler.setFormatter(PrintableFormatter())
        handler.addFilter(lambda record: not getattr(record, "is_progress", False))  # the bar shows it
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(PrefixFormatter(rank))
    handler.name = _HANDLER
    handler.addFilter(lambda record: not getattr(record, FILES_ONLY, False))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # other libraries configure the root logger, and every line would come twice
    return console if is_rich else None


def close_console() -> None:
    """Undo ``set_up_logging``."""
    for handler in [handler for handler in LOGGER.handlers if handler.name == _HANDLER]:
        LOGGER.removeHandler(handler)
        handler.close()
    LOGGER.propagate = True


# ---------------------------------------------------------------------------------------------------------------------
# Progress


class StepProgress:
    """Progress through ``total`` steps, of which ``start`` were done before: a live bar, or a line per report.

    A context manager. With a ``console`` it shows a bar with the values named ``on_bar``; without, each report is a
    line of the log. Log files get the lines in both cases. Nothing waits for the device: values are plain numbers.
    """

    def __init__(
        self,
        description: str,
        *,
        total: int,
        start: int = 0,
        console: Console | None = None,
        on_bar: Sequence[str] = ("loss", "images/s"),
    ) -> None:
        self.description, self.total, self.start, self.on_bar = description, total, start, tuple(on_bar)
        self._began, self._tenth = time.monotonic(), 0
        text = TextColumn("{task.fields[text]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), text)
        self._bars = (
            Progress(*columns, TextColumn("eta"), TimeRemainingColumn(), console=console)
            if console is not None
            else None
        )
        self._bar = TaskID(0)

    def __enter__(self) -> StepProgress:
        self._began = time.monotonic()
        if self._bars is not None:
            self._bar = self._bars.add_task(self.description, total=self.total, completed=self.start, text="")
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def advance(self, step: int) -> None:
        """Move the bar: ``step`` steps are done."""
        if self._bars is not None:
            self._bars.update(self._bar, completed=step)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of the step, next to the bar or as a line, with the time that is left."""
        if self._bars is not None:
            text = "  ".join(f"{name} {values[name]:.4g}" for name in self.on_bar if name in values)
            self._bars.update(self._bar, completed=step, text=text)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        line = f"{self.description} {step}/{self.total}  {numbers}  eta {clock(self.seconds_left(step))}"
        LOGGER.info(line, extra={"is_progress": True})

    def log_every_tenth(self, step: int) -> None:
        """``step`` steps are done, in work of which each tenth is worth a line and no numbers are known."""
        tenth, self._tenth = self._tenth, 10 * step // self.total
        if self._tenth > tenth:
            self.report(step, {})
        else:
            self.advance(step)

    def seconds_left(self, step: int) -> float:
        """The time that the remaining steps take at the mean speed since this run began; NaN before its first step."""
        done = step - self.start
        return (time.monotonic() - self._began) / done * (self.total - step) if done > 0 else float("nan")

    @contextmanager
    def inner(self, description: str, *, total: int) -> Iterator[Callable[[], None]]:
        """A second bar while something else goes on, such as an evaluation; call what it yields once per item."""
        if self._bars is None:
            yield lambda: None
            return
        bars, bar = self._bars, self._bars.add_task(description, total=total, text="")
        try:
            yield lambda: bars.advance(bar)
        finally:
            bars.remove_task(bar)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss; "-" for NaN."""
    if math.isnan(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
