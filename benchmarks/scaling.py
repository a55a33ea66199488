"""How the cost of a step grows with tokens, experts (N * r constant, or all of rank 1), rank, tasks, image size, ranks.

    python benchmarks/scaling.py [--axes tokens experts] [--json out.json] [--plot out.png]

Forward + backward of one layer of experts on a frozen ViT-S FFN; for image size of a whole two-block ViT with light
heads, attention included. Along an axis all else stays as it is at the default: 2 images, 5 tasks, 16/3/1/4, size 224.
The points of an axis take turns in every repetition. One thread, and the processor's clock, which other work on the
machine disturbs least; for ranks the wall's, of processes with one thread and the same tokens each (weak scaling),
gradients averaged. The slope is that of a line through the logarithms: 1 is linear, 0 is flat.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _ranks import on_ranks
from _timing import Times, Watch, drawing, interleaved, median, prepare, write_report
from peers.common import SHAPES, TASKS, Case, Experts, fill, frozen_ffn
from peers.plain import ours

from ase_dist import collectives
from ase_dist.models import build_model
from ase_dist.moe import MoEFFN
from ase_dist.read_config import build_settings
from ase_dist.tables import Table
from ase_dist.tasks import select_tasks

TOKENS, DEFAULT = 197, Experts(16, 3, 1, 4)
Step = Callable[[], Times]
BARS = {"tokens": (0.9, 1.1), "experts": (-0.1, 0.1)}


@dataclass(frozen=True)
class Row:
    """One point: where on which axis, milliseconds, and the cost relative to the axis's first point."""

    axis: str
    at: float
    label: str
    ms: float
    relative: float


def main() -> None:
    """Measure every axis, print table and slopes, write JSON and plot when asked."""
    arguments = _parse()
    prepare(1)
    rows: list[Row] = []
    for axis in arguments.axes:
        if axis == "ranks":
            rows += _ranks(arguments)
        else:
            rows += _along(axis, AXES[axis](arguments), arguments)
    names = list(dict.fromkeys(row.axis for row in rows))
    slopes = {name: _slope([row for row in rows if row.axis == name]) for name in names}
    cells = [(row.axis, row.label, row.ms, row.relative) for row in rows]
    print(Table(("axis", "at", "ms", "relative"), cells, title="forward + backward, ms of one thread").to_text())
    for name, slope in slopes.items():
        low, high = BARS.get(name, (-math.inf, math.inf))
        note = f" ({low} to {high}: {'met' if low <= slope <= high else 'NOT met'})" if name in BARS else ""
        print(f"slope along {name}: {slope:.3f}{note}")
    write_report(arguments.json, arguments, rows=[asdict(row) for row in rows], slopes=slopes)
    if arguments.plot:
        _draw(rows, slopes, arguments.plot)


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--axes", nargs="+", choices=[*AXES, "ranks"], default=[*AXES, "ranks"])
    p.add_argument("--shape", choices=SHAPES, default="vit_s")
    p.add_argument("--images", type=int, default=2)
    p.add_argument("--points", type=int, default=5, help="on an axis, at most")
    p.add_argument("--repeats", type=int, default=5, help="after one that is not counted")
    p.add_argument("--max-ranks", type=int, default=2)
    p.add_argument("--json", type=Path, help="write the figures here too")
    p.add_argument("--plot", type=Path, help="draw the axes, both logarithmic")
    return p.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# Axes: (value, label, step) of each point


Points = list[tuple[float, str, Step]]


def _layer_step(shape: str, experts: Experts, images: float, tasks: int = TASKS) -> Step:
    case = Case(frozen_ffn(*SHAPES[shape]), experts)
    layer = ours(case).module
    if tasks != TASKS:
        layer = MoEFFN(case.base, num_experts=experts.count, k=experts.k, num_shared=experts.shared, rank=experts.rank,
                       num_tasks=tasks, seed=0)  # fmt: skip
        fill(layer.routed)
    x = torch.randn(tasks, round(images * TOKENS), case.dim, generator=torch.Generator().manual_seed(0))
    return partial(_step, layer, x)


def _step(layer: torch.nn.Module, x: torch.Tensor) -> Times:
    layer.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    watch = Watch()
    result = layer(leaf)
    watch.forward_done()
    torch.autograd.backward([result.output, result.aux_loss], [x, torch.ones(())])
    return watch.stop()


def _tokens(a: argparse.Namespace) -> Points:
    counts = [a.images * 2**i / 4 for i in range(a.points)]
    return [(n * TASKS * TOKENS, f"{n * TASKS * TOKENS:.0f} tokens", _layer_step(a.shape, DEFAULT, n)) for n in counts]


def _experts(a: argparse.Namespace) -> Points:
    return _by_experts(a, ("16/3/1/4", "32/6/2/2", "64/12/4/1"))


def _more_experts(a: argparse.Namespace) -> Points:
    return _by_experts(a, ("16/3/1/1", "32/6/2/1", "64/12/4/1", "128/24/8/1", "256/48/16/1"))


def _by_experts(a: argparse.Namespace, texts: Sequence[str]) -> Points:
    cases = [Experts.parse(text) for text in texts][: a.points]
    return [(case.count, str(case), _layer_step(a.shape, case, a.images)) for case in cases]


def _rank(a: argparse.Namespace) -> Points:
    cases = [DEFAULT._replace(rank=2**i) for i in range(a.points)]
    return [(case.rank, str(case), _layer_step(a.shape, case, a.images)) for case in cases]


def _tasks(a: argparse.Namespace) -> Points:
    counts = [1, 2, 3, 4, 5, 8][: a.points]
    return [(n, f"{n} tasks", _layer_step(a.shape, DEFAULT, a.images, n)) for n in counts]


def _size(a: argparse.Namespace) -> Points:
    sizes = [96, 128, 224, 320, 448][: a.points]
    return [(size, f"{size} pixels", _model_step(a.shape, size)) for size in sizes]


def _model_step(shape: str, size: int) -> Step:
    name = {"vit_s": "vit_small_patch16_224", "vit_b": "vit_base_patch16_224"}[shape]
    settings = build_settings({"data": {"size": size}, "model": {
        "backbone": name, "backbone_args": {"depth": 2}, "head": "linear"}})  # fmt: skip
    model = build_model(settings, select_tasks("scenes"), expert_layer="plain")
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))

    def step() -> Times:
        model.zero_grad(set_to_none=True)
        watch = Watch()
        output = model(images)
        watch.forward_done()
        (sum(logits.square().mean() for logits in output.predictions.values()) + output.aux_loss).backward()
        return watch.stop()

    return step


AXES: dict[str, Callable[[argparse.Namespace], Points]] = {
    "tokens": _tokens,
    "experts": _experts,
    "experts_of_rank_1": _more_experts,
    "rank": _rank,
    "tasks": _tasks,
    "image_size": _size,
}


def _along(axis: str, points: Points, arguments: argparse.Namespace) -> list[Row]:
    taken = interleaved({label: step for _, label, step in points}, arguments.repeats)
    ms = [1e3 * median(taken[label], "processor") for _, label, _ in points]
    return [Row(axis, at, label, each, each / ms[0]) for (at, label, _), each in zip(points, ms, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def _ranks(arguments: argparse.Namespace) -> list[Row]:
    counts = range(1, arguments.max_ranks + 1)
    ms = {count: on_ranks(count, _ms_of_rank, arguments) for count in counts}
    return [Row("ranks", count, f"{count} ranks", each, each / ms[1]) for count, each in ms.items()]


def _ms_of_rank(arguments: argparse.Namespace) -> float:
    """Milliseconds of a step, gradients averaged (collective)."""
    layer = ours(Case(frozen_ffn(*SHAPES[arguments.shape]), DEFAULT)).module
    x = torch.randn(TASKS, arguments.images * TOKENS, SHAPES[arguments.shape][0])

    def step() -> Times:
        collectives.barrier()
        watch = Watch()
        _step(layer, x)
        collectives.all_reduce_sum(torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None]))
        return watch.stop()

    return 1e3 * median(interleaved({"step": step}, arguments.repeats)["step"], "step")


# ---------------------------------------------------------------------------------------------------------------------
# Output


def _slope(rows: Sequence[Row]) -> float:
    if len(rows) < 2:
        return 0.0
    return float(np.polyfit(np.log([row.at for row in rows]), np.log([row.ms for row in rows]), 1)[0])


def _draw(rows: Sequence[Row], slopes: dict[str, float], path: Path) -> None:
    with drawing(path, panels=len(slopes)) as axes:
        for ax, (name, slope) in zip(axes, slopes.items(), strict=True):
            own = [row for row in rows if row.axis == name]
            at, ms = np.array([row.at for row in own]), np.array([row.ms for row in own])
            ax.loglog(at, ms, "o", base=2)
            middle = np.exp(np.log(ms).mean() - slope * np.log(at).mean())
            ax.loglog(at, middle * at**slope, "-", label=f"slope {slope:.2f}")
            ax.set_xticks(at, [f"{value:g}" for value in at], rotation=45)
            ax.minorticks_off()
            reach = 1.2 * max(at.max() / at.min(), ms.max() / ms.min()) ** 0.5  # both axes span the same factor
            ax.set_ylim((ms.min() * ms.max()) ** 0.5 / reach, (ms.min() * ms.max()) ** 0.5 * reach)
            ax.set(title=name, ylabel="ms")
            ax.legend(frameon=False)


if __name__ == "__main__":
    main()
