"""What a run's folder holds, read once for the pages that show it: results, settings, environment, how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ase_dist.report.outcome import RunOutcome, outcome, settle_ranks
from ase_dist.report.ranks import RankReport, read_ranks
from ase_dist.report.reading import Reader
from ase_dist.report.settings import read_settings
from ase_dist.training.record.environment import harmless_environment
from ase_dist.training.record.records import Records, reach
from ase_dist.training.record.run_folder import RunFolder


@dataclass(frozen=True)
class RunFiles:
    """The content of a run's files; what is missing is empty, and ``problems`` says what could not be read."""

    run: RunFolder
    problems: list[str]
    summary: dict[str, Any]
    environment: dict[str, Any]
    settings: dict[str, Any]
    records: Records
    ranks: list[RankReport]
    outcome: RunOutcome
    total: int | None  # steps that it was asked for

    @property
    def has_numbers(self) -> bool:
        """Whether there is anything to draw or to compare."""
        return self.records.last_step >= 0 or bool(self.records.evaluated_tasks())


def read_run_files(run: RunFolder) -> RunFiles:
    """Read them; of a run at work they are as they were a moment ago."""
    reader = Reader()
    summary, environment = reader.json(run.summary), harmless_environment(reader.json(run.environment))
    settings = reader.parsed(run.config, read_settings) or {}
    records = _records(reader.metrics(run.metrics), summary)
    ranks = read_ranks(run, records)
    total = summary.get("total_steps") or reach(settings, "train", "max_steps")[1]
    total = total if isinstance(total, int) else None
    result = outcome(records, summary, ranks, total=total)
    settle_ranks(ranks, result)
    return RunFiles(run, reader.problems, summary, environment, settings, records, ranks, result, total)


def _records(lines: list[dict[str, Any]], summary: Mapping[str, Any]) -> Records:
    """The lines of metrics.jsonl; where they have no evaluation, the summary's is added."""
    if not any(line["kind"] == "eval" for line in lines) and isinstance(summary.get("metrics"), dict):
        step = summary.get("metrics_step")
        names = list(summary["metrics"])
        if not lines:
            lines = [{"kind": "run", "step": 0, "tasks": names, "data": summary.get("data", "")}]
        lines.append(
            {
                "kind": "eval",
                "step": step if isinstance(step, int) else 0,
                **{key: summary.get(key) for key in ("metrics", "trivial")},
            }
        )
    return Records(lines)
