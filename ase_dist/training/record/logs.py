"""The lines of a run's logs: their form, how they are written to the folder, and how they are read again.

A line is ``2026-01-31 12:00:00,123 [rank 0] WARNING message``; lines without this prefix continue it.
Readers rely on the prefix alone, never on the words of a message.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import NamedTuple

from ase_dist.printable import PrintableFormatter, printable
from ase_dist.training.record.appending import LineFile, RecordError
from ase_dist.training.record.run_folder import RunFolder

LOGGER = logging.getLogger("ase_dist")
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"  # local time
LOG_FORMAT = "%(asctime)s [rank {rank}] %(levelname)s %(message)s"
_PREFIX = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ \[rank (\d+)\] ([A-Z]+) (.*)")


class LogLine(NamedTuple):
    """The parts of a line with the prefix; ``time`` as in the log, to the second."""

    time: str
    rank: int
    level: str
    message: str


def parse_line(line: str) -> LogLine | None:
    """The parts of a line; None where it has no prefix: it continues the one before, or another program wrote it."""
    match = _PREFIX.fullmatch(line)
    return LogLine(match[1], int(match[2]), match[3], match[4]) if match else None


def format_line(rank: int, level: str, message: str) -> str:
    """A line as the handlers write it, for code that must not wait for the lock of ``logging``."""
    now = time.time()
    stamp = time.strftime(TIME_FORMAT, time.localtime(now))
    return f"{stamp},{int(now % 1 * 1000):03d} [rank {rank}] {level} {printable(message)}\n"


class PrefixFormatter(PrintableFormatter):
    """Puts the prefix before a message. Further lines (of a table, of a traceback) never look like a line with one."""

    def __init__(self, rank: int) -> None:
        super().__init__(LOG_FORMAT.format(rank=rank))

    def format(self, record: logging.LogRecord) -> str:
        """The text of a record, of one line or more."""
        first, *others = super().format(record).split("\n")
        return "\n".join([first, *(f"  {line}" if parse_line(line) else line for line in others)])


class LogFile(logging.Handler):
    """Appends records to the log ``path``.

    An error of writing does not interrupt the code that logs: the first one is kept in ``failure``.
    """

    def __init__(self, path: Path, *, rank: int) -> None:
        super().__init__()
        self.file = LineFile(path)
        self.failure: RecordError | None = None
        self.setFormatter(PrefixFormatter(rank))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, whole or not at all."""
        try:
            self.file.append(f"{self.format(record)}\n")
        except RecordError as error:
            self.failure = self.failure or error
        except Exception:  # a mistake in the call that logs
            self.handleError(record)

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        super().close()


def open_logs(folder: RunFolder, *, rank: int) -> None:
    """Send this process's log lines to the log of its rank, and rank 0's to train.log too; both are appended to.

    Raises UserError where one is no regular file, RecordError where it cannot be opened.
    """
    for path in [folder.train_log, folder.rank_log(0)] if rank == 0 else [folder.rank_log(rank)]:
        LOGGER.addHandler(LogFile(path, rank=rank))
    LOGGER.setLevel(logging.INFO)


def log_failure() -> RecordError | None:
    """The first error of writing the log files of this process, None where all lines were written."""
    failures = [handler.failure for handler in LOGGER.handlers if isinstance(handler, LogFile)]
    return next((failure for failure in failures if failure is not None), None)


def close_logs() -> None:
    """Close every log file that ``open_logs`` opened in this process."""
    for handler in [handler for handler in LOGGER.handlers if isinstance(handler, LogFile)]:
        LOGGER.removeHandler(handler)
        handler.close()
