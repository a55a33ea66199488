"""Heat maps of experts, tasks by experts for every layer, and a slider over the steps; and the matrix of conflicts.

The page shows the last record as SVG, and carries all frames as whole numbers, 1/10000 each, in JSON: a script paints
the cells anew. The scale is by square roots and the same for all frames, as in ``ase_dist.training.record.plots``,
because the gates of shared experts are far larger than those of routed ones.
Letters: F frames, L layers, t tasks, N experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.colors import to_hex

from ase_dist.report.text import MINUS, plural
from ase_dist.training.record.plots import COLORS
from ase_dist.training.record.records import Array, Records

KINDS = {"expert_load": "Activation frequency", "mean_gates": "Mean gate"}
UNIT = 10_000  # numbers are written as multiples of 1 / UNIT
MAX_FRAMES = 120
MAX_NUMBERS = 400_000  # of all frames together: about 1.6 MB of JSON
LEVELS = 64  # colours of the scale
NAMES, CELLS, ROW, FOOT = 80.0, 230.0, 14.0, 14.0  # widths and heights in the picture's own units


@dataclass(frozen=True)
class HeatMaps:
    """``maps`` by layer as elements for the page, ``json`` for the script; ``left_out`` records are not in it."""

    maps: list[Markup]
    bar: Markup
    json: Markup
    labels: list[str]
    kinds: dict[str, str]
    top: float
    shared: list[int]
    left_out: int


def heat_maps(records: Records) -> HeatMaps | None:
    """The maps of a run; None where it recorded no experts."""
    by_kind = {key: records.arrays("train", key, ndim=3) for key in KINDS}
    by_kind = {key: frames for key, frames in by_kind.items() if frames.keys() == by_kind["expert_load"].keys()}
    loads = by_kind.get("expert_load", {})
    if not loads:
        return None
    steps = chosen_steps(sorted(loads), numbers=len(by_kind) * loads[max(loads)].size)
    frames = {key: np.stack([found[step] for step in steps]) for key, found in by_kind.items()}  # each [F, L, t, N]
    tops = {key: float(np.nanmax(stack_FLtN, initial=1e-6)) for key, stack_FLtN in frames.items()}
    tasks = [short(name) for name in records.task_names(loads[max(loads)].shape[1])]
    labels = [_label(records, step) for step in steps]
    last_LtN = frames["expert_load"][-1]
    return HeatMaps(
        maps=[_draw_map(each_tN, tasks, records.shared, top=tops["expert_load"]) for each_tN in last_LtN],
        bar=_draw_bar(),
        json=_to_json(frames, tops, labels, tasks),
        labels=labels,
        kinds={key: title for key, title in KINDS.items() if key in frames},
        top=tops["expert_load"],
        shared=records.shared,
        left_out=len(loads) - len(steps),
    )


def chosen_steps(steps: Sequence[int], *, numbers: int) -> list[int]:
    """As many of ``steps`` as fit the page at ``numbers`` each, evenly spread, first and last included."""
    room = max(2, min(MAX_FRAMES, MAX_NUMBERS // max(1, numbers)))
    if len(steps) <= room:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (room - 1))] for i in range(room)]


def palette() -> list[str]:
    """The colours from 0 to the largest value."""
    return [to_hex(matplotlib.colormaps["viridis"](i / (LEVELS - 1))) for i in range(LEVELS)]


def level(value: float, top: float) -> int:
    """The index of a value's colour; 0 for what is not finite."""
    return min(LEVELS - 1, round(math.sqrt(max(0.0, value) / top) * (LEVELS - 1))) if math.isfinite(value) else 0


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def _to_json(frames: dict[str, Array], tops: dict[str, float], labels: list[str], tasks: list[str]) -> Markup:
    """JSON for the script; ``<`` is escaped, because the text is inside a script element."""
    values = {
        key: np.rint(np.nan_to_num(stack) * UNIT).astype(int).reshape(len(labels), -1).tolist()
        for key, stack in frames.items()
    }
    data = {
        "labels": labels,
        "tasks": tasks,
        "experts": frames["expert_load"].shape[-1],
        "unit": UNIT,
        "tops": tops,
        "titles": KINDS,
        "colors": palette(),
        "values": values,
    }
    return Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def _draw_map(values_tN: Array, tasks: Sequence[str], shared: Sequence[int], *, top: float) -> Markup:
    num_tasks, experts = values_tN.shape
    colors, width = palette(), CELLS / experts
    height = num_tasks * ROW + FOOT
    svg = Element("svg", {"viewBox": f"0 0 {NAMES + CELLS + 4:g} {height:g}", "role": "img", "class": "map"})
    for i, (name, row_N) in enumerate(zip(tasks, values_tN, strict=True)):
        _text(svg, NAMES - 5, i * ROW + ROW - 4, name, anchor="end")
        for j, value in enumerate(row_N):
            cell = {"x": f"{NAMES + j * width:.2f}", "y": f"{i * ROW:g}", "width": f"{width:.2f}", "height": f"{ROW:g}"}
            SubElement(svg, "rect", {**cell, "fill": colors[level(float(value), top)]})
    # numbers under some of the routed experts, a frame and an S for the shared ones, which stand together
    bottom, known = num_tasks * ROW, [i for i in shared if 0 <= i < experts]
    low = min(known, default=experts)
    for i in range(0, experts, max(1, math.ceil(experts / 6))):
        if i < low - 0.04 * experts - 1 or not known:
            _text(svg, NAMES + (i + 0.5) * width, bottom + 11, str(i), anchor="middle")
    if known:
        left, wide = NAMES + low * width, (max(known) - low + 1) * width
        SubElement(svg, "path", {"class": "shared", "d": f"M{left:.2f} 1h{wide:.2f}v{bottom - 2:g}h-{wide:.2f}Z"})
        name = "S" if len(known) == 1 else f"{len(known)} S"
        _text(svg, left + wide / 2, bottom + 11, name, anchor="middle", tone="shared-name")
    return Markup(tostring(svg, encoding="unicode"))


def _draw_bar() -> Markup:
    """The scale of colours from left to right."""
    svg = Element("svg", {"viewBox": f"0 0 {LEVELS} 4", "class": "bar", "preserveAspectRatio": "none"})
    svg.set("aria-hidden", "true")
    for i, color in enumerate(palette()):
        SubElement(svg, "rect", {"x": str(i), "y": "0", "width": "1.1", "height": "4", "fill": color})
    return Markup(tostring(svg, encoding="unicode"))


def draw_matrix(cosines_tt: Array, tasks: Sequence[str]) -> Markup:
    """Cosines between tasks as a matrix with numbers: orange where they conflict, blue where they agree."""
    cell_width, cell_height = 68.0, 26.0
    wide, high = NAMES + len(tasks) * cell_width, len(tasks) * cell_height
    svg = Element("svg", {"viewBox": f"0 0 {wide:g} {high + 18:g}", "role": "img", "class": "matrix"})
    svg.set("aria-label", "Cosines between the tasks' gradients")
    for i, name in enumerate(tasks):
        _text(svg, NAMES - 6, i * cell_height + 17, name, anchor="end")
        _text(svg, NAMES + (i + 0.5) * cell_width, high + 13, name, anchor="middle")
        for j in range(len(tasks)):
            value = float(cosines_tt[i, j])
            x, y, is_known = NAMES + j * cell_width, i * cell_height, i != j and math.isfinite(value)
            strength = f"{0.85 * math.sqrt(min(1.0, abs(value))):.3f}" if is_known else "0"
            cell = {
                "x": f"{x + 1:g}",
                "y": f"{y + 1:g}",
                "width": f"{cell_width - 2:g}",
                "height": f"{cell_height - 2:g}",
            }
            SubElement(
                svg, "rect", {**cell, "rx": "3", "fill": COLORS[1 if value < 0 else 0], "fill-opacity": strength}
            )
            text = f"{value:+.2f}".replace("-", MINUS) if is_known else "\u00b7"
            _text(svg, x + cell_width / 2, y + 17, text, anchor="middle", tone="number")
    return Markup(tostring(svg, encoding="unicode"))


def _text(svg: Element, x: float, y: float, text: str, *, anchor: str, tone: str = "") -> None:
    where = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    SubElement(svg, "text", {**where, "class": tone} if tone else where).text = text


def short(name: str) -> str:
    """A task's name as it fits in front of a row."""
    name = name.replace("_", " ")
    return name if len(name) <= 12 else name[:11] + "\u2026"


def _label(records: Records, step: int) -> str:
    """The step, and how many epochs were done then: the recorded epoch is that of the next image."""
    epoch = next((r.get("epoch") for r in records.of_kind("train") if r["step"] == step), None)
    done = f", {plural(epoch, 'epoch')} done" if isinstance(epoch, int) and not isinstance(epoch, bool) else ""
    return f"step {step:,}{done}"
