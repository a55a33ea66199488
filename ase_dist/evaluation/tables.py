"""An evaluation as Markdown, as LaTeX (booktabs) and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ase_dist.evaluation.comparison import Comparison
from ase_dist.evaluation.scores import CLASS_PREFIX, Results, Score, headline, score_of, written
from ase_dist.tasks import Task

FORMAT, VERSION = "ase_dist evaluation", 1
SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
UP, DOWN = " (up)", " (down)"
MATHEMATICS = {"Delta_m": r"$\Delta_m$", UP: r" $\uparrow$", DOWN: r" $\downarrow$"}
HEAD, SCORES_HEAD = ("task", "score", "better"), ("task", "score", "value")
Row = Sequence[str]


@dataclass(frozen=True)
class Report:
    """What an evaluation found. ``facts`` say of what, on what and how, in the order in which they are shown."""

    title: str
    facts: Mapping[str, str | int | float | bool | None]
    tasks: tuple[Task, ...]
    results: Results
    comparison: Comparison | None = None


def to_json(report: Report) -> str:
    """Everything, at full precision; what is not a number is null."""
    tree: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "title": report.title,
        **report.facts,
        "results": {
            task: {key: _plain(value) for key, value in values.items()} for task, values in report.results.items()
        },
        "comparison": _comparison(report.comparison),
    }
    return json.dumps(tree, indent=2, allow_nan=False) + "\n"


def to_markdown(report: Report) -> str:
    """The facts, a table of the tasks, one of all scores, and one of the IoU of each class."""
    facts = {name.replace("_", " "): value for name, value in report.facts.items() if value is not None}
    listed = "\n".join(f"- {name}: {_words(value)}" for name, value in facts.items())
    parts = [f"# {report.title}", listed, markdown_table(_main_head(report), _main_rows(report))]
    if report.comparison is not None:
        parts.append(_verdict(report.comparison))
    parts += ["## All scores", markdown_table(SCORES_HEAD, _score_rows(report))]
    for task in _with_classes(report):
        parts += [f"## IoU of each class: {task.title}", markdown_table(("class", "IoU, %"), _class_rows(report, task))]
    return "\n\n".join(parts) + "\n"


def to_latex(report: Report) -> str:
    """The same tables, each a ``table`` that needs the package booktabs; the first has a row per method."""
    caption = f"{report.title}. {_verdict(report.comparison)}" if report.comparison is not None else report.title
    parts = ["% needs \\usepackage{booktabs}", latex_table(_methods_head(report), _methods(report), caption=caption)]
    parts.append(latex_table([SCORES_HEAD], _score_rows(report), caption=f"{report.title}: all scores"))
    for task in _with_classes(report):
        caption = f"{report.title}: IoU of each class, {task.title}"
        parts.append(latex_table([("class", "IoU, %")], _class_rows(report, task), caption=caption))
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# What the tables hold


def _main_head(report: Report) -> Row:
    return (*HEAD, "value") if report.comparison is None else (*HEAD, "value", "reference", "gain, %")


def _main_rows(report: Report) -> list[Row]:
    """A row per task with the score that stands for it, and what it is compared with."""
    if report.comparison is None:
        return [
            (*_label(task, key), _written(task, key, report.results[task.name][key])) for task, key in _compared(report)
        ]
    return [
        (
            *_label(gain.task, gain.key),
            _written(gain.task, gain.key, gain.value),
            _written(gain.task, gain.key, gain.reference),
            f"{gain.percent:+.2f}",
        )
        for gain in report.comparison.gains
    ]


def _methods_head(report: Report) -> list[Row]:
    """Tasks, and below them the score that is compared, with an arrow that says which way is better."""
    keys = _compared(report)
    titles, scores = ["", *(task.title for task, _ in keys)], ["method"]
    for task, key in keys:
        score = score_of(task, key)
        scores.append(score.heading + (UP if score.higher_is_better else DOWN))
    return [titles, scores] if report.comparison is None else [[*titles, ""], [*scores, "Delta_m, %"]]


def _methods(report: Report) -> list[Row]:
    """The reference, where there is one, and the model."""
    found = [_written(task, key, report.results[task.name][key]) for task, key in _compared(report)]
    if report.comparison is None:
        return [[report.title, *found]]
    base = [_written(gain.task, gain.key, gain.reference) for gain in report.comparison.gains]
    delta = f"{report.comparison.delta_m:+.2f}"
    return [[report.comparison.reference.name, *base, "0.00"], [report.title, *found, delta]]


def _compared(report: Report) -> list[tuple[Task, str]]:
    """The score that stands for each task."""
    if report.comparison is not None:
        return [(gain.task, gain.key) for gain in report.comparison.gains]
    return [(task, headline(task, report.results[task.name])) for task in report.tasks]


def _score_rows(report: Report) -> list[Row]:
    return [
        (task.title, score_of(task, key).heading, _written(task, key, value))
        for task in report.tasks
        for key, value in report.results[task.name].items()
        if not key.startswith(CLASS_PREFIX)
    ]


def _class_rows(report: Report, task: Task) -> list[Row]:
    values = report.results[task.name]
    return [
        (key.removeprefix(CLASS_PREFIX), _written(task, key, value))
        for key, value in values.items()
        if key.startswith(CLASS_PREFIX)
    ]


def _with_classes(report: Report) -> Iterator[Task]:
    return (task for task in report.tasks if _class_rows(report, task))


def _label(task: Task, key: str) -> Row:
    score = score_of(task, key)
    return task.title, score.heading, _better(score)


def _better(score: Score) -> str:
    return {True: "higher", False: "lower", None: ""}[score.higher_is_better]


def _written(task: Task, key: str, value: float) -> str:
    return written(value, score_of(task, key).unit)


def _verdict(comparison: Comparison) -> str:
    """Delta_m in a sentence, with what a reader must know to judge it."""
    reference, count = comparison.reference, len(comparison.gains)
    where = f", measured on {reference.data}" if reference.data else ""
    tasks = "1 task" if count == 1 else f"{count} tasks"
    rest = f"; the reference has {', '.join(comparison.left_out)} too" if comparison.left_out else ""
    return f"Delta_m over {tasks}: {comparison.delta_m:+.2f} % relative to {reference.name}{where}{rest}."


def _comparison(comparison: Comparison | None) -> dict[str, Any] | None:
    if comparison is None:
        return None
    gains = {
        gain.task.name: {
            "score": gain.key,
            "value": gain.value,
            "reference": gain.reference,
            "gain_percent": gain.percent,
        }
        for gain in comparison.gains
    }
    return {
        "reference": comparison.reference.name,
        "reference_data": comparison.reference.data,
        "delta_m_percent": comparison.delta_m,
        "tasks": gains,
        "left_out": list(comparison.left_out),
    }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _words(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# How tables are written


def markdown_table(head: Row, rows: Sequence[Row]) -> str:
    """A table with numbers to the right; a bar in a cell is escaped."""
    align = ["---:" if right else "---" for right in _right(head, rows)]
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], align, *lines[1:]))


def latex_table(heads: Sequence[Row], rows: Sequence[Row], *, caption: str) -> str:
    """A ``table`` with the rules of booktabs; whatever TeX would read as its own is escaped."""
    align = "".join("r" if right else "l" for right in _right(heads[0], rows))
    lines = ["    " + " & ".join(latex_text(cell) for cell in row) + r" \\" for row in (*heads, *rows)]
    body = [r"    \toprule", *lines[: len(heads)], r"    \midrule", *lines[len(heads) :], r"    \bottomrule"]
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            f"  \\caption{{{latex_text(caption)}}}",
            f"  \\begin{{tabular}}{{{align}}}",
            *body,
            r"  \end{tabular}",
            r"\end{table}",
        ]
    )


def latex_text(text: str) -> str:
    """``text`` with TeX's special characters escaped; Delta_m and arrows as mathematics."""
    text = "".join(SPECIAL.get(c, c) for c in text)
    for plain, mathematics in MATHEMATICS.items():
        text = text.replace("".join(SPECIAL.get(c, c) for c in plain), mathematics)
    return text


def _right(head: Row, rows: Sequence[Row]) -> list[bool]:
    """Which columns hold numbers only."""
    return [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(head))]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell == "-"
    return True
