"""The plots of a study: gains by variant or along its axis, speed, shared gates, gradient conflict."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from ase_dist.evaluation.seeds import mean_and_spread
from ase_dist.study.collect import task_of
from ase_dist.training.record.plots import COLORS, DPI, STYLE

Variants = Sequence[Mapping[str, Any]]
GREY = "#666666"
TITLE_WIDTH = 60  # characters per line


def draw(results: Mapping[str, Any], *, title: str, axis: str) -> dict[str, bytes]:
    """PNG files by name, for every plot that the results have the numbers for."""
    title = fill(title, TITLE_WIDTH)
    done = [variant for variant in results["variants"] if variant["seeds"]]
    numbered = axis and all(variant["x"] is not None for variant in done if variant["group"])
    delta = str(results.get("delta", "delta_m")).capitalize()
    colors = dict(zip((variant["name"] for variant in done), cycle(COLORS), strict=False))  # the same in all plots
    plots: dict[str, Callable[[], Figure | None]] = {
        "gains": lambda: _lines(done, "delta_m", title, axis, f"{delta}, %") if numbered else _bars(done, title, delta),
        "speed": lambda: _lines(done, "images_per_second", title, axis, "training images/s") if numbered else None,
        "scores": lambda: _scores(done, results, colors),
        "shared_gate": lambda: _curves(done, colors, "shared_gate", "gate", "mean gate of the shared experts"),
        "conflict": lambda: _curves(done, colors, "conflict", "conflicting", "share of task pairs in conflict"),
        "cosine": lambda: _curves(done, colors, "conflict", "cosine", "mean cosine between tasks' gradients"),
        "shared_gate_by_task": lambda: _gates(done, by_task=True),
        "shared_gate_by_layer": lambda: _gates(done, by_task=False),
        "task_information": lambda: _curves(
            done, colors, "specialisation", "information", "information of task and expert, of what is possible"
        ),
        "task_overlap": lambda: _curves(
            done, colors, "specialisation", "overlap", "use of experts that two tasks share"
        ),
    }
    drawn = {}
    for name, plot in plots.items():
        with rc_context(STYLE):
            figure = plot()
            if figure is not None:
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", dpi=DPI)
                drawn[f"{name}.png"] = buffer.getvalue()
    return drawn


def _bars(variants: Variants, title: str, delta: str) -> Figure | None:
    """Delta_m (or Delta_p) by variant: whiskers of one standard deviation, one dot per seed (the paper's Fig. 2)."""
    shown = [variant for variant in variants if variant["delta_m"]]
    if not shown:
        return None
    figure = Figure(figsize=(7.0, 0.9 + 0.34 * len(shown)), layout="constrained")
    ax = figure.subplots()
    groups = list(dict.fromkeys(variant["group"] for variant in shown))
    for y, variant in enumerate(shown):
        mean, spread = mean_and_spread(variant["delta_m"])
        color = COLORS[groups.index(variant["group"]) % len(COLORS)]
        ax.barh(
            y,
            mean,
            xerr=spread if math.isfinite(spread) else None,
            color=color,
            alpha=0.75,
            height=0.66,
            error_kw={"ecolor": "#222222", "elinewidth": 1.0, "capsize": 2.5},
        )
        known = [value for value in variant["delta_m"] if value is not None]
        ax.plot(known, [y] * len(known), "o", color="#222222", markersize=2.5, zorder=3)
    ax.set_yticks(range(len(shown)), [variant["label"] for variant in shown])
    ax.invert_yaxis()
    ax.axvline(0, color="#222222", linewidth=0.8)
    ax.set(xlabel=f"{delta} over the reference, %", title=title)
    return figure


def _lines(variants: Variants, key: str, title: str, axis: str, ylabel: str) -> Figure | None:
    """A value along the study's axis, a line per group (Fig. 3a and 3b); a group without x is a dashed level."""
    shown = [variant for variant in variants if variant[key]]
    if not shown:
        return None
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    ax = figure.subplots()
    for group, color in zip(dict.fromkeys(variant["group"] for variant in shown), cycle(COLORS), strict=False):
        points = [(v["x"], *mean_and_spread(v[key])) for v in shown if v["group"] == group]
        if points[0][0] is None:
            ax.axhline(points[0][1], color=color, linestyle="--", linewidth=1.2, label=group)
            continue
        x, y, spread = (np.array(column, dtype=float) for column in zip(*sorted(points), strict=True))
        ax.errorbar(x, y, yerr=np.nan_to_num(spread), color=color, marker="o", markersize=4, capsize=2.5, label=group)
    xs = sorted({variant["x"] for variant in shown if variant["x"] is not None})
    if xs and xs[0] > 0 and xs[-1] / xs[0] >= 4:
        ax.set_xscale("log", base=2)
        ax.minorticks_off()
    ax.set_xticks(xs, [f"{x:g}" for x in xs])
    ax.set(xlabel=axis, ylabel=ylabel, title=title)
    ax.legend()
    return figure


def _scores(variants: Variants, results: Mapping[str, Any], colors: Mapping[str, str]) -> Figure | None:
    """The tasks' metrics over the steps, a panel per task, a line per variant: mean over seeds, range as a band."""
    shown = [variant for variant in variants if variant.get("scores")]
    if not shown:
        return None
    names = [name for name in results["tasks"] if any(name in variant["scores"]["by_task"] for variant in shown)]
    figure = Figure(figsize=(1.0 + 3.0 * len(names), 3.9), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(names)))
    lines = {}
    for ax, name in zip(panels, names, strict=True):
        for variant in shown:
            if name in variant["scores"]["by_task"]:
                steps, color = variant["scores"]["steps"], colors[variant["name"]]
                values = np.array(variant["scores"]["by_task"][name], dtype=float)
                (lines[variant["label"]],) = ax.plot(steps, values.mean(axis=1), color=color, marker=".")
                ax.fill_between(steps, values.min(axis=1), values.max(axis=1), color=color, alpha=0.12, linewidth=0)
        task = task_of(results, name)
        ax.set(xlabel="step", title=f"{task.title}, {task.metric_title}")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), len(names)))
    return figure


def _gates(variants: Variants, *, by_task: bool) -> Figure | None:
    """The shared experts' gate over the steps, a panel per variant, a line per task or per layer (early ones dark).

    Variants whose gate is 1 throughout have no panel, in which the others' gates could not be told apart.
    """
    measured = [variant for variant in variants if variant.get("shared_gate", {}).get("steps")]
    shown = [variant for variant in measured if not np.all(np.array(variant["shared_gate"]["gate"]) == 1)]
    if not shown:
        return None
    figure = Figure(figsize=(1.0 + 2.8 * len(shown), 3.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(shown), sharey=True))
    for ax, variant in zip(panels, shown, strict=True):
        found = variant["shared_gate"]
        lines = found["by_task"] if by_task else {f"layer {i + 1}": v for i, v in enumerate(found["by_layer"])}
        colors = COLORS if by_task else matplotlib.colormaps["viridis"](np.linspace(0, 1, len(lines)))
        for (label, values), color in zip(lines.items(), cycle(colors), strict=False):
            ax.plot(found["steps"], values, color=color, linewidth=1.2, label=label)
        ax.set(xlabel="step", title=fill(variant["label"], 26))
    panels[0].set_ylabel("gate of the shared experts, mean over seeds")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right center")
    return figure


def _curves(variants: Variants, colors: Mapping[str, str], kind: str, name: str, ylabel: str) -> Figure | None:
    """A quantity over the steps: the mean over seeds as a line, their range as a pale band."""
    shown = [variant for variant in variants if variant.get(kind, {}).get("steps")]
    if not shown:
        return None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    ax = figure.subplots()
    for variant in shown:
        steps, color = variant[kind]["steps"], colors[variant["name"]]
        values = np.array(variant[kind][name], dtype=float)
        ax.plot(steps, values.mean(axis=1), color=color, marker="." if len(steps) < 30 else "", label=variant["label"])
        ax.fill_between(steps, values.min(axis=1), values.max(axis=1), color=color, alpha=0.15, linewidth=0)
    if name == "cosine":
        ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set(xlabel="step", ylabel=ylabel)
    ax.legend()
    return figure
