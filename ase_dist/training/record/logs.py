"""The lines of a run's logs: their form, how they are written to the folder, and how they are read again.

A line is ``2026-01-31 12:00:00,123 [rank 0] WARNING message``; lines without this prefix continue it.
Readers rely on the prefix alone, never on the words of a message.
"""

from __future__ import annotations

import logging
import re
import time
from typing import NamedTuple

from ase_dist.training.record.run_folder import RunFolder

LOGGER = logging.getLogger("ase_dist")
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"  # local time
LOG_FORMAT = "%(asctime)s [rank {rank}] %(levelname)s %(message)s"
_PREFIX = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ \[rank (\d+)\] ([A-Z]+) (.*)")
_FILE_HANDLER = "ase_dist log file"


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
    return f"{stamp},{int(now % 1 * 1000):03d} [rank {rank}] {level} {message}\n"


def formatter(rank: int) -> logging.Formatter:
    """The formatter that puts the prefix before a message."""
    return logging.Formatter(LOG_FORMAT.format(rank=rank))


def open_logs(folder: RunFolder, *, rank: int) -> None:
    """Send this process's log lines to the log of its rank, and rank 0's to train.log too; both are appended to."""
    for path in [folder.train_log, folder.rank_log(0)] if rank == 0 else [folder.rank_log(rank)]:
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.name = _FILE_HANDLER
        handler.setFormatter(formatter(rank))
        LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)


def close_logs() -> None:
    """Close every log file that ``open_logs`` opened in this process."""
    for handler in [handler for handler in LOGGER.handlers if handler.name == _FILE_HANDLER]:
        LOGGER.removeHandler(handler)
        handler.close()
