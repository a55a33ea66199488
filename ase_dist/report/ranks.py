"""What each rank did, from its log, its heartbeat file and the records of starts and ends.

Of a log only the prefix of its lines is read, see ``ase_dist.training.record.logs``; messages are shown as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from ase_dist.errors import UserError
from ase_dist.files import open_regular
from ase_dist.json_files import read_object
from ase_dist.training.record.logs import parse_line
from ase_dist.training.record.records import Records
from ase_dist.training.record.run_folder import RunFolder

ERRORS = ("ERROR", "CRITICAL")
# exits that all ranks of a run share; which rank failed or was silent only the files of the ranks say
SHARED_ENDS = {"done": "done", "stopped": "stopped", "non_finite": "not finite", "not_saved": "not saved"}
TAIL = 2_000_000  # bytes that are read at the end of a log
FRESH = 60.0  # a rank with a heartbeat of at most so many seconds ago is running
MOST_NOTICES = 20  # shown per rank, the newest
NOTICE_LENGTH = 600


@dataclass(frozen=True)
class Notice:
    """A warning or an error in a log, with the lines that belong to it."""

    time: str
    level: str
    text: str


@dataclass
class RankReport:
    """One rank over all starts of the run; ``ended`` is about the last start.

    ``doing`` is what it did last where there is a heartbeat file.
    """

    rank: int
    starts: int = 0
    first: str = ""
    last: str = ""
    notices: list[Notice] = field(default_factory=list)
    host: str = ""
    doing: str = ""
    is_cut: bool = False
    ended: str = "unknown"  # one of SHARED_ENDS' words, running, killed, silent, failed or unknown

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
        return self.count(*ERRORS)

    @property
    def shown(self) -> list[Notice]:
        """The newest notices."""
        return self.notices[-MOST_NOTICES:]


def read_ranks(run: RunFolder, records: Records, *, now: float | None = None) -> list[RankReport]:
    """Every rank that has a log or a heartbeat file, in order; ``now`` in seconds since 1970."""
    now = time.time() if now is None else now
    return [_read_rank(run, records, rank, now) for rank in run.ranks()]


def _read_rank(run: RunFolder, records: Records, rank: int, now: float) -> RankReport:
    report = RankReport(rank, starts=sum(rank < world for world in records.worlds))
    log, beat = run.rank_log(rank), run.beat(rank)
    if log.is_file():
        with open_regular(log) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
        report.is_cut = size > TAIL
        _read_lines(report, lines[1:] if report.is_cut else lines)
    try:
        beaten = beat.stat().st_mtime  # a rank that ends removes the file, also between two lines here
        state = read_object(beat)
    except FileNotFoundError:
        beaten = None
    except (OSError, UserError):
        state = {}
    if beaten is not None and rank < (records.worlds or [rank + 1])[-1]:  # else it is of a start with more ranks
        report.host, report.doing = str(state.get("host", "")), str(state.get("doing", ""))
        is_fresh = now - beaten < FRESH
        report.ended = "silent" if state.get("ended") == "silent" else "running" if is_fresh else "killed"
    elif records.exit in SHARED_ENDS:
        report.ended = SHARED_ENDS[records.exit]
    elif (rank == 0 and records.exit == "failed") or any(  # it is rank 0 that records ends
        notice.level in ERRORS and notice.time >= records.started for notice in report.notices
    ):
        report.ended = "failed"
    return report


def _read_lines(report: RankReport, lines: Iterable[str]) -> None:
    """Add the times of the first and the last message, and the notices with the lines that follow them."""
    is_notice = False
    for line in lines:
        found = parse_line(line)
        if found is not None:
            report.first, report.last = report.first or found.time, found.time
            is_notice = found.level not in ("DEBUG", "INFO")
            if is_notice:
                report.notices.append(Notice(found.time, found.level, found.message[:NOTICE_LENGTH]))
        elif is_notice:
            notice = report.notices[-1]
            if len(notice.text) < NOTICE_LENGTH * 4:
                text = f"{notice.text}\n{line[:NOTICE_LENGTH]}"
                report.notices[-1] = Notice(notice.time, notice.level, text)
