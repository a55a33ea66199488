"""The report of an evaluation as Markdown, LaTeX and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ase_dist.evaluation.comparison import Comparison
from ase_dist.evaluation.scores import CLASS_PREFIX, Results, format_score, headline, score_of, tolerances
from ase_dist.files import json_safe
from ase_dist.printable import printable
from ase_dist.tables import Column, Table
from ase_dist.tasks import Task

FORMAT, VERSION = "ase_dist evaluation", 1


@dataclass(frozen=True)
class Report:
    """What an evaluation found. ``facts`` (model, data, settings) are shown in their order."""

    title: str
    facts: Mapping[str, str | int | float | bool | None]
    tasks: tuple[Task, ...]
    results: Results
    comparison: Comparison | None = None


def to_json(report: Report, *, files: Mapping[str, str] | None = None) -> str:
    """Everything, at full precision; what is not a number is null. ``files``: SHA-256 of the report's other files."""
    tree: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "title": report.title,
        **report.facts,
        "results": {task: dict(values) for task, values in report.results.items()},
        "tolerances": tolerances(report.tasks),
        "comparison": None,
    }
    if report.comparison is not None:
        tree["comparison"] = {
            "reference": report.comparison.reference.name,
            "reference_data": report.comparison.reference.data,
            f"{report.comparison.delta}_percent": report.comparison.value,
            "tasks": {},
            "left_out": list(report.comparison.left_out),
        }
        for gain in report.comparison.gains:  # with Delta_p a task has several, of which the first stands for it
            values = {"value": gain.value, "reference": gain.reference, "gain_percent": gain.percent}
            of_task = tree["comparison"]["tasks"].setdefault(gain.task.name, {"score": gain.key, **values})
            if report.comparison.delta == "delta_p":
                of_task.setdefault("scores", {})[gain.key] = values
    tree |= {} if files is None else {"files": dict(files)}
    return json.dumps(json_safe(tree), indent=2, allow_nan=False) + "\n"


def to_markdown(report: Report) -> str:
    """The facts, a table of the tasks, one of all scores, and one of the IoU of each class.

    In the first table each task has the score that stands for it and, with a reference, its value there and the gain.
    """
    shown = {True: "yes", False: "no"}
    facts = "\n".join(
        f"- {name.replace('_', ' ')}: {shown[value] if isinstance(value, bool) else printable(str(value))}"
        for name, value in report.facts.items()
        if value is not None
    )
    header: tuple[str, ...] = ("task", "score", "better", "value")
    rows = []
    for task, key in _headline_scores(report):
        score = score_of(task, key)
        better = {True: "higher", False: "lower", None: ""}[score.higher_is_better]
        rows.append([task.title, score.heading, better, format_score(report.results[task.name][key], score.unit)])
    if report.comparison is not None:
        header += ("reference", "gain, %")
        for row, gain in zip(rows, report.comparison.gains, strict=True):
            row += [format_score(gain.reference, score_of(gain.task, gain.key).unit), f"{gain.percent:+.2f}"]
    parts = [f"# {printable(report.title)}", facts, Table(header, rows).to_markdown()]
    if report.comparison is not None:
        parts.append(_delta_sentence(report.comparison))
    parts += ["## All scores", _scores_table(report).to_markdown()]
    for task, table in _class_tables(report):
        parts += [f"## IoU of each class: {task.title}", table.to_markdown()]
    return "\n\n".join(parts) + "\n"


def to_latex(report: Report) -> str:
    """The same tables, each a ``table`` that needs the package booktabs.

    The first has a column per task, headed by its score, and a row for the reference, if any, and for the model.
    """
    columns, values, title = [Column("method")], [report.title], report.title
    for task, key in _headline_scores(report):
        score = score_of(task, key)
        columns.append(Column(score.title, score.unit, score.higher_is_better, group=task.title))
        values.append(format_score(report.results[task.name][key], score.unit))
    rows = [values]
    if (comparison := report.comparison) is not None:
        base = [format_score(gain.reference, score_of(gain.task, gain.key).unit) for gain in comparison.gains]
        columns.append(Column(comparison.delta.capitalize(), "%"))
        rows = [[comparison.reference.name, *base, "0.00"], [*values, f"{comparison.value:+.2f}"]]
        title = f"{report.title}. {_delta_sentence(comparison)}"
    methods = Table(columns, rows, title=title)
    tables = [methods, _scores_table(report), *(table for _, table in _class_tables(report))]
    return "\n\n".join(["% needs \\usepackage{booktabs}", *(table.to_latex() for table in tables)]) + "\n"


def _scores_table(report: Report) -> Table:
    """Every score but those of classes."""
    rows = [
        (task.title, score_of(task, key).heading, format_score(value, score_of(task, key).unit))
        for task in report.tasks
        for key, value in report.results[task.name].items()
        if not key.startswith(CLASS_PREFIX)
    ]
    return Table(("task", "score", "value"), rows, title=f"{report.title}: all scores")


def _class_tables(report: Report) -> list[tuple[Task, Table]]:
    """The IoU of each class, for the tasks that have classes."""
    tables = []
    for task in report.tasks:
        rows = [
            (key.removeprefix(CLASS_PREFIX), format_score(value, score_of(task, key).unit))
            for key, value in report.results[task.name].items()
            if key.startswith(CLASS_PREFIX)
        ]
        if rows:
            title = f"{report.title}: IoU of each class, {task.title}"
            tables.append((task, Table(("class", "IoU, %"), rows, title=title)))
    return tables


def _headline_scores(report: Report) -> list[tuple[Task, str]]:
    """The score that stands for each task: the one that was compared, where there is a reference."""
    if report.comparison is not None:
        return [(gain.task, gain.key) for gain in report.comparison.gains]
    return [(task, headline(task, report.results[task.name])) for task in report.tasks]


def _delta_sentence(comparison: Comparison) -> str:
    """Delta_m or Delta_p with its reference, its tasks and those left out."""
    reference, count = comparison.reference, len({gain.task.name for gain in comparison.gains})
    name = comparison.delta.capitalize()
    where = f", measured on {reference.data}" if reference.data else ""
    tasks = "1 task" if count == 1 else f"{count} tasks"
    rest = f"; the reference has {', '.join(comparison.left_out)} too" if comparison.left_out else ""
    how = " (LibMTL's: over the scores of a task, then over tasks)" if comparison.delta == "delta_p" else ""
    return f"{name} over {tasks}: {comparison.value:+.2f} % relative to {reference.name}{where}{how}{rest}."
