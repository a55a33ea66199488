"""The plots of a run, drawn from its metrics.jsonl alone: losses, metrics, expert heat maps, shared gates.

What a run did not record is not drawn: no experts, no heat map. The keys are those that ``recorder`` lists.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ase_dist.files import write_atomic
from ase_dist.tasks import Task, find_task
from ase_dist.training.record.metrics import read_metrics
from ase_dist.training.record.run_folder import RunFolder

Record = Mapping[str, Any]
Array = NDArray[np.float64]

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

    Raises UserError where the metrics are damaged, see ``read_metrics``.
    """
    records = read_metrics(run_folder.metrics)
    train, evals = _of_kind(records, "train"), _of_kind(records, "eval")
    run = next(iter(reversed(_of_kind(records, "run"))), {})
    figures: dict[str, Figure | None] = {}
    with matplotlib.rc_context(STYLE):
        figures["losses.png"] = draw_losses(train, run)
        figures["metrics.png"] = draw_metrics(evals, run)
        for i, name in enumerate(run.get("tasks", ())):
            figures[f"expert_heatmap_{name}.png"] = draw_heatmap(train, run, task=i)
        figures["shared_gate.png"] = draw_shared_gate(train, run)
        return [_save(figure, run_folder.plots / name) for name, figure in figures.items() if figure is not None]


# ---------------------------------------------------------------------------------------------------------------------
# The plots; each returns None where nothing was recorded for it


def draw_losses(train: Sequence[Record], run: Record) -> Figure | None:
    """The weighted sum and each task's unweighted loss over the steps, pale as recorded and bold as a running mean."""
    names = list(dict.fromkeys(name for record in train for name in record.get("losses", {})))
    if not train:
        return None
    figure, axes = _panels(1 + len(names))
    _draw_loss(axes[0], _series(train, "loss"), title="Weighted sum", color="#222222")
    for ax, name, color in zip(axes[1:], names, _colors(names), strict=True):
        _draw_loss(ax, _series(train, "losses", name), title=_title(run, name), color=color)
    return figure


def draw_metrics(evals: Sequence[Record], run: Record) -> Figure | None:
    """Each task's metric at every evaluation, with the trivial predictor's value as a dashed line."""
    names = list(dict.fromkeys(name for record in evals for name in record.get("metrics", {})))
    if not names:
        return None
    figure, axes = _panels(len(names))
    for ax, name, color in zip(axes, names, _colors(names), strict=True):
        metric = _metric_key(run, name, evals)
        steps, values = _series(evals, "metrics", name, metric)
        _draw_trivial(ax, _series(evals, "trivial", name, metric)[1])
        ax.plot(steps, values, color=color, marker="o", markersize=3.5, linewidth=1.6)
        _mark_last(ax, steps, values, color)
        _finish(ax, title=_title(run, name), ylabel=_metric_label(run, name, metric))
    return figure


def draw_heatmap(train: Sequence[Record], run: Record, *, task: int) -> Figure | None:
    """Layer by expert at the first, the middle and the last record, as in the paper's Fig. 4, for task number ``task``.

    Above the share of tokens that each expert was active for, below the mean gates where they were recorded.
    """
    shown = _first_middle_last([record for record in train if "expert_load" in record])
    if not shown:
        return None
    kinds = {"expert_load": "Share of tokens", "mean_gates": "Mean gate"}
    kinds = {key: label for key, label in kinds.items() if all(key in record for record in shown)}
    maps = {key: [_floats(record[key])[:, task] for record in shown] for key in kinds}  # each [layers, experts]
    layers, experts = maps["expert_load"][0].shape
    width, height = np.clip([0.17 * experts, 0.17 * layers], [2.2, 1.6], MAP_LIMIT)
    figure = Figure(figsize=(len(shown) * width + 1.6, len(kinds) * (height + 0.6) + 0.5), layout="constrained")
    axes = figure.subplots(len(kinds), len(shown), squeeze=False, sharey=True)
    shared = [int(i) for i in run.get("shared_experts", ())]
    for row, (key, label) in zip(axes, kinds.items(), strict=True):
        _draw_maps(figure, list(row), maps[key], label=label, shared=shared)
    for ax, record in zip(axes[0], shown, strict=True):
        ax.set_title(f"step {record['step']}")
    for ax in axes[-1]:
        ax.set_xlabel("Expert" + (" (S: shared)" if shared else ""))
    figure.suptitle(_title(run, run["tasks"][task]), fontsize=11)
    return figure


def draw_shared_gate(train: Sequence[Record], run: Record) -> Figure | None:
    """The mean gate of the shared experts over the steps, a panel per task, a line per layer, their mean in black."""
    records = [record for record in train if "shared_gate" in record]
    if not records:
        return None
    steps = np.array([record["step"] for record in records])
    gates = np.stack([_floats(record["shared_gate"]) for record in records])  # [records, layers, tasks]
    layers, tasks = gates.shape[1:]
    names = list(run.get("tasks", ())) or [f"task {i}" for i in range(tasks)]
    figure, axes = _panels(tasks, sharey=True)
    cmap, marker = matplotlib.colormaps["viridis"], "o" if len(records) == 1 else None
    for i, ax in enumerate(axes):
        for layer in range(layers):
            ax.plot(steps, gates[:, layer, i], color=cmap(layer / max(1, layers - 1)), linewidth=1, marker=marker)
        ax.plot(steps, gates[:, :, i].mean(axis=1), color="black", linewidth=2, marker=marker, label="mean of layers")
        _finish(ax, title=_title(run, names[i]), ylabel="Mean shared gate" if i % COLUMNS == 0 else "")
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


def _draw_loss(ax: Axes, series: tuple[Array, Array], *, title: str, color: str) -> None:
    steps, values = series
    ax.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    ax.plot(steps, _running_mean(values), color=color, linewidth=1.8, marker="o" if len(steps) == 1 else None)
    _finish(ax, title=title, ylabel="Loss")


def _draw_trivial(ax: Axes, values: Array) -> None:
    known = values[np.isfinite(values)]
    if known.size:
        ax.axhline(known[-1], color=TRIVIAL, linestyle="--", linewidth=1.2, label=f"trivial predictor {known[-1]:.4g}")
        ax.legend(loc="best")


def _mark_last(ax: Axes, steps: Array, values: Array, color: str) -> None:
    """Write the last value beside its point."""
    if len(values) and np.isfinite(values[-1]):
        ax.annotate(
            f"{values[-1]:.4g}",
            (steps[-1], values[-1]),
            xytext=(5, 0),
            textcoords="offset points",
            color=color,
            va="center",
            annotation_clip=False,
        )


def _draw_maps(figure: Figure, axes: list[Axes], maps: list[Array], *, label: str, shared: Sequence[int]) -> None:
    """One row of heat maps with one scale; by square roots, for a shared expert outshines the routed ones."""
    layers, experts = maps[0].shape
    scale = PowerNorm(0.5, vmin=0, vmax=float(np.nanmax(maps, initial=1e-6)))
    for ax, values in zip(axes, maps, strict=True):
        image = ax.imshow(values, norm=scale, cmap="viridis", aspect="auto", interpolation="nearest")
        ax.grid(visible=False)
        ax.set_yticks(_ticks(layers), [str(i + 1) for i in _ticks(layers)])
        _mark_shared(ax, experts, shared)
    axes[0].set_ylabel("Layer")
    figure.colorbar(image, ax=axes, label=label, pad=0.02)


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


# ---------------------------------------------------------------------------------------------------------------------
# Numbers from records


def _of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _floats(value: Any) -> Array:
    """Nested lists as an array; null, which stands for what is not finite, as NaN."""
    return np.array(value, dtype=np.float64)


def _series(records: Iterable[Record], *keys: str) -> tuple[Array, Array]:
    """Steps and values at the path ``keys`` of the records that have it."""
    found = [(record["step"], _reach(record, keys)) for record in records]
    pairs = [(step, math.nan if value is None else value) for step, value in found if value is not _MISSING]
    return _floats([step for step, _ in pairs]), _floats([value for _, value in pairs])


_MISSING = object()


def _reach(value: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return _MISSING
        value = value[key]
    return value


def _running_mean(values: Array) -> Array:
    """The mean over a window of a twentieth of the run, shorter at the ends; NaN counts for nothing."""
    half, known = len(values) // 40, np.isfinite(values)
    means = np.full_like(values, math.nan)
    for i in range(len(values)):
        window = slice(max(0, i - half), i + half + 1)
        if known[window].any():
            means[i] = values[window][known[window]].mean()
    return means


def _first_middle_last(records: Sequence[Record]) -> list[Record]:
    """Up to three different records."""
    return [records[i] for i in sorted({0, len(records) // 2, len(records) - 1})] if records else []


def _task(run: Record, name: str) -> Task | None:
    """The task's row in the table of the run's data set, else of any."""
    return find_task(str(run.get("data", "")), name)


def _title(run: Record, name: str) -> str:
    task = _task(run, name)
    return task.title if task else name


def _metric_key(run: Record, name: str, evals: Iterable[Record]) -> str:
    """The metric that stands for the task; of a task that no table has, the first that was recorded."""
    task = _task(run, name)
    return task.metric if task else next(iter(next(r["metrics"][name] for r in evals if name in r.get("metrics", {}))))


def _metric_label(run: Record, name: str, metric: str) -> str:
    task = _task(run, name)
    return f"{task.metric_title} ({'higher' if task.higher_is_better else 'lower'} is better)" if task else metric


def _colors(names: Sequence[str]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(names))]


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    write_atomic(path, buffer.getvalue())
    return path
