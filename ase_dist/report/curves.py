"""Which curves a run's page shows: losses, metrics, the course of training, shared gates, gradient conflict."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import to_hex

from ase_dist.report.charts import INK, Chart, Line
from ase_dist.report.results import ResultRow, gains
from ase_dist.report.text import significant, size
from ase_dist.training.record.plots import COLORS, TRIVIAL
from ase_dist.training.record.records import Array, Records, Series, task_facts


def loss_charts(records: Records) -> list[Chart]:
    """The weighted sum and each task's own loss, pale as recorded and bold as a running mean."""
    found = [_smoothed("Weighted sum of losses", records.series("train", "loss"), INK)]
    found += [
        _smoothed(task_facts(records.data, name).title, records.series("train", "losses", name), color_of(i))
        for i, name in enumerate(records.tasks_with_loss())
    ]
    return [chart for chart in found if chart]


def metric_charts(records: Records, rows: Sequence[ResultRow]) -> list[Chart]:
    """Every task's metric over the evaluations, the trivial predictor dashed, and the mean gain over it."""
    order = {name: i for i, name in enumerate(records.tasks or records.evaluated_tasks())}
    found = [_metric(row, color_of(order.get(row.facts.name, len(order)))) for row in rows]
    gain = gains(rows)
    if len(rows) > 1 and gain:
        note = "\u0394m over the trivial predictor, %, \u2191 higher is better"
        found.append(Chart("Mean gain", [Line(gain, label="mean gain")], note=note, value=significant(gain.last)))
    return [chart for chart in found if chart]


def course_charts(records: Records) -> list[Chart]:
    """What training looked like from outside."""
    memory = records.series("train", "memory_bytes")
    lr = records.series("train", "lr")
    speed = records.series("train", "images_per_second")
    aux = records.series("train", "aux_loss")
    found = [
        Chart(
            "Learning rate",
            [Line(lr, label="lr")],
            note=f"greatest {max(lr.values, default=0):.3g}",
            value=f"{lr.last:.3g}",
            zero=True,
        ),
        Chart("Speed", [Line(speed, label="images/s")], note="images/s", value=significant(speed.last, 3), zero=True),
        Chart("Memory", [Line(memory.scaled(1e-9), label="GB")], note="GB, peak", value=size(memory.last), zero=True),
        Chart(
            "Router's auxiliary loss",
            [Line(aux, label="loss")],
            note="weighted, a part of the sum",
            value=significant(aux.last),
        ),
    ]
    return [chart for chart in found if chart]


def gate_charts(records: Records) -> list[Chart]:
    """The mean gate of the shared experts, a panel per task, a thin line per layer, their mean bold."""
    frames = records.arrays("train", "shared_gate", ndim=2)
    if not frames:
        return []
    steps = sorted(frames)
    gates = np.stack([frames[step] for step in steps])  # [records, layers, tasks]
    titles = [task_facts(records.data, name).title for name in records.task_names(gates.shape[2])]
    return [_gates(title, steps, gates[:, :, i]) for i, title in enumerate(titles)]


def conflict_charts(records: Records) -> list[Chart]:
    """How often and how far the tasks' gradients on the shared experts point apart."""
    matrices = records.arrays("conflict", "cosines", ndim=2)
    layers = records.arrays("conflict", "cosines_by_layer", ndim=1)
    steps = sorted(layers)
    share = records.series("conflict", "conflicting").scaled(100)
    pairs = Series([float(step) for step in sorted(matrices)], [_off_diagonal(matrices[s]) for s in sorted(matrices)])
    by_layer = _layer_lines(steps, np.stack([layers[step] for step in steps])) if steps else []
    found = [
        Chart(
            "Pairs of tasks in conflict",
            [Line(share, COLORS[1], "share")],
            note="% of pairs, layers apart",
            value=f"{significant(share.last, 3)} %",
            zero=True,
        ),
        Chart(
            "Mean cosine",
            [Line(pairs, COLORS[0], "cosine")],
            note="between tasks, all layers together",
            value=significant(pairs.last, 3),
            zero=True,
        ),
        Chart("Mean cosine by layer", by_layer, note="from the first (blue) to the last (green)", zero=True),
    ]
    return [chart for chart in found if chart]


def last_matrix(records: Records) -> tuple[int, Array] | None:
    """The step of the last measurement of gradient conflict and its cosines, tasks by tasks."""
    matrices = records.arrays("conflict", "cosines", ndim=2)
    if not matrices or len(records.tasks) != len(matrices[max(matrices)]):
        return None
    return max(matrices), matrices[max(matrices)]


def color_of(index: int) -> str:
    """The colour of a task or a variant, as the plots have it."""
    return COLORS[index % len(COLORS)]


def _smoothed(title: str, series: Series, color: str) -> Chart:
    lines = [Line(series, color, style="pale"), Line(series.smoothed(), color, "running mean")]
    return Chart(title, lines, note="\u2193 lower is better", value=significant(series.last))


def _metric(row: ResultRow, color: str) -> Chart:
    lines = [Line(row.series, color, row.facts.metric_title)]
    if math.isfinite(row.trivial) and row.series:
        ends = [row.series.steps[0], row.series.steps[-1]]
        lines.append(Line(Series(ends, [row.trivial] * 2), TRIVIAL, style="dashed"))
    note = f"{row.facts.metric_title}, {row.facts.arrow} {row.facts.direction}" if row.facts.direction else ""
    return Chart(row.facts.title, lines, note=note, value=significant(row.latest))


def _gates(title: str, steps: Sequence[int], gates_RL: Array) -> Chart:
    mean = Series([float(step) for step in steps], _means(gates_RL))
    lines = [*_layer_lines(steps, gates_RL), Line(mean, INK, "mean of the layers")]
    return Chart(title, lines, note="mean over tokens", value=significant(mean.last, 3), zero=True)


def _layer_lines(steps: Sequence[int], values_RL: Array) -> list[Line]:
    """A thin line per layer, from blue to green: the part of the plots' colours that shows on dark and on light."""
    count = values_RL.shape[1]
    colors = [to_hex(matplotlib.colormaps["viridis"](0.3 + 0.58 * i / max(1, count - 1))) for i in range(count)]
    return [
        Line(Series([float(step) for step in steps], values_RL[:, i].tolist()), colors[i], style="thin")
        for i in range(count)
    ]


def _means(values_RL: Array) -> list[float]:
    """The mean over the known values of each row; NaN where there are none."""
    return [float(row[np.isfinite(row)].mean()) if np.isfinite(row).any() else math.nan for row in values_RL]


def _off_diagonal(cosines_tt: Array) -> float:
    known = [v for i, row in enumerate(cosines_tt) for j, v in enumerate(row) if i != j and math.isfinite(v)]
    return float(np.mean(known)) if known else math.nan
