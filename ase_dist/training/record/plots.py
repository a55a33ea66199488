"""The plots of a run, drawn from its metrics.jsonl alone: losses, metrics, expert heat maps, shared gates.

What a run did not record is not drawn: without experts there is no heat map. ``Records`` reads the numbers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ase_dist.files import write_atomic
from ase_dist.training.record.appending import recording
from ase_dist.training.record.metrics import read_metrics
from ase_dist.training.record.records import Array, Records
from ase_dist.training.record.run_folder import RunFolder

DPI = 120
PANEL = (4.2, 3.0)  # inches
COLUMNS = 3
MAP_LIMIT = (4.5, 4.0)  # inches, of one heat map
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, by task
TRIVIAL = "#666666"
SHARED = "#c1121f"
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
}


def draw_all(run_folder: RunFolder) -> list[Path]:
    """Draw what the run's metrics have the numbers for into its folder of plots; the files, in that order.

    Raises UserError where the metrics are damaged, see ``read_metrics``, RecordError where a plot cannot be written.
    """
    records = Records(read_metrics(run_folder.metrics))
    figures: dict[str, Figure | None] = {}
    with matplotlib.rc_context(STYLE):
        figures["losses.png"] = draw_losses(records)
        figures["metrics.png"] = draw_metrics(records)
        figures["task_weights.png"] = draw_task_weights(records)
        for i, name in enumerate(records.tasks):
            figures[f"expert_heatmap_{name}.png"] = draw_heatmap(records, task=i)
        figures["shared_gate.png"] = draw_shared_gate(records)
        drawn = {run_folder.plots / name: figure for name, figure in figures.items() if figure is not None}
        for path, figure in drawn.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI)
            with recording(path):
                write_atomic(path, buffer.getvalue())
    return list(drawn)


# ---------------------------------------------------------------------------------------------------------------------
# The plots; each returns None where nothing was recorded for it


def draw_losses(records: Records) -> Figure | None:
    """The weighted sum and each task's unweighted loss over the steps, pale as recorded and bold as a running mean."""
    if not records.of_kind("train"):
        return None
    names = records.tasks_with_loss()
    curves = [("Weighted sum", records.series("train", "loss"), "#222222")]
    for name, color in zip(names, _colors(names), strict=True):
        curves.append((records.facts_of(name).title, records.series("train", "losses", name), color))
    figure, axes = _panels(len(curves))
    for ax, (title, series, color) in zip(axes, curves, strict=True):
        ax.plot(series.steps, series.values, color=color, alpha=0.3, linewidth=1)
        marker = "o" if len(series.steps) == 1 else None
        ax.plot(series.steps, series.smoothed().values, color=color, linewidth=1.8, marker=marker)
        _finish(ax, title=title, ylabel="Loss")
    return figure


def draw_task_weights(records: Records) -> Figure | None:
    """The weight that balancing gives each task's loss, a curve per task."""
    weights = records.task_weights()
    if not weights:
        return None
    figure = Figure(figsize=(2 * PANEL[0], PANEL[1]), layout="constrained")
    ax = figure.subplots()
    for (name, series), color in zip(weights.items(), _colors([*weights]), strict=True):
        marker = "o" if len(series.steps) == 1 else None
        ax.plot(
            series.steps, series.values, color=color, linewidth=1.6, marker=marker, label=records.facts_of(name).title
        )
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    _finish(ax, title="Weights of the losses", ylabel="Weight")
    return figure


def draw_metrics(records: Records) -> Figure | None:
    """Each task's metric at every evaluation, with the trivial predictor's value as a dashed line."""
    names = records.evaluated_tasks()
    if not names:
        return None
    figure, axes = _panels(len(names))
    for ax, name, color in zip(axes, names, _colors(names), strict=True):
        facts = records.facts_of(name, metrics=records.metric_names(name))
        series = records.series("eval", "metrics", name, facts.metric)
        trivial = records.series("eval", "trivial", name, facts.metric).last
        if math.isfinite(trivial):
            ax.axhline(trivial, color=TRIVIAL, linestyle="--", linewidth=1.2, label=f"trivial predictor {trivial:.4g}")
            ax.legend(loc="best")
        ax.plot(series.steps, series.values, color=color, marker="o", markersize=3.5, linewidth=1.6)
        if series.values and math.isfinite(series.values[-1]):
            ax.annotate(
                f"{series.values[-1]:.4g}",
                (series.steps[-1], series.values[-1]),
                xytext=(5, 0),
                textcoords="offset points",
                color=color,
                va="center",
                annotation_clip=False,
            )
        direction = f" ({facts.direction})" if facts.direction else ""
        _finish(ax, title=facts.title, ylabel=f"{facts.metric_title}{direction}")
    return figure


def draw_heatmap(records: Records, *, task: int) -> Figure | None:
    """Layer by expert at the first, the middle and the last record, as in the paper's Fig. 4, for task number ``task``.

    Above the share of tokens that each expert was active for, below the mean gates where they were recorded.
    """
    kinds = {"expert_load": "Share of tokens", "mean_gates": "Mean gate"}
    frames = {key: records.arrays("train", key, ndim=3) for key in kinds}  # {step: [layers, tasks, experts]}
    steps = sorted(frames["expert_load"])
    if not steps:
        return None
    shown = [steps[i] for i in sorted({0, len(steps) // 2, len(steps) - 1})]
    maps = {key: [frames[key][step][:, task] for step in shown] for key in kinds if frames[key].keys() >= set(shown)}
    layers, experts = maps["expert_load"][0].shape
    width, height = np.clip([0.17 * experts, 0.17 * layers], [2.2, 1.6], MAP_LIMIT)
    figure = Figure(figsize=(len(shown) * width + 1.6, len(maps) * (height + 0.6) + 0.5), layout="constrained")
    axes = figure.subplots(len(maps), len(shown), squeeze=False, sharey=True)
    for row, (key, values) in zip(axes, maps.items(), strict=True):
        # one scale for a row; by square roots, for the gates of shared experts are far larger
        scale = PowerNorm(0.5, vmin=0, vmax=float(np.nanmax(values, initial=1e-6)))
        for ax, values_LN in zip(row, values, strict=True):
            image = ax.imshow(values_LN, norm=scale, cmap="viridis", aspect="auto", interpolation="nearest")
            ax.grid(visible=False)
            ax.set_yticks(_ticks(layers), [str(i + 1) for i in _ticks(layers)])
            _mark_shared(ax, experts, records.shared)
        row[0].set_ylabel("Layer")
        figure.colorbar(image, ax=list(row), label=kinds[key], pad=0.02)
    for ax, step in zip(axes[0], shown, strict=True):
        ax.set_title(f"step {step}")
    for ax in axes[-1]:
        ax.set_xlabel("Expert" + (" (S: shared)" if records.shared else ""))
    figure.suptitle(records.facts_of(records.tasks[task]).title, fontsize=11)
    return figure


def draw_experts(maps_LtN: Mapping[str, Array], *, titles: Sequence[str], num_shared: int) -> Image.Image:
    """One moment of all tasks side by side as a picture: layer by expert, a row for each of ``maps_LtN`` by its name.

    As ``draw_heatmap`` without the course; titles are the tasks', the shared experts are the last ``num_shared``.
    """
    layers, tasks, experts = next(iter(maps_LtN.values())).shape
    shared = range(experts - num_shared, experts)
    width, height = np.clip([0.17 * experts, 0.17 * layers], [1.6, 1.2], MAP_LIMIT)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(tasks * width + 1.6, len(maps_LtN) * (height + 0.5) + 0.3), layout="constrained")
        axes = figure.subplots(len(maps_LtN), tasks, squeeze=False, sharey=True)
        for row, (name, values_LtN) in zip(axes, maps_LtN.items(), strict=True):
            scale = PowerNorm(0.5, vmin=0, vmax=float(np.nanmax(values_LtN, initial=1e-6)))
            for i, ax in enumerate(row):
                image = ax.imshow(values_LtN[:, i], norm=scale, cmap="viridis", aspect="auto", interpolation="nearest")
                ax.grid(visible=False)
                ax.set_yticks(_ticks(layers), [str(j + 1) for j in _ticks(layers)])
                _mark_shared(ax, experts, shared)
            row[0].set_ylabel("Layer")
            figure.colorbar(image, ax=list(row), label=name, pad=0.02)
        for ax, title in zip(axes[0], titles, strict=True):
            ax.set_title(title)
        for ax in axes[-1]:
            ax.set_xlabel("Expert" + (" (S: shared)" if num_shared else ""))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    return Image.open(buffer).convert("RGB")


def draw_shared_gate(records: Records) -> Figure | None:
    """The mean gate of the shared experts over the steps, a panel per task, a line per layer, their mean in black."""
    frames = records.arrays("train", "shared_gate", ndim=2)
    if not frames:
        return None
    steps = sorted(frames)
    gates = np.stack([frames[step] for step in steps])  # [records, layers, tasks]
    layers, tasks = gates.shape[1:]
    figure, axes = _panels(tasks, sharey=True)
    cmap, marker = matplotlib.colormaps["viridis"], "o" if len(steps) == 1 else None
    for i, (ax, name) in enumerate(zip(axes, records.task_names(tasks), strict=True)):
        for layer in range(layers):
            ax.plot(steps, gates[:, layer, i], color=cmap(layer / max(1, layers - 1)), linewidth=1, marker=marker)
        ax.plot(steps, gates[:, :, i].mean(axis=1), color="black", linewidth=2, marker=marker, label="mean of layers")
        title = records.facts_of(name).title
        _finish(ax, title=title, ylabel="Mean shared gate" if i % COLUMNS == 0 else "")
    axes[0].set_ylim(0, 1.05 * float(np.nanmax(gates, initial=1e-3)))  # of all panels: they share the axis
    axes[0].legend(loc="best")
    bar = figure.colorbar(ScalarMappable(Normalize(1, max(layers, 2)), cmap), ax=list(axes), label="Layer")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a plot


def _panels(count: int, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels, at most ``COLUMNS`` in a row."""
    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel().tolist()
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes[:count]


def _finish(ax: Axes, *, title: str, ylabel: str) -> None:
    ax.set_title(title)
    ax.set_xlabel("Step")
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    low, high = ax.get_xlim()
    if high - low < 1:  # a single step: without this its axis has fractions of it
        ax.set_xlim(low - 0.4, high + 0.4)


def _mark_shared(ax: Axes, experts: int, shared: Sequence[int]) -> None:
    """Number the routed experts sparsely; put a frame round the shared ones, which stand together, and name them S."""
    if not shared:
        ax.set_xticks(_ticks(experts))
        return
    low, high = min(shared), max(shared)
    room = 0.03 * experts + 1  # or their name runs into a number
    numbers = [i for i in _ticks(experts) if not low - room < i < high + room]
    ax.set_xticks([*numbers, (low + high) / 2], [*map(str, numbers), "S" if len(shared) == 1 else f"{len(shared)} S"])
    ax.get_xticklabels()[-1].set(color=SHARED, fontweight="bold")
    ax.axvspan(low - 0.5, high + 0.5, fill=False, edgecolor=SHARED, linewidth=1.5)


def _ticks(count: int) -> list[int]:
    """About eight indices, evenly spaced from 0."""
    return list(range(0, count, max(1, math.ceil(count / 8))))


def _colors(names: Sequence[str]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(names))]
