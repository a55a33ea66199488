"""The content of a study's page: its table, its plots, and for every variant the curves and pictures of one run."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ase_dist.evaluation.scores import with_tolerance
from ase_dist.evaluation.seeds import mean_and_spread
from ase_dist.files import open_regular
from ase_dist.json_files import parse_json
from ase_dist.report import curves
from ase_dist.report.charts import Chart, Line
from ase_dist.report.images import BUDGET, Album, Candidate, make_album
from ase_dist.report.listing import list_files
from ase_dist.report.reading import Reader
from ase_dist.report.results import result_rows
from ase_dist.report.run_page import prediction_candidates
from ase_dist.report.settings import as_text
from ase_dist.report.study_files import Results, StudyFacts, Values, VariantResult, parse
from ase_dist.report.study_table import Row, spread_text, study_columns, study_rows, study_task
from ase_dist.training.record.records import Records, Series
from ase_dist.training.record.run_folder import RunFolder

MARKS = ("study.json", "results.json")
PLOTS_BUDGET = 2_000_000  # bytes of BUDGET for plots; the rest is for predictions
CURVES = {
    "conflicting": ("Pairs of tasks in conflict", "% of pairs, mean over seeds", 100.0),
    "cosine": ("Mean cosine between tasks' gradients", "on the shared experts, mean over seeds", 1.0),
    "gate": ("Mean gate of the shared experts", "mean over seeds, layers and tasks", 1.0),
}


def is_study(folder: Path) -> bool:
    """Whether ``folder`` looks like a study's."""
    return any((folder / name).is_file() for name in MARKS)


def study_content(folder: Path, *, out: Path) -> dict[str, Any]:
    """What the template ``study.html`` shows; links are relative to the page at ``out``."""
    reader = Reader()
    facts = reader.parsed(folder / "study.json", lambda text: parse(text, StudyFacts)) or StudyFacts()
    results = reader.parsed(folder / "results.json", lambda text: parse(text, Results)) or Results()
    columns = study_columns(results)
    rows = study_rows(facts, results, columns)
    paths = sorted(folder.glob("plots/*.png"))
    drawings = [Candidate(path, path.stem.replace("_", " "), is_drawing=True) for path in paths]
    plots = make_album(drawings, budget=PLOTS_BUDGET)
    grids = []  # the last picture of predictions of each shown run
    for variant in results.variants:
        for run in _shown_runs(folder, variant):
            label = f"{variant.title}, {run}: "
            grids += prediction_candidates(RunFolder(folder / run), label=label)[-1:]
    album = make_album(grids, budget=BUDGET - PLOTS_BUDGET, most=len(grids))
    return {
        "title": facts.title or folder.name,
        "facts": facts,
        "data": facts.data or results.data,
        "problems": reader.problems,
        "columns": columns,
        "rows": rows,
        "missing": [name for variant in results.variants for name in variant.missing],
        "state": _state(facts, results),
        "plots": plots,
        "charts": comparison_charts(results.variants),
        "variants": [_variant(folder, row, results, album, reader, out) for row in rows],
        "notes": album.notes,
        "files": list_files(folder),
        "folder": str(folder),
    }


def comparison_charts(variants: Sequence[VariantResult]) -> list[Chart]:
    """Gradient conflict and shared gates of all variants that recorded them, one colour each, the spread as a band."""
    found = []
    for key, (title, note, factor) in CURVES.items():
        lines: list[Line] = []
        for variant in variants:
            curve = variant.shared_gate if key == "gate" else variant.conflict
            by_step: list[Values] = [] if curve is None else getattr(curve, key)
            if curve is None or not curve.steps or len(by_step) != len(curve.steps):
                continue
            pairs = [mean_and_spread(values) for values in by_step]
            spread = [factor * half if math.isfinite(half) else 0.0 for _, half in pairs]
            series = Series([float(step) for step in curve.steps], [factor * mean for mean, _ in pairs])
            color = curves.color_of(len(lines))
            lines.append(Line(series, color, variant.title, spread=spread if any(spread) else ()))
        found.append(Chart(title, lines, note=note, zero=True, legend=True))
    return [chart for chart in found if chart]


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def _state(facts: StudyFacts, results: Results) -> tuple[str, str]:
    """The study's state in words and its tone, for the head of the page."""
    done, wanted = sum(variant.done for variant in results.variants), len(facts.seeds) * len(results.variants)
    if not results.variants:
        return "no results yet", "bad"
    if any(variant.missing for variant in results.variants) or done < wanted:
        return f"{done} of {max(wanted, done)} seeds done", "open"
    return "complete", "good"


def _shown_runs(folder: Path, variant: VariantResult) -> list[str]:
    """The first run, and where a variant's tasks train separately those that together have all of its tasks."""
    shown: list[str] = []
    covered: set[str] = set()
    for run in variant.runs:
        try:
            with open_regular(RunFolder(folder / run).metrics) as file:  # its first line names the tasks
                tasks = set(Records([parse_json(file.readline(1_000_000), allow_nan=True)]).tasks) or {run}
        except (OSError, ValueError, TypeError, KeyError):
            tasks = {run}
        if not tasks <= covered and (not shown or len(tasks) < len(variant.metrics)):
            shown.append(run)
            covered |= tasks
    return shown


def _variant(folder: Path, row: Row, results: Results, album: Album, reader: Reader, out: Path) -> dict[str, Any]:
    """The section of one variant: links to its runs' own pages, curves and last picture of the shown runs."""
    variant, runs, shown = row.variant, [], []
    for name in variant.runs:
        page = RunFolder(folder / name).report
        link = quote(os.path.relpath(page, out.parent)) if page.is_file() else ""
        runs.append((name, link, (folder / name).is_dir()))
    for name in _shown_runs(folder, variant):
        run = RunFolder(folder / name)
        records = Records(reader.metrics(run.metrics))
        rows = [row for row in result_rows(records) if len(row.series.steps) > 1]
        charts = [*curves.loss_charts(records), *curves.metric_charts(records, rows)]
        shot = next((shot for shot in album.shots if shot.path.parent == run.predictions), None)
        shown.append({"run": name, "charts": charts, "shot": shot})
    return {
        "row": row,
        "settings": [(key, as_text(value)) for key, value in variant.settings.items()],
        "runs": runs,
        "metrics": [
            (
                facts.title,
                [(with_tolerance(metric, facts.tolerance), spread_text(values)) for metric, values in found.items()],
            )
            for facts, found in ((study_task(results, task), found) for task, found in variant.metrics.items())
        ],
        "shown": shown,
    }
