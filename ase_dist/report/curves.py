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
from ase_dist.training.record.records import Array, Records, Series


def loss_charts(records: Records) -> list[Chart]:
    """The weighted sum and each task's own loss, pale as recorded and bold as a running mean."""
    found = [_smoothed("Weighted sum of losses", records.series("train", "loss"), INK)]
    found += [
        _smoothed(records.facts_of(name).title, records.series("train", "losses", name), color_of(i))
        for i, name in enumerate(records.tasks_with_loss())
    ]
    return [chart for chart in found if chart]


def weight_charts(records: Records) -> list[Chart]:
    """The weight that balancing gives each task's loss."""
    return [
        Chart(records.facts_of(name).title, [Line(series, color_of(i))], value=significant(series.last, 3), zero=True)
        for i, (name, series) in enumerate(records.task_weights().items())
    ]


def metric_charts(records: Records, rows: Sequence[ResultRow]) -> list[Chart]:
    """Every task's metric over the evaluations, the trivial predictor dashed, and the mean gain over it."""
    order = {name: i for i, name in enumerate(records.tasks or records.evaluated_tasks())}
    found = []
    for row in rows:
        facts = row.facts
        lines = [Line(row.series, color_of(order.get(facts.name, len(order))), facts.metric_title)]
        if math.isfinite(row.trivial) and row.series:
            ends = [row.series.steps[0], row.series.steps[-1]]
            lines.append(Line(Series(ends, [row.trivial] * 2), TRIVIAL, style="dashed"))
        note = f"{facts.metric_title}, {facts.arrow} {facts.direction}" if facts.direction else ""
        found.append(Chart(facts.title, lines, note=note, value=significant(row.latest)))
    gain = gains(rows)
    if len(rows) > 1 and gain:
        note = "\u0394m over the trivial predictor, %, \u2191 higher is better"
        found.append(Chart("Mean gain", [Line(gain, label="mean gain")], note=note, value=significant(gain.last)))
    return [chart for chart in found if chart]


def course_charts(records: Records) -> list[Chart]:
    """Learning rate, speed, memory and the router's auxiliary loss."""
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
    gates_RLt = np.stack([frames[step] for step in steps])  # [records, layers, tasks]
    found = []
    for i, name in enumerate(records.task_names(gates_RLt.shape[2])):
        mean = Series([float(step) for step in steps], [_mean_of_known(gates_L) for gates_L in gates_RLt[:, :, i]])
        lines = [*_layer_lines(steps, gates_RLt[:, :, i]), Line(mean, INK, "mean of the layers")]
        title, value = records.facts_of(name).title, significant(mean.last, 3)
        found.append(Chart(title, lines, note="mean over tokens", value=value, zero=True))
    return found


def conflict_charts(records: Records) -> list[Chart]:
    """How often the tasks' gradients on the shared experts conflict, and their cosines."""
    matrices = records.arrays("conflict", "cosines", ndim=2)
    layers = records.arrays("conflict", "cosines_by_layer", ndim=1)
    steps = sorted(layers)
    share = records.series("conflict", "conflicting").scaled(100)
    off_diagonal = [matrices[step][~np.eye(*matrices[step].shape, dtype=np.bool_)] for step in sorted(matrices)]
    pairs = Series([float(step) for step in sorted(matrices)], [_mean_of_known(cosines) for cosines in off_diagonal])
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
    """The step of the last measurement of gradient conflict and its cosines [t, t]."""
    matrices = records.arrays("conflict", "cosines", ndim=2)
    if not matrices or len(records.tasks) != len(matrices[max(matrices)]):
        return None
    return max(matrices), matrices[max(matrices)]


def color_of(index: int) -> str:
    """The colour of a task or a variant, as in the plots."""
    return COLORS[index % len(COLORS)]


def _smoothed(title: str, series: Series, color: str) -> Chart:
    lines = [Line(series, color, style="pale"), Line(series.smoothed(), color, "running mean")]
    return Chart(title, lines, note="\u2193 lower is better", value=significant(series.last))


def _layer_lines(steps: Sequence[int], values_RL: Array) -> list[Line]:
    """A thin line per layer, from blue to green: the colours of the plots that are visible on dark and light pages."""
    count = values_RL.shape[1]
    colors = [to_hex(matplotlib.colormaps["viridis"](0.3 + 0.58 * i / max(1, count - 1))) for i in range(count)]
    return [
        Line(Series([float(step) for step in steps], values_RL[:, i].tolist()), colors[i], style="thin")
        for i in range(count)
    ]


def _mean_of_known(values: Array) -> float:
    """The mean over the finite values; NaN where there are none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan
