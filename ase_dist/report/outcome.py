"""How a run ended, or that it has not: one word and one sentence, from its summary and what its ranks left behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ase_dist.report import text
from ase_dist.report.ranks import RankReport

GOOD, OPEN, BAD = "good", "open", "bad"


@dataclass(frozen=True)
class Outcome:
    """``tone`` is good, open or bad; ``sentence`` is for a reader who knows nothing of the run."""

    word: str
    tone: str
    sentence: str


def outcome(summary: Mapping[str, Any], ranks: Sequence[RankReport], *, last_step: int, total: int | None) -> Outcome:
    """``summary`` is that of summary.json, {} where there is none; ``last_step`` the last with a record, or -1."""
    reached = f"step {max(last_step, 0):,}" + (f" of {total:,}" if total else "")
    for report in ranks:
        if report.ended == "silent":
            sentence = f"Rank {report.rank} made no progress and ended itself; the last record is of {reached}."
            return Outcome("ended itself", BAD, sentence)
    killed = [report for report in ranks if report.ended == "killed"]
    if killed:
        return Outcome(
            "killed",
            BAD,
            f"{_whom(killed)} left without a word, so the run was killed or its machine went "
            f"down; the last record is of {reached}.",
        )
    if any(report.ended == "running" for report in ranks):
        return Outcome(
            "running", OPEN, f"The run was at work when this page was made; the last record is of {reached}."
        )
    if summary and _is_current(summary, last_step):
        return _from_summary(str(summary.get("exit", "unknown")), reached)
    failed = [report for report in ranks if report.ended == "failed"]
    if failed:
        return Outcome(
            "failed", BAD, f"{_whom(failed)} ended with an error, see below; the last record is of {reached}."
        )
    return Outcome(
        "no summary",
        BAD,
        "The run wrote no summary: it ended by an error that its logs do not hold, or it "
        f"was not even begun; the last record is of {reached}.",
    )


def settle_ranks(ranks: Sequence[RankReport], result: Outcome) -> None:
    """A rank whose log says nothing of its end ended as the run did, where that went well."""
    for report in ranks:
        if report.ended == "unknown" and result.tone == GOOD:
            report.ended = result.word


def _from_summary(word: str, reached: str) -> Outcome:
    if word == "done":
        return Outcome("done", GOOD, "The run took its last step, evaluated and saved.")
    if word == "stopped":
        sentence = f"A signal stopped the run after {reached}, with a checkpoint; the same command goes on from there."
        return Outcome("stopped", OPEN, sentence)
    return Outcome(word[:40], BAD, f"The summary says {word[:40]!r}; the last record is of {reached}.")


def _is_current(summary: Mapping[str, Any], last_step: int) -> bool:
    """Whether the summary is of the last start: an older one knows nothing of later steps."""
    step = summary.get("step")
    return isinstance(step, int) and step >= last_step


def _whom(reports: Sequence[RankReport]) -> str:
    numbers = [str(report.rank) for report in reports[:8]]
    names = f"Rank {numbers[0]}" if len(reports) == 1 else f"Ranks {', '.join(numbers)}"
    rest = f" and {text.plural(len(reports) - 8, 'other')}" if len(reports) > 8 else ""
    doing = f" (last seen at {reports[0].doing!r})" if reports[0].doing else ""
    return f"{names}{rest}{doing}"
