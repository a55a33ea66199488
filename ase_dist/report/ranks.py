"""What each rank did, from its log and its last sign of life: how far it came, what it warned of, how it ended."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ase_dist.training.record.run_folder import RunFolder

LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ \[rank \d+\] ([A-Z]+) (.*)")
PROGRESS = re.compile(r"train (\d+)/\d+ ")
SILENT = re.compile(r"rank \d+ on .* has made no progress for ")  # of ``guards.Watchdog``
STOPPED = "stopped by a signal"
START_TABLE = "run"  # the line after an empty one with which every start begins, see ``reports.start_tables``
TAIL = 2_000_000  # bytes of a log that are read, its end
FRESH = 60.0  # seconds for which a sign of life stands for a rank that is still at work
MOST_NOTICES = 20  # that are shown of a rank, the newest
NOTICE_LENGTH = 600


@dataclass(frozen=True)
class Notice:
    """A warning or an error in a log, the lines that belong to it with it."""

    time: str
    level: str
    text: str


@dataclass
class RankReport:
    """One rank over all starts of the run; ``ended`` is about the last of them.

    ``steps`` is the last step that its log reports, ``doing`` what it did last where it left a sign of life behind.
    """

    rank: int
    starts: int = 0
    first: str = ""
    last: str = ""
    steps: int | None = None
    notices: list[Notice] = field(default_factory=list)
    host: str = ""
    doing: str = ""
    is_cut: bool = False
    ended: str = "unknown"  # done | stopped | running | killed | silent | failed | unknown

    def count(self, *levels: str) -> int:
        """How many notices are of these levels."""
        return sum(notice.level in levels for notice in self.notices)

    @property
    def warnings(self) -> int:
        """Warnings over all starts."""
        return self.count("WARNING")

    @property
    def errors(self) -> int:
        """Errors over all starts."""
        return self.count("ERROR", "CRITICAL")

    @property
    def shown(self) -> list[Notice]:
        """The newest notices."""
        return self.notices[-MOST_NOTICES:]


def read_ranks(run: RunFolder, *, now: float | None = None) -> list[RankReport]:
    """Every rank that left a log or a sign of life behind, in order; ``now`` in seconds since 1970."""
    now = time.time() if now is None else now
    return [_read_rank(run, rank, now) for rank in run.ranks()]


def _read_rank(run: RunFolder, rank: int, now: float) -> RankReport:
    report = RankReport(rank)
    lines, report.is_cut = _tail(run.rank_log(rank))
    _read_lines(report, lines)
    beat = run.beat(rank)
    if beat.is_file():
        state = _state(beat)
        report.host, report.doing = str(state.get("host", "")), str(state.get("doing", ""))
        if report.ended != "silent":
            report.ended = "running" if now - beat.stat().st_mtime < FRESH else "killed"
    return report


def _tail(path: Path) -> tuple[list[str], bool]:
    """The last lines of a log, and whether there are more."""
    if not path.is_file():
        return [], False
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    return (lines[1:], True) if size > TAIL else (lines, False)


def _read_lines(report: RankReport, lines: Iterable[str]) -> None:
    """Messages with the lines that follow them; every start begins anew what is known of the end."""
    is_notice = opens_table = False
    for line in lines:
        match = LINE.fullmatch(line)
        if SILENT.match(line):
            report.ended, is_notice = "silent", True
            report.notices.append(Notice(report.last, "ERROR", line[:NOTICE_LENGTH]))
        elif match is None:
            if opens_table and line == START_TABLE:
                report.starts, report.ended = report.starts + 1, "unknown"
            elif is_notice:
                _append(report, line)
        else:
            is_notice = _read_message(report, *match.groups())
        opens_table = match is not None and not match[3]


def _read_message(report: RankReport, when: str, level: str, text: str) -> bool:
    """Take in one message; whether it is a notice."""
    report.first, report.last = report.first or when, when
    if progress := PROGRESS.match(text):
        report.steps = int(progress[1])
    elif text.startswith(STOPPED):
        report.ended = "stopped"
    if level == "INFO":
        return False
    if level in ("ERROR", "CRITICAL"):
        report.ended = "failed"
    report.notices.append(Notice(when, level, text[:NOTICE_LENGTH]))
    return True


def _append(report: RankReport, line: str) -> None:
    """A line of a traceback to the last notice, within reason."""
    notice = report.notices[-1]
    if len(notice.text) < NOTICE_LENGTH * 4:
        report.notices[-1] = Notice(notice.time, notice.level, f"{notice.text}\n{line[:NOTICE_LENGTH]}")


def _state(beat: Path) -> Mapping[str, Any]:
    try:
        state = json.loads(beat.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
