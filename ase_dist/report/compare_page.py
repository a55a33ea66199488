"""The content of the page that compares runs: curves over each other, results with gains, settings that differ."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ase_dist.config import setting_keys
from ase_dist.errors import UserError
from ase_dist.report.charts import Chart, Line
from ase_dist.report.comparison import (
    ComparedRun,
    Reference,
    color_of_run,
    compare_runs,
    differences,
    name_runs,
    place_and_versions,
)
from ase_dist.report.images import make_album
from ase_dist.report.run_files import read_run_files
from ase_dist.report.run_page import prediction_candidates
from ase_dist.report.text import DASH, many, plural, significant, size
from ase_dist.training.record.console import clock
from ase_dist.training.record.records import Series, TaskFacts, branch, number
from ase_dist.training.record.run_folder import RunFolder


def comparison_content(folders: Sequence[Path], *, reference: str | None, out: Path) -> dict[str, Any]:
    """What the template ``compare.html`` shows; links are relative to the page at ``out``.

    Gains are relative to ``reference``, one of the runs or anything that the command evaluate takes, and without to
    the first run. A folder that is no run, or whose numbers cannot be read, is named on the page and left out. Raises
    UserError where a folder is not there, and where no run is left.
    """
    paths = list(dict.fromkeys(Path(os.path.normpath(Path(folder).absolute())) for folder in folders))
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{str(path)!r} is not there; name the output folders of runs")
    problems: list[str] = []
    runs: list[ComparedRun] = []
    for path, name in zip(paths, name_runs(paths), strict=True):
        if not RunFolder(path).looks_used():
            problems.append(f"{name} is left out: it is no run's folder, it has none of the files that a run leaves.")
            continue
        files = read_run_files(RunFolder(path))
        problems += [f"{name}: {problem}" for problem in files.problems]
        if files.has_numbers:
            runs.append(ComparedRun(name, color_of_run(len(runs)), files))
        else:
            problems.append(f"{name} is left out: it has recorded no number, or none that can be read.")
    if not runs:
        raise UserError(f"there is no run to compare: {' '.join(problems)}")
    chosen = _reference(reference, runs)
    comparison = compare_runs(runs, chosen)
    order = {key: i for i, key in enumerate(setting_keys())}
    album = make_album([c for run in runs for c in prediction_candidates(run.files.run, label=f"{run.name}, ")[-1:]])
    return {
        "title": f"{plural(len(runs), 'run')} compared" if len(runs) > 1 else runs[0].name,
        "problems": problems,
        "folder": os.path.commonpath([str(path) for path in paths]),
        "runs": [_described(run, out) for run in runs],
        "reference": chosen.name,
        "comparison": comparison,
        "metric_charts": _metric_charts(runs, comparison.columns),
        "loss_charts": _loss_charts(runs),
        "course_charts": _course_charts(runs),
        "settings": differences((run.settings for run in runs), lambda key: (order.get(_setting_of(key), 10**6), key)),
        "places": differences(map(place_and_versions, runs), lambda _: 0),
        "album": album,
    }


def _setting_of(key: str) -> str:
    """The setting that an entry of a dictionary belongs to."""
    known = set(setting_keys())
    while key and key not in known:
        key = key.rpartition(".")[0]
    return key


def _reference(name: str | None, runs: Sequence[ComparedRun]) -> Reference:
    """One of the runs, by name or place, or what ``read_reference`` knows."""
    path = Path(os.path.normpath(Path(name).absolute())) if name is not None else None
    for run in runs:
        if name is None or name == run.name or path == run.files.run.path:
            return Reference(run.name, run.data, {task: run.scores(task) for task in run.rows})
    assert name is not None
    from ase_dist.deployment.reference import read_reference  # imports torch

    found = read_reference(name)
    return Reference(found.name, found.data, found.scores)


def _described(run: ComparedRun, out: Path) -> dict[str, Any]:
    """The row of the table of runs."""
    files, page = run.files, run.files.run.report
    records, summary = files.records, files.summary
    step = max(records.last_step, 0)
    memory = max(records.series("train", "memory_bytes").values, default=float("nan"))
    speed = number(summary.get("images_per_second") or records.series("train", "images_per_second").last)
    seconds = number(summary.get("train_seconds"))
    return {
        "run": run,
        "link": quote(os.path.relpath(page, out.parent)) if page.is_file() else "",
        "path": str(files.run.path),
        "steps": f"{step:,}" + (f" of {files.total:,}" if files.total else ""),
        "outcome": files.outcome,
        "data": run.data.replace("_", " ") or DASH,
        "ranks": str(place_and_versions(run).get("ranks", DASH)),
        "time": clock(seconds) if math.isfinite(seconds) else DASH,
        "speed": significant(speed, 3),
        "memory": size(memory),
        "trained": many(number(branch(summary, "parameters", "all").get("trained"))),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def _metric_charts(runs: Sequence[ComparedRun], columns: Sequence[TaskFacts]) -> list[Chart]:
    """Each task's metric over the evaluations, a line per run that scores the task by it."""
    found = []
    for facts in columns:
        lines = [
            Line(run.rows[facts.name].series, run.color, run.name)
            for run in runs
            if facts.name in run.rows and run.rows[facts.name].facts.metric == facts.metric
        ]
        found.append(Chart(facts.title, lines, note=f"{facts.metric_title}, {facts.arrow} {facts.direction}"))
    return [chart for chart in found if chart]


def _loss_charts(runs: Sequence[ComparedRun]) -> list[Chart]:
    """The weighted sum and each task's loss as running means."""
    titles = {
        task: run.files.records.facts_of(task).title for run in runs for task in run.files.records.tasks_with_loss()
    }
    found = [_overlaid("Weighted sum of losses", runs, ("loss",), note="\u2193 lower is better", smooth=True)]
    found += [
        _overlaid(title, runs, ("losses", task), note="\u2193 lower is better", smooth=True)
        for task, title in titles.items()
    ]
    return [chart for chart in found if chart]


def _course_charts(runs: Sequence[ComparedRun]) -> list[Chart]:
    found = [
        _overlaid("Learning rate", runs, ("lr",), zero=True),
        _overlaid("Speed", runs, ("images_per_second",), note="images/s", zero=True),
        _overlaid("Memory", runs, ("memory_bytes",), note="GB, peak of a rank", zero=True, factor=1e-9),
        _overlaid("Router's auxiliary loss", runs, ("aux_loss",), note="weighted, a part of the sum"),
    ]
    return [chart for chart in found if chart]


def _overlaid(
    title: str,
    runs: Sequence[ComparedRun],
    keys: tuple[str, ...],
    *,
    note: str = "",
    zero: bool = False,
    smooth: bool = False,
    factor: float = 1.0,
) -> Chart:
    lines = []
    for run in runs:
        series: Series = run.files.records.series("train", *keys).scaled(factor)
        lines.append(Line(series.smoothed() if smooth else series, run.color, run.name))
    return Chart(title, lines, note=note, zero=zero)
