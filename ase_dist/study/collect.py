"""Results of finished runs, as results.json holds them: metrics, Delta_m, sizes and speed by variant and seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from ase_dist.evaluation.delta_m import delta_m, directions
from ase_dist.evaluation.seeds import mean_and_spread
from ase_dist.planning.flops import count_flops
from ase_dist.study.jobs import StudyJob
from ase_dist.study.variants import Variant
from ase_dist.tasks import Task, select_tasks
from ase_dist.training.record.metrics import read_metrics


def collect(variants: Sequence[Variant], jobs: Sequence[StudyJob], references: Mapping[str, str]) -> dict[str, Any]:
    """The tree of results.json; a variant without a complete seed is listed with empty values.

    Delta_m of a seed is relative to the reference variant's mean over its seeds, over the tasks that both have. Values
    by seed have the order of ``seeds``, the complete ones.
    """
    data = jobs[0].settings.data
    tasks = data.data_set.tasks
    found = [_collect_variant(variant, [job for job in jobs if job.variant == variant.name]) for variant in variants]
    by_name = {entry["name"]: entry for entry in found}
    for entry in found:
        reference = by_name[references[entry["name"]]]
        entry["reference"] = reference["name"]
        entry["delta_m"] = _delta_m_by_seed(entry, reference, tasks)
    names = list(dict.fromkeys(task for entry in found for task in entry["metrics"]))
    facts = {name: asdict(tasks[name]) for name in names}
    return {"data": data.name, "tasks": names, "task_facts": facts, "variants": found}


def task_of(results: Mapping[str, Any], name: str) -> Task:
    """The task of that name, as the results have it; those of earlier versions name the data set only."""
    if "task_facts" not in results:
        return select_tasks(str(results["data"]), (name,))[0]
    task: Task = TypeAdapter(Task).validate_python(results["task_facts"][name])
    return task


def _collect_variant(variant: Variant, jobs: Sequence[StudyJob]) -> dict[str, Any]:
    """The entry of a variant. Where its tasks train separately, metrics merge, and sizes, FLOPs and times add up."""
    seeds = sorted({job.seed for job in jobs})
    complete = [seed for seed in seeds if all(job.is_done() for job in jobs if job.seed == seed)]
    done = [job for job in jobs if job.seed in complete]
    summaries = [[job.run.read_summary() for job in done if job.seed == seed] for seed in complete]
    metrics = [{task: values for s in of_seed for task, values in s["metrics"].items()} for of_seed in summaries]
    parameters = None
    if summaries:
        counts = [summary["parameters"]["all"] for summary in summaries[0]]
        parameters = {kind: sum(count[kind] for count in counts) for kind in ("total", "trained")}
    flops = [count_flops(job.settings) for job in jobs if job.seed == seeds[0]]
    speeds = [[summary["images_per_second"] for summary in of_seed] for of_seed in summaries]
    return {
        "name": variant.name,
        "label": variant.label,
        "group": variant.group,
        "x": variant.x,
        "settings": {"row": variant.baseline, **variant.changes},
        "seeds": complete,
        "runs": [job.folder.relative_to(job.out).as_posix() for job in done],
        "missing": [job.name for job in jobs if not job.is_done()],
        "metrics": {
            task: {metric: [seed[task][metric] for seed in metrics] for metric in values}
            for task, values in (metrics[0] if metrics else {}).items()
        },
        "parameters": parameters,
        "flops": {"forward": sum(f.forward for f in flops), "backward": sum(f.backward for f in flops)},
        "images_per_second": [1 / sum(1 / speed for speed in each) if all(each) else None for each in speeds],
        "memory_bytes": [max(summary["peak_memory_bytes"] or 0 for summary in of_seed) for of_seed in summaries],
        **_over_training(done),
    }


def _delta_m_by_seed(
    entry: Mapping[str, Any], reference: Mapping[str, Any], table: Mapping[str, Task]
) -> list[float | None] | None:
    names = [task for task in entry["metrics"] if task in reference["metrics"]]
    if not names or not entry["seeds"]:
        return None
    tasks = [table[name] for name in names]
    base = {t.name: mean_and_spread(reference["metrics"][t.name][t.metric])[0] for t in tasks}
    found: list[float | None] = []
    for i in range(len(entry["seeds"])):
        scores = {t.name: entry["metrics"][t.name][t.metric][i] for t in tasks}
        scores = {name: math.nan if score is None else score for name, score in scores.items()}
        try:
            found.append(delta_m(scores, base, higher_is_better=directions(tasks)))
        except ValueError:  # undefined where a score is not finite or the reference is 0
            found.append(None)
    return found


def _over_training(jobs: Sequence[StudyJob]) -> dict[str, Any]:
    """Mean shared gate and gradient conflict by step, averaged over layers and tasks, where all runs recorded them."""
    records = [read_metrics(job.run.metrics) for job in jobs]
    found: dict[str, Any] = {}
    gates = [_curve(lines, "shared_gate") for lines in records]
    if gates and all(gates):
        found["shared_gate"] = _by_step(gates, "gate")
    shares, cosines = ([_curve(lines, key) for lines in records] for key in ("conflicting", "cosines_by_layer"))
    if shares and all(shares) and all(cosines):
        found["conflict"] = {**_by_step(shares, "conflicting"), "cosine": _by_step(cosines, "cosine")["cosine"]}
    return found


def _curve(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], float(np.nanmean(np.array(line[key], dtype=float)))) for line in lines if key in line]


def _by_step(curves: Sequence[Sequence[tuple[int, float]]], name: str) -> dict[str, Any]:
    """The steps that all curves have, and for each step one value per seed."""
    common = sorted(set.intersection(*({step for step, _ in curve} for curve in curves)))
    values = [dict(curve) for curve in curves]
    return {"steps": common, name: [[curve[step] for curve in values] for step in common]}
