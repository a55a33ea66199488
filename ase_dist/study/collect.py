"""Results of finished runs, as results.json holds them: metrics, Delta_m, sizes and speed by variant and seed."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter, ValidationError
from scipy.special import entr

from ase_dist.errors import UserError
from ase_dist.evaluation.delta_m import compared_scores, delta_p
from ase_dist.evaluation.scores import score_of
from ase_dist.evaluation.seeds import mean_and_spread, paired_difference
from ase_dist.json_files import read_object
from ase_dist.planning.flops import count_flops
from ase_dist.study.jobs import StudyJob
from ase_dist.study.variants import Variant
from ase_dist.tasks import Delta, Task, select_tasks
from ase_dist.training.record.metrics import read_metrics
from ase_dist.training.record.run_folder import RunFolder


def collect(
    variants: Sequence[Variant],
    jobs: Sequence[StudyJob],
    references: Mapping[str, str],
    contrasts: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """The tree of results.json; a variant without a complete seed is listed with empty values.

    Delta_m of a seed is relative to the reference variant's mean over its seeds, over the tasks that both have. Values
    by seed have the order of ``seeds``, the complete ones. ``differences`` are of each variant from its reference, and
    of the first of each of ``contrasts`` from the second, in the tasks' metrics and in Delta_m, paired by seed.
    ``delta`` is ``eval.delta``: with delta_p all that is called ``delta_m`` is LibMTL's Delta_p. ``made_by`` says with
    which versions and on what the runs were made. Every mIoU is over the classes that all runs have an IoU of;
    ``left_out`` are the others by task. A class that no label shows has one, of 0, in the runs alone that predict it
    somewhere, and would move their mean by more than what is to be compared.
    """
    data, delta = jobs[0].settings.data, jobs[0].settings.eval.delta
    tasks = data.data_set.table
    done = [job for job in jobs if job.is_done()]
    recorded = {job.name: _evaluations(job.run) for job in done}
    left_out = _left_out([results for of_run in recorded.values() for results in of_run.values()])
    evaluations = {
        name: {step: _without(results, left_out) for step, results in of_run.items()}
        for name, of_run in recorded.items()
    }
    found = [
        _collect_variant(variant, [job for job in jobs if job.variant == variant.name], evaluations, tasks)
        for variant in variants
    ]
    by_name = {entry["name"]: entry for entry in found}
    for entry in found:
        reference = by_name[references[entry["name"]]]
        entry["reference"] = reference["name"]
        entry["delta_m"] = _delta_by_seed(entry, reference, tasks, delta)
    pairs = [(entry["name"], entry["reference"]) for entry in found if entry["name"] != entry["reference"]]
    pairs += [pair for pair in contrasts if set(pair) <= set(by_name)]
    names = list(dict.fromkeys(task for entry in found for task in entry["metrics"]))
    facts = {name: asdict(tasks[name]) for name in names}
    return {
        "data": data.name,
        "tasks": names,
        "task_facts": facts,
        "delta": delta,
        "left_out": left_out,
        "variants": found,
        "differences": [
            {"variant": one, "minus": other, **_differences(by_name[one], by_name[other], tasks)}
            for one, other in pairs
        ],
        "made_by": _made_by(done),
    }


def _made_by(jobs: Sequence[StudyJob]) -> list[dict[str, Any]]:
    """What the finished runs were made by, each combination once, the most frequent first, with its number of runs."""
    origins = [_origin(job.run) for job in jobs]
    distinct = [each for i, each in enumerate(origins) if each not in origins[:i]]
    counted = [{**each.model_dump(), "runs": origins.count(each)} for each in distinct]
    return sorted(counted, key=lambda each: -each["runs"])


class _Origin(BaseModel):
    """What env.json says of where a run's numbers are from."""

    git_commit: str | None = None
    packages: dict[str, str | None] = {}
    device: str | None = None
    torch_threads: int | None = None


def _origin(run: RunFolder) -> _Origin:
    try:
        return _Origin.model_validate(read_object(run.environment))
    except (OSError, UserError, ValidationError):  # of another version, or damaged: the run's numbers are not
        return _Origin()


def task_of(results: Mapping[str, Any], name: str) -> Task:
    """The task of that name, as the results have it; those of earlier versions name the data set only."""
    if "task_facts" not in results:
        return select_tasks(str(results["data"]), (name,))[0]
    task: Task = TypeAdapter(Task).validate_python(results["task_facts"][name])
    return task


# ---------------------------------------------------------------------------------------------------------------------
# Evaluations, and the same classes in all of them

CLASS = "iou/"  # before a class in the metrics of a run
Results = Mapping[str, Mapping[str, float | None]]  # of an evaluation: by task and metric


def _evaluations(run: RunFolder) -> dict[int, Results]:
    """By step; the last is that of the run's summary."""
    lines = read_metrics(run.metrics)
    found = {line["step"]: line["metrics"] for line in lines if line["kind"] == "eval"}
    summary = run.read_summary()
    return {**found, summary["step"]: summary["metrics"]}


def _left_out(evaluations: Sequence[Results]) -> dict[str, list[str]]:
    """By task the classes that some of ``evaluations`` have an IoU of and others have none of."""
    found = {}
    for task in dict.fromkeys(task for results in evaluations for task in results):
        classes = [
            {name.removeprefix(CLASS) for name in results[task] if name.startswith(CLASS)}
            for results in evaluations
            if task in results
        ]
        if some := sorted(set().union(*classes) - classes[0].intersection(*classes)):
            found[task] = some
    return found


def _without(results: Results, left_out: Mapping[str, Sequence[str]]) -> Results:
    """``results`` with every mIoU over the other classes alone."""
    found = dict(results)
    for task, classes in left_out.items():
        if task in results:
            dropped = {CLASS + name for name in classes}
            kept = {name: value for name, value in results[task].items() if name not in dropped}
            values = [value for name, value in kept.items() if name.startswith(CLASS) and value is not None]
            found[task] = {**kept, "miou": statistics.mean(values) if values else None}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# A variant


def _collect_variant(
    variant: Variant,
    jobs: Sequence[StudyJob],
    evaluations: Mapping[str, Mapping[int, Results]],
    tasks: Mapping[str, Task],
) -> dict[str, Any]:
    """The entry of a variant; ``evaluations`` are those of the finished runs, by name and step.

    Where its tasks train separately, metrics merge, and sizes, FLOPs and times add up.
    """
    seeds = sorted({job.seed for job in jobs})
    complete = [seed for seed in seeds if all(job.name in evaluations for job in jobs if job.seed == seed)]
    done = [job for job in jobs if job.seed in complete]
    summaries = [[job.run.read_summary() for job in done if job.seed == seed] for seed in complete]
    last = {job.name: evaluations[job.name][max(evaluations[job.name])] for job in done}
    metrics = [
        {task: values for job in done if job.seed == seed for task, values in last[job.name].items()}
        for seed in complete
    ]
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
        "missing": [job.name for job in jobs if job.name not in evaluations],
        "metrics": {
            task: {metric: [seed[task][metric] for seed in metrics] for metric in values}
            for task, values in (metrics[0] if metrics else {}).items()
        },
        "parameters": parameters,
        "flops": {"forward": sum(f.forward for f in flops), "backward": sum(f.backward for f in flops)},
        "images_per_second": [1 / sum(1 / speed for speed in each) if all(each) else None for each in speeds],
        "memory_bytes": [max(summary["peak_memory_bytes"] or 0 for summary in of_seed) for of_seed in summaries],
        **_over_training(done, [evaluations[job.name] for job in done], tasks),
    }


def _delta_by_seed(
    entry: Mapping[str, Any], reference: Mapping[str, Any], table: Mapping[str, Task], delta: Delta
) -> list[float | None] | None:
    names = [task for task in entry["metrics"] if task in reference["metrics"]]
    if not names or not entry["seeds"]:
        return None
    keys = {name: compared_scores(table[name], delta) for name in names}
    better = {
        name: {key: bool(score_of(table[name], key).higher_is_better) for key in of_task}
        for name, of_task in keys.items()
    }
    base = {
        name: {key: mean_and_spread(reference["metrics"][name].get(key, [None]))[0] for key in of_task}
        for name, of_task in keys.items()
    }
    found: list[float | None] = []
    for i in range(len(entry["seeds"])):
        stored = {
            name: {key: entry["metrics"][name].get(key, [None] * (i + 1))[i] for key in of_task}
            for name, of_task in keys.items()
        }
        scores = {
            name: {key: math.nan if value is None else value for key, value in of_task.items()}
            for name, of_task in stored.items()
        }
        try:
            found.append(delta_p(scores, base, higher_is_better=better))  # with one score a task it is Delta_m
        except ValueError:  # undefined where a score is not finite or the reference is 0
            found.append(None)
    return found


def _differences(entry: Mapping[str, Any], other: Mapping[str, Any], table: Mapping[str, Task]) -> dict[str, Any]:
    """Of the metric of each of ``tasks`` and of ``delta_m``: mean, low, high and pairs of ``entry`` minus ``other``."""

    def by_seed(of: Mapping[str, Any], values: Sequence[float | None] | None) -> dict[int, float | None]:
        return dict(zip(of["seeds"], values or (), strict=False))

    tasks = {
        name: paired_difference(*(by_seed(of, of["metrics"][name][table[name].metric]) for of in (entry, other)))
        for name in entry["metrics"]
        if name in other["metrics"]
    }
    delta = paired_difference(*(by_seed(of, of["delta_m"]) for of in (entry, other)))
    return {"tasks": {name: asdict(found) for name, found in tasks.items()}, "delta_m": asdict(delta)}


def _over_training(
    jobs: Sequence[StudyJob], evaluations: Sequence[Mapping[int, Results]], tasks: Mapping[str, Task]
) -> dict[str, Any]:
    """Curves by step of what all of the runs recorded: scores, shared gates, gradient conflict, specialised experts.

    ``gate`` is the mean over layers and tasks, ``by_task`` that over layers, ``by_layer`` that over tasks, these two
    averaged over seeds too.
    """
    records = [read_metrics(job.run.metrics) for job in jobs]
    found: dict[str, Any] = {}
    names = list(dict.fromkeys(task for of_run in evaluations for metrics in of_run.values() for task in metrics))
    steps = sorted(set.intersection(*map(set, evaluations))) if evaluations else []
    if len(steps) > 1 and all(set(of_run[step]) == set(names) for of_run in evaluations for step in steps):
        scores = {
            name: [[of_run[step][name][tasks[name].metric] for of_run in evaluations] for step in steps]
            for name in names
        }
        found["scores"] = {"steps": steps, "by_task": scores}
    gates = [_frames(lines, "shared_gate") for lines in records]
    if gates and all(gates):
        steps = _common_steps(gates)
        mean_sLt = np.stack([np.mean([frames[step] for frames in gates], axis=0) for step in steps])
        of_model = next(line["tasks"] for line in records[0] if line["kind"] == "run")
        found["shared_gate"] = {
            **_by_step(gates, "gate"),
            "by_task": dict(zip(of_model, mean_sLt.mean(axis=1).T.tolist(), strict=True)),
            "by_layer": mean_sLt.mean(axis=2).T.tolist(),
        }
    shares, cosines = ([_frames(lines, key) for lines in records] for key in ("conflicting", "cosines_by_layer"))
    if shares and all(shares) and all(cosines):
        found["conflict"] = {**_by_step(shares, "conflicting"), "cosine": _by_step(cosines, "cosine")["cosine"]}
    loads = [_frames(lines, "expert_load") for lines in records]
    if loads and all(loads) and next(iter(loads[0].values())).shape[1] > 1:  # between tasks
        shared = [len(next(line["shared_experts"] for line in lines if line["kind"] == "run")) for lines in records]
        routed = [
            {step: load_LtN[..., : load_LtN.shape[-1] - number] for step, load_LtN in frames.items()}
            for frames, number in zip(loads, shared, strict=True)
        ]
        informations, overlaps = (
            [{step: measure(load_LtN) for step, load_LtN in frames.items()} for frames in routed]
            for measure in (task_information, task_overlap)
        )
        found["specialisation"] = {
            **_by_step(informations, "information"),
            "overlap": _by_step(overlaps, "overlap")["overlap"],
        }
    return found


def task_information(load_LtN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mutual information of task and routed expert in each layer, as a share of what is possible: [L], 0 to 1.

    I(T; E) = mean_t sum_e p(e|t) log(p(e|t) / mean_t p(e|t)) of equally frequent tasks, over log of their number. 0:
    every task uses the experts alike. 1: an expert serves one task alone. ``load_LtN`` as metrics.jsonl has it.
    """
    p_LtN = load_LtN / load_LtN.sum(axis=-1, keepdims=True)
    information_L = entr(p_LtN.mean(axis=-2)).sum(axis=-1) - entr(p_LtN).sum(axis=-1).mean(axis=-1)
    return information_L / math.log(p_LtN.shape[-2])


def task_overlap(load_LtN: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of their routed experts' use that two tasks have in common, the mean over pairs of tasks: [L], 0 to 1.

    sum_e min(p(e|t), p(e|u)), one minus the total variation between the two tasks' use of the experts.
    """
    p_LtN = load_LtN / load_LtN.sum(axis=-1, keepdims=True)
    pairs = itertools.combinations(range(p_LtN.shape[-2]), 2)
    return np.mean([np.minimum(p_LtN[:, t], p_LtN[:, u]).sum(axis=-1) for t, u in pairs], axis=0)


Frames = dict[int, NDArray[np.float64]]  # by step


def _frames(lines: Sequence[Mapping[str, Any]], key: str) -> Frames:
    return {line["step"]: np.array(line[key], dtype=float) for line in lines if key in line}


def _common_steps(frames: Sequence[Frames]) -> list[int]:
    return sorted(set.intersection(*(set(of_run) for of_run in frames)))


def _by_step(frames: Sequence[Frames], name: str) -> dict[str, Any]:
    """The steps that all runs have, and for each step one mean per seed."""
    steps = _common_steps(frames)
    return {"steps": steps, name: [[float(np.nanmean(of_run[step])) for of_run in frames] for step in steps]}
