"""Several runs side by side: who they are, what differs, and each task's metric with its gain over a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ase_dist.config import flat
from ase_dist.evaluation.delta_m import delta_m
from ase_dist.report.results import ResultRow, result_rows
from ase_dist.report.run_files import RunFiles
from ase_dist.report.settings import as_text
from ase_dist.report.text import DASH, signed, significant
from ase_dist.training.record.plots import COLORS
from ase_dist.training.record.records import TaskFacts, branch

MORE_COLORS = ("#8c564b", "#7f7f7f", "#9467bd", "#17a2b8", "#8a9a00", "#e0508c")  # after those of the plots
SAME_FOR_ALL = ("output", "resume", "data.description.name")  # names and places, no settings of the training
IMAGES = ("data.name", "data.limit_val", "data.scenes.seed", "data.scenes.size", "data.scenes.val_images")
BOUNDARY_SCORE = "ods_f"  # of edges, where both sides have it


@dataclass(frozen=True)
class ComparedRun:
    """One run of the page; ``name`` tells it from the others."""

    name: str
    color: str
    files: RunFiles

    @cached_property
    def rows(self) -> dict[str, ResultRow]:
        """Its tasks by name."""
        return {row.facts.name: row for row in result_rows(self.files.records)}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """By dotted key, without what names the run."""
        return {key: value for key, value in flat(self.files.settings).items() if key not in SAME_FOR_ALL}

    @property
    def data(self) -> str:
        """The name of its data set."""
        return str(self.files.records.data or branch(self.files.settings, "data").get("name", ""))

    def scores(self, task: str) -> dict[str, float]:
        """What its last evaluation in training measured of a task."""
        records = self.files.records
        names = records.metric_names(task)
        return {name: records.series("eval", "metrics", task, name).last for name in names}


@dataclass(frozen=True)
class Reference:
    """What gains are relative to: scores by task, of the data set ``data`` (empty: not known)."""

    name: str
    data: str
    scores: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class ScoreCell:
    """A value as text, its gain in percent, and whether it is the best of the column."""

    value: str = DASH
    gain: str = ""
    is_better: bool = False
    is_best: bool = False


@dataclass(frozen=True)
class ResultLine:
    """A run's row of the results; ``delta_m`` with the number of tasks that it is over."""

    run: ComparedRun
    cells: list[ScoreCell]
    delta_m: str
    over: str
    step: str


@dataclass
class Comparison:
    """The results of all runs; ``notes`` say what cannot be compared, and why."""

    columns: list[TaskFacts]
    lines: list[ResultLine]
    notes: list[str] = field(default_factory=list)


def name_runs(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    names = [path.name for path in paths]
    depth = 1
    while len(set(names)) < len(names) and depth < max(len(path.parts) for path in paths):
        depth += 1
        names = [
            "/".join(path.parts[-depth:]) if names.count(name) > 1 else name
            for name, path in zip(names, paths, strict=True)
        ]
    return names


def color_of_run(index: int) -> str:
    """A colour that is seen on light and dark pages."""
    colors = (*COLORS, *MORE_COLORS)
    return colors[index % len(colors)]


# ---------------------------------------------------------------------------------------------------------------------
# Results


def compare_runs(runs: Sequence[ComparedRun], reference: Reference) -> Comparison:
    """Each run's last metrics during training, and gains over ``reference``.

    A gain is there for a task that both have, scored by the same metric over the same classes of the same data set;
    Delta_m is the mean over these tasks.
    """
    names = list(dict.fromkeys(task for run in runs for task in run.rows))
    columns = [next(run.rows[task].facts for run in runs if task in run.rows) for task in names]
    gains = {run.name: _gains(run, columns, reference, runs) for run in runs}
    best = {facts.name: _best(facts, runs) for facts in columns}
    wanted = {task for task in reference.scores if any(task in run.rows for run in runs)}
    lines = []
    for run in runs:
        cells = []
        for facts in columns:
            value = run.rows[facts.name].latest if _has(run, facts) else math.nan
            gain = gains[run.name].get(facts.name)
            cells.append(
                ScoreCell(
                    significant(value),
                    "" if gain is None else f"{signed(f'{gain:+.2f}')} %",
                    is_better=gain is not None and gain > 0,
                    is_best=value == best[facts.name],
                )
            )
        of_tasks = gains[run.name]
        over = f"{len(of_tasks)} of {len(wanted)} tasks" if of_tasks and len(of_tasks) < len(wanted) else ""
        mean = signed(f"{sum(of_tasks.values()) / len(of_tasks):+.2f}") if of_tasks else DASH
        evaluated = run.files.records.of_kind("eval")
        lines.append(ResultLine(run, cells, mean, over, f"{int(evaluated[-1]['step']):,}" if evaluated else DASH))
    return Comparison(columns, lines, _notes(runs, columns, reference))


def _has(run: ComparedRun, facts: TaskFacts) -> bool:
    """Whether the run scores the task by the column's metric."""
    return facts.name in run.rows and run.rows[facts.name].facts.metric == facts.metric


def _best(facts: TaskFacts, runs: Sequence[ComparedRun]) -> float:
    """The best value of a column, NaN with fewer than two, or of data sets that differ."""
    values = [run.rows[facts.name].latest for run in runs if _has(run, facts)]
    known = [value for value in values if math.isfinite(value)]
    if facts.higher_is_better is None or len(set(known)) < 2 or len({run.data for run in runs}) > 1:
        return math.nan
    return max(known) if facts.higher_is_better else min(known)


def _gains(
    run: ComparedRun, columns: Sequence[TaskFacts], reference: Reference, runs: Sequence[ComparedRun]
) -> dict[str, float]:
    """In percent by task, higher is better; only of tasks that can be compared."""
    if not _same_data(run.data, reference.data):
        return {}
    found = {}
    for facts in columns:
        is_there = facts.name in run.rows and facts.name in reference.scores
        if not is_there or not _same_classes(run, facts.name, runs, reference):
            continue
        scores, base = run.scores(facts.name), reference.scores[facts.name]
        own = run.rows[facts.name].facts
        directions = {BOUNDARY_SCORE: True, own.metric: own.higher_is_better}
        for key, higher in directions.items():
            value, other = scores.get(key, math.nan), base.get(key, math.nan)
            if higher is not None and math.isfinite(value) and math.isfinite(other) and other != 0:
                found[facts.name] = delta_m({key: value}, {key: other}, higher_is_better={key: higher})
                break
    return found


def _same_classes(run: ComparedRun, task: str, runs: Sequence[ComparedRun], reference: Reference) -> bool:
    """Whether the run and the reference, where that is a run, score a task of both over the same classes."""
    theirs = next((other.rows for other in runs if other.name == reference.name), {})
    if task not in run.rows or task not in theirs:
        return True
    one, other = (rows[task].facts.classes for rows in (run.rows, theirs))
    return [name for name, _ in one] == [name for name, _ in other]


def _same_data(one: str, other: str) -> bool:
    """Whether two names of data sets are of the same; a name that is not known may be any."""
    plain = [name.lower().replace("-", "_") for name in (one, other)]
    return not all(plain) or plain[0] == plain[1]


def _notes(runs: Sequence[ComparedRun], columns: Sequence[TaskFacts], reference: Reference) -> list[str]:
    """Sentences on runs that are not, or not wholly, comparable."""
    notes = []
    for run in runs:
        if not _same_data(run.data, reference.data):
            notes.append(
                f"{run.name} is of the data set {run.data}, {reference.name} of {reference.data}: its metrics are of "
                "other images, so they have no gain."
            )
            continue
        odd = [facts.title for facts in columns if facts.name in run.rows and not _has(run, facts)]
        if odd:
            notes.append(f"{run.name} scores {', '.join(odd)} by another metric, which the table leaves out.")
        alone = [facts.title for facts in columns if facts.name in run.rows and facts.name not in reference.scores]
        lacks = [facts.title for facts in columns if facts.name in reference.scores and facts.name not in run.rows]
        whose = [
            f"{name} alone has {', '.join(titles)}"
            for name, titles in ((run.name, alone), (reference.name, lacks))
            if run.rows and titles
        ]
        if whose:
            notes.append(f"{' and '.join(whose)}: \u0394m is over the tasks of both.")
        differs = [facts.title for facts in columns if not _same_classes(run, facts.name, runs, reference)]
        if differs:
            notes.append(f"{run.name} has other classes than {reference.name}: no gain of {', '.join(differs)}.")
    keys = [key for key in IMAGES if len({as_text(run.settings.get(key)) for run in runs}) > 1]
    if keys and len({run.data for run in runs}) == 1:
        notes.append(f"The runs were not evaluated on the same images: {', '.join(keys)} differ.")
    if len({_images_per_step(run) for run in runs}) > 1:
        notes.append("A step is not the same number of images in all runs, see their batch sizes and ranks.")
    waiting = [run.name for run in runs if not run.rows]
    if waiting:
        notes.append(f"{', '.join(waiting)}: not evaluated yet.")
    return notes


def _images_per_step(run: ComparedRun) -> float:
    batch, accumulation = (run.settings.get(f"train.{key}") for key in ("batch_size", "gradient_accumulation_steps"))
    world = run.files.records.worlds[-1:] or [1]
    if not isinstance(batch, int) or not isinstance(accumulation, int):
        return math.nan
    return float(batch * accumulation * world[0])


# ---------------------------------------------------------------------------------------------------------------------
# What differs


@dataclass(frozen=True)
class Difference:
    """A row of the tables of what differs: a value per run, and whether it is another than the first run's."""

    key: str
    values: list[tuple[str, bool]]


def differences(values: Iterable[Mapping[str, Any]], order: Callable[[str], Any] = str) -> list[Difference]:
    """The keys that do not have the same value in all mappings; a dash where one lacks it. Sorted by ``order``."""
    trees = list(values)
    keys = sorted(dict.fromkeys(key for tree in trees for key in tree), key=order)
    found = []
    for key in keys:
        shown = [as_text(tree[key]) if key in tree else DASH for tree in trees]
        if len(set(shown)) > 1:
            found.append(Difference(key, [(text, text != shown[0]) for text in shown]))
    return found


def place_and_versions(run: ComparedRun) -> dict[str, Any]:
    """Where a run was computed, and by which versions: of its last start, else of its env.json."""
    environment, starts = run.files.environment, run.files.records.of_kind("run")
    start = starts[-1] if starts else {}
    versions = {**branch(environment, "packages"), **branch(start, "versions")}
    world = start.get("world") or environment.get("world_size")
    facts = {
        "ranks": world,
        "device": environment.get("device"),
        "host": environment.get("hostname"),
        "threads": environment.get("torch_threads"),
        "commit": start.get("commit") or environment.get("git_commit"),
        "Python": environment.get("python"),
        **{str(name): version for name, version in versions.items()},
    }
    return {key: value for key, value in facts.items() if value is not None}
