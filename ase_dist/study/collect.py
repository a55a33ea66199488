"""From finished runs to results: metrics, Delta_m, sizes and speed by variant and seed, as results.json holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ase_dist.config import Settings
from ase_dist.evaluation.delta_m import delta_m, directions
from ase_dist.evaluation.seeds import mean_and_spread
from ase_dist.planning.flops import count_flops
from ase_dist.study.jobs import Job
from ase_dist.study.variants import Variant
from ase_dist.tasks import Task, select_tasks
from ase_dist.training.record.metrics import read_metrics

Metrics = dict[str, dict[str, float]]


def collect(variants: Sequence[Variant], jobs: Sequence[Job], references: Mapping[str, str]) -> dict[str, Any]:
    """The tree of results.json; a variant without a whole seed is listed with empty values.

    Delta_m of a seed is against the reference variant's mean over its seeds, over the tasks that both have. Values
    by seed stand in the order of ``seeds``, those that are done.
    """
    data = jobs[0].settings.data.name
    found = [_variant(variant, [job for job in jobs if job.variant == variant.name]) for variant in variants]
    by_name = {entry["name"]: entry for entry in found}
    for entry in found:
        reference = by_name[references[entry["name"]]]
        entry["reference"] = reference["name"]
        entry["delta_m"] = _gains(entry, reference, data)
    names = list(dict.fromkeys(task for entry in found for task in entry["metrics"]))
    return {"data": data, "tasks": names, "variants": found}


def task_of(results: Mapping[str, Any], name: str) -> Task:
    """The facts of a task in the results."""
    return select_tasks(str(results["data"]), (name,))[0]


# ---------------------------------------------------------------------------------------------------------------------
# One variant


def _variant(variant: Variant, jobs: Sequence[Job]) -> dict[str, Any]:
    seeds = sorted({job.seed for job in jobs})
    whole = [seed for seed in seeds if all(job.is_done() for job in jobs if job.seed == seed)]
    summaries = {seed: [_summary(job) for job in jobs if job.seed == seed] for seed in whole}
    return {
        "name": variant.name,
        "label": variant.label,
        "group": variant.group,
        "x": variant.x,
        "settings": {"row": variant.baseline, **variant.changes},
        "seeds": whole,
        "runs": [job.folder.relative_to(job.out).as_posix() for job in jobs if job.seed in whole],
        "missing": [job.name for job in jobs if not job.is_done()],
        "metrics": _by_task([_merged(summaries[seed]) for seed in whole]),
        "parameters": _parameters(summaries[whole[0]]) if whole else None,
        "flops": _flops([job.settings for job in jobs if job.seed == seeds[0]]),
        "images_per_second": [_speed(summaries[seed]) for seed in whole],
        "memory_bytes": [max(summary["peak_memory_bytes"] or 0 for summary in summaries[seed]) for seed in whole],
        **_over_training([job for job in jobs if job.seed in whole]),
    }


def _summary(job: Job) -> dict[str, Any]:
    return job.run.read_summary()


def _merged(summaries: Sequence[Mapping[str, Any]]) -> Metrics:
    """The metrics of a variant's runs of one seed: all tasks of one, or one task of each."""
    return {task: values for summary in summaries for task, values in summary["metrics"].items()}


def _by_task(seeds: Sequence[Metrics]) -> dict[str, dict[str, list[float | None]]]:
    """{task: {metric: a value a seed}}."""
    if not seeds:
        return {}
    return {
        task: {metric: [seed[task][metric] for seed in seeds] for metric in values} for task, values in seeds[0].items()
    }


def _parameters(summaries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """All that it takes to serve every task: separate models add up."""
    return {kind: sum(summary["parameters"]["all"][kind] for summary in summaries) for kind in ("total", "trained")}


def _flops(settings: Sequence[Settings]) -> dict[str, float]:
    counted = [count_flops(each) for each in settings]
    return {"forward": sum(c.forward for c in counted), "backward": sum(c.backward for c in counted)}


def _speed(summaries: Sequence[Mapping[str, Any]]) -> float | None:
    """Training images a second with all tasks: separate models take their times one after the other."""
    speeds = [summary["images_per_second"] for summary in summaries]
    return 1 / sum(1 / speed for speed in speeds) if all(speeds) else None


def _gains(entry: Mapping[str, Any], reference: Mapping[str, Any], data: str) -> list[float | None] | None:
    tasks = [task for task in entry["metrics"] if task in reference["metrics"]]
    if not tasks or not entry["seeds"]:
        return None
    chosen = select_tasks(data, tasks)
    base = {t.name: mean_and_spread(reference["metrics"][t.name][t.metric])[0] for t in chosen}
    return [
        _gain({t.name: entry["metrics"][t.name][t.metric][i] for t in chosen}, base, chosen)
        for i in range(len(entry["seeds"]))
    ]


def _gain(scores: Mapping[str, float | None], base: Mapping[str, float], tasks: Sequence[Task]) -> float | None:
    values = {name: math.nan if score is None else score for name, score in scores.items()}
    try:
        return delta_m(values, base, higher_is_better=directions(tasks))
    except ValueError:  # a score that is not finite, or a reference of 0: there is no such number
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Over training


def _over_training(jobs: Sequence[Job]) -> dict[str, Any]:
    """Mean shared gate and gradient conflict by step, where the runs recorded them; averaged over layers and tasks."""
    records = [read_metrics(job.run.metrics) for job in jobs]
    found: dict[str, Any] = {}
    gates = [_curve(lines, "shared_gate") for lines in records]
    if gates and all(gates):
        found["shared_gate"] = _stacked(gates, "gate")
    shares, cosines = ([_curve(lines, key) for lines in records] for key in ("conflicting", "cosines_by_layer"))
    if shares and all(shares) and all(cosines):
        found["conflict"] = {**_stacked(shares, "conflicting"), "cosine": _stacked(cosines, "cosine")["cosine"]}
    return found


def _curve(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], float(np.nanmean(np.array(line[key], dtype=float)))) for line in lines if key in line]


def _stacked(curves: Sequence[Sequence[tuple[int, float]]], name: str) -> dict[str, Any]:
    """Steps that all curves have, and at each of them a value a seed."""
    common = sorted(set.intersection(*({step for step, _ in curve} for curve in curves)))
    values = [dict(curve) for curve in curves]
    return {"steps": common, name: [[curve[step] for curve in values] for step in common]}
