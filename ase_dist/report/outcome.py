"""How a run ended, or that it still runs: one word and one sentence, from its records and its ranks' files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ase_dist.report import text
from ase_dist.report.ranks import RankReport
from ase_dist.training.record.records import Records

GOOD, OPEN, BAD = "good", "open", "bad"
LONGEST_REASON = 600  # characters


@dataclass(frozen=True)
class RunOutcome:
    """``tone`` is good, open or bad; ``sentence`` is for a reader who does not know the run."""

    word: str
    tone: str
    sentence: str


def outcome(
    records: Records, summary: Mapping[str, Any], ranks: Sequence[RankReport], *, total: int | None
) -> RunOutcome:
    """How the run ended; ``summary`` is that of summary.json, {} where there is none.

    Runs of version 0.1 recorded no ends; for them the summary says it, unless it is of an earlier start.
    """
    reached = f"step {max(records.last_step, 0):,}" + (f" of {total:,}" if total else "")
    last = f"the last record is of {reached}."
    silent, killed, failed = ([r for r in ranks if r.ended == word] for word in ("silent", "killed", "failed"))
    if silent:
        return RunOutcome("ended itself", BAD, f"{_whom(silent)} made no progress, so the run ended itself; {last}")
    if killed:
        why = "left without a word, so the run was killed or its machine went down"
        return RunOutcome("killed", BAD, f"{_whom(killed)} {why}; {last}")
    if any(report.ended == "running" for report in ranks):
        return RunOutcome("running", OPEN, f"The run was at work when this page was made; {last}")
    exit, step = records.exit, summary.get("step")
    if not records.has_ends and isinstance(step, int) and step >= records.last_step:
        exit = str(summary.get("exit", "unknown"))
    if exit:
        return _ended(exit, records.why, reached, last)
    if failed:
        return RunOutcome("failed", BAD, f"{_whom(failed)} ended with an error, see below; {last}")
    sentence = "The run recorded no end: it was killed as it began or as it ended, or it was not even begun"
    return RunOutcome("no end", BAD, f"{sentence}; {last}")


def settle_ranks(ranks: Sequence[RankReport], result: RunOutcome) -> None:
    """Where a run went well, so did every rank that left no heartbeat file."""
    for report in ranks:
        if report.ended in ("unknown", "failed") and result.tone == GOOD:
            report.ended = result.word


def _ended(exit: str, why: str, reached: str, last: str) -> RunOutcome:
    """The outcome for the name of an exit code, see ``ExitCode``."""
    reason = f": {why[:LONGEST_REASON].rstrip('.')}" if why else ""
    if exit == "done":
        return RunOutcome("done", GOOD, "The run took its last step, evaluated and saved.")
    if exit == "stopped":
        sentence = f"A signal stopped the run after {reached}, with a checkpoint; the same command goes on from there."
        return RunOutcome("stopped", OPEN, sentence)
    words = {
        "silent": ("ended itself", "The run made no progress"),
        "non_finite": ("not finite", "A loss or a gradient was not finite"),
        "not_saved": ("not saved", "A checkpoint could not be saved"),
        "io_error": ("failed", "A file or a connection failed for a moment, and the same command may work now"),
        "usage": ("refused", "Settings, data or a checkpoint could not be used"),
        "failed": ("failed", "The run ended with an error"),
    }
    word, sentence = words.get(exit, (exit[:40], f"The run ended as {exit[:40]!r}"))
    return RunOutcome(word, BAD, f"{sentence}{reason}; {last}")


def _whom(reports: Sequence[RankReport]) -> str:
    numbers = [str(report.rank) for report in reports[:8]]
    names = f"Rank {numbers[0]}" if len(reports) == 1 else f"Ranks {', '.join(numbers)}"
    rest = f" and {text.plural(len(reports) - 8, 'other')}" if len(reports) > 8 else ""
    doing = f" (last seen at {reports[0].doing!r})" if reports[0].doing else ""
    return f"{names}{rest}{doing}"
