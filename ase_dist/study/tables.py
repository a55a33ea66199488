"""The tables of a study: Markdown to read and CSV to go on with."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ase_dist.evaluation.seeds import mean_and_spread
from ase_dist.evaluation.tables import markdown_table
from ase_dist.study.collect import task_of
from ase_dist.tasks import Task

MISSING = "-"


def markdown(title: str, data_title: str, results: Mapping[str, Any]) -> str:
    """The table with mean +- sample standard deviation over seeds, the best mean of each column in bold."""
    tasks = [task_of(results, name) for name in results["tasks"]]
    variants = results["variants"]
    heads = [
        "variant",
        *(_head(task) for task in tasks),
        "Delta_m, % (up)",
        "trained, M",
        "all, M",
        "GFLOP an image",
        "images/s",
        "memory, GB",
        "seeds",
    ]
    best = _best(variants, tasks)
    rows = [_row(variant, tasks, best) for variant in variants]
    lines = [f"# {title}", "", _preamble(data_title, variants), "", markdown_table(heads, rows), ""]
    missing = [name for variant in variants for name in variant["missing"]]
    if missing:
        lines += [f"Not done: {', '.join(missing)}.", ""]
    return "\n".join(lines)


def as_csv(results: Mapping[str, Any]) -> str:
    """One line per variant, task, metric and seed, and per variant and seed its Delta_m."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["variant", "label", "seed", "task", "metric", "value"])
    for variant in results["variants"]:
        for i, seed in enumerate(variant["seeds"]):
            head = [variant["name"], variant["label"], seed]
            for task, metrics in variant["metrics"].items():
                for metric, values in metrics.items():
                    writer.writerow([*head, task, metric, values[i]])
            if variant["delta_m"] is not None:
                writer.writerow([*head, "", "delta_m", variant["delta_m"][i]])
    return buffer.getvalue()


def _preamble(data_title: str, variants: Sequence[Mapping[str, Any]]) -> str:
    labels = {variant["name"]: variant["label"] for variant in variants}
    references = dict.fromkeys(labels[variant["reference"]] for variant in variants)
    return (
        f"Measured on {data_title}. Delta_m is relative to {' and '.join(references)} (mean over seeds); separate "
        "models count together in sizes and speed; FLOPs are of the forward pass."
    )


def _head(task: Task) -> str:
    return f"{task.title}, {task.metric_title} ({'up' if task.higher_is_better else 'down'})"


def _row(variant: Mapping[str, Any], tasks: Sequence[Task], best: Mapping[str, float]) -> list[str]:
    scores = [_score(variant, task, best) for task in tasks]
    gain = mean_and_spread(variant["delta_m"] or [])
    sizes = variant["parameters"] or {}
    speed, memory = (mean_and_spread(variant[key])[0] for key in ("images_per_second", "memory_bytes"))
    return [
        variant["label"],
        *scores,
        _bold(_spread(gain, signed=True), is_best=gain[0] == best.get("delta_m")),
        _number(sizes.get("trained", math.nan) / 1e6, 2),
        _number(sizes.get("total", math.nan) / 1e6, 2),
        _number(variant["flops"]["forward"] / 1e9, 2),
        _number(speed, 2),
        _number(memory / 1e9, 2),
        str(len(variant["seeds"])),
    ]


def _score(variant: Mapping[str, Any], task: Task, best: Mapping[str, float]) -> str:
    values = variant["metrics"].get(task.name, {}).get(task.metric, [])
    pair = mean_and_spread(values)
    digits = 4 if pair[0] < 1 else 2  # losses are small numbers
    return _bold(_spread(pair, digits=digits), is_best=pair[0] == best.get(task.name))


def _best(variants: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> dict[str, float]:
    """The best mean of each column."""
    found = {}
    for task in tasks:
        means = [mean_and_spread(v["metrics"].get(task.name, {}).get(task.metric, []))[0] for v in variants]
        known = [mean for mean in means if math.isfinite(mean)]
        if known:
            found[task.name] = max(known) if task.higher_is_better else min(known)
    gains = [mean_and_spread(variant["delta_m"] or [])[0] for variant in variants]
    return {**found, "delta_m": max((gain for gain in gains if math.isfinite(gain)), default=math.nan)}


def _spread(pair: tuple[float, float], *, digits: int = 2, signed: bool = False) -> str:
    mean, spread = pair
    if not math.isfinite(mean):
        return MISSING
    text = f"{mean:+.{digits}f}" if signed else f"{mean:.{digits}f}"
    return text if not math.isfinite(spread) else f"{text} +- {spread:.{digits}f}"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else MISSING


def _bold(text: str, *, is_best: bool) -> str:
    return f"**{text}**" if is_best and text != MISSING else text
