"""The tables of a study, in Markdown and CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ase_dist.evaluation.scores import BOUNDARY_PREFIXES
from ase_dist.evaluation.seeds import CONFIDENCE, Difference, mean_and_spread
from ase_dist.study.collect import task_of
from ase_dist.tables import MISSING, Column, Measured, Table
from ase_dist.tasks import Task


def markdown(title: str, data_title: str, results: Mapping[str, Any]) -> str:
    """The tables: mean +- sample standard deviation over seeds, each column's best mean in bold, and differences."""
    tasks = [task_of(results, name) for name in results["tasks"]]
    variants, delta = results["variants"], str(results.get("delta", "delta_m")).capitalize()
    columns: list[Column | str] = [
        "variant",
        *(
            Column(f"{task.title}, {task.metric_title}", higher_is_better=task.higher_is_better, mark_best=True)
            for task in tasks
        ),
        Column(delta, "%", higher_is_better=True, mark_best=True),
        "trained, M",
        "all, M",
        "GFLOP an image",
        "images/s",
        "memory, GB",
        "seeds",
    ]
    table = Table(columns, [_row(variant, tasks) for variant in variants])
    labels = {variant["name"]: variant["label"] for variant in variants}
    references = " and ".join(dict.fromkeys(labels[variant["reference"]] for variant in variants))
    preamble = (
        f"Measured on {data_title}. {delta} is relative to {references} (mean over seeds); separate models count "
        "together in sizes and speed; FLOPs are of the forward pass."
    )
    left_out = results.get("left_out", {})  # results of earlier versions have none
    for task in (task for task in tasks if task.name in left_out):
        preamble += (
            f" mIoU of {task.title} is over the classes that all runs have an IoU of; left out: "
            f"{', '.join(left_out[task.name])}, which some runs predict somewhere and no label shows."
        )
    lines = [f"# {title}", "", preamble, "", table.to_markdown(), ""]
    lines += _differences(results, tasks, delta)
    missing = [name for variant in variants for name in variant["missing"]]
    if missing:
        lines += [f"Not done: {', '.join(missing)}.", ""]
    lines += [line for each in results.get("made_by", []) for line in (_made_by(each), "")]
    return "\n".join(lines)


def _differences(results: Mapping[str, Any], tasks: Sequence[Task], delta: str) -> list[str]:
    """The lines of the second table, differences between variants; empty where no two seeds are paired."""
    by_name = {variant["name"]: variant for variant in results["variants"]}
    columns: list[Column | str] = [
        "difference",
        *(Column(f"{task.title}, {task.metric_title}", higher_is_better=task.higher_is_better) for task in tasks),
        Column(delta, "%", higher_is_better=True),
        "pairs",
    ]
    rows = []
    for found in results["differences"]:
        one, other = by_name[found["variant"]], by_name[found["minus"]]
        pairs = max(each["pairs"] for each in (*found["tasks"].values(), found["delta_m"]))
        if pairs > 1:
            cells = [
                _difference(
                    found["tasks"].get(task.name), _form(other["metrics"].get(task.name, {}).get(task.metric, []))
                )
                for task in tasks
            ]
            label = f"{one['label']} minus {other['label']}"
            rows.append([label, *cells, _difference(found["delta_m"], ".2f"), str(pairs)])
    if not rows:
        return []
    explained = (
        f"Differences are paired by seed: mean and {CONFIDENCE:.0%} interval (Student's t). Where the interval holds 0 "
        "no difference was found, and the cell says none."
    )
    return [explained, "", Table(columns, rows).to_markdown(), ""]


def _made_by(found: Mapping[str, Any]) -> str:
    """``Runs: 30 of commit 1f12471, cpu, threads 1, torch 2.14.1, ...``"""
    facts = [f"of commit {found['git_commit'][:7]}"] if found["git_commit"] else []
    facts += [str(found["device"]), f"threads {found['torch_threads']}"] if found["device"] else []
    facts += [f"{name} {version}" for name, version in found["packages"].items() if version]
    return f"Runs: {found['runs']} {', '.join(facts) or 'of unknown versions'}."


def _difference(found: Mapping[str, Any] | None, form: str) -> str:
    """``+1.20 [+0.40, +2.00]``, after "none:" where that interval holds 0."""
    if found is None or found["pairs"] < 2:
        return MISSING
    difference = Difference(**found)
    mean, low, high = (f"{value:+{form}}" for value in (difference.mean, difference.low, difference.high))
    return f"{'none: ' if difference.is_none else ''}{mean} [{low}, {high}]"


def _form(values: Sequence[float | None]) -> str:
    """How a score is written: losses are small numbers."""
    return ".4f" if mean_and_spread(values)[0] < 1 else ".2f"


def as_csv(results: Mapping[str, Any]) -> str:
    """One line per variant, task, metric and seed, and per variant and seed its Delta_m.

    Boundary scores have the tolerance that they were counted with, other lines none.
    """
    rows: list[tuple[Any, ...]] = []
    within = {name: task_of(results, name).tolerance for name in results["tasks"]}
    for variant in results["variants"]:
        for i, seed in enumerate(variant["seeds"]):
            head = variant["name"], variant["label"], seed
            for task, metrics in variant["metrics"].items():
                rows += [
                    (*head, task, metric, values[i], within.get(task) if metric.startswith(BOUNDARY_PREFIXES) else None)
                    for metric, values in metrics.items()
                ]
            if variant["delta_m"] is not None:
                rows.append((*head, "", results.get("delta", "delta_m"), variant["delta_m"][i], None))
    return Table(("variant", "label", "seed", "task", "metric", "value", "tolerance"), rows).to_csv()


def _row(variant: Mapping[str, Any], tasks: Sequence[Task]) -> list[str | Measured]:
    scores = []
    for task in tasks:
        values = variant["metrics"].get(task.name, {}).get(task.metric, [])
        scores.append(_mean_and_spread(values, _form(values)))
    sizes = variant["parameters"] or {}
    speed, memory = (mean_and_spread(variant[key])[0] for key in ("images_per_second", "memory_bytes"))
    millions = [sizes.get(key, math.nan) / 1e6 for key in ("trained", "total")]
    numbers = (*millions, variant["flops"]["forward"] / 1e9, speed, memory / 1e9)
    return [
        variant["label"],
        *scores,
        _mean_and_spread(variant["delta_m"] or [], "+.2f"),
        *(f"{number:.2f}" if math.isfinite(number) else MISSING for number in numbers),
        str(len(variant["seeds"])),
    ]


def _mean_and_spread(values: Sequence[float | None], form: str) -> Measured:
    """``mean +- deviation`` over seeds, compared by the mean; the mean alone of one seed."""
    mean, spread = mean_and_spread(values)
    if not math.isfinite(mean):
        return Measured(MISSING, math.nan)
    return Measured(f"{mean:{form}}" + (f" +- {spread:{form.lstrip('+')}}" if math.isfinite(spread) else ""), mean)
