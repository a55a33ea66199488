"""How plans are shown: tables, JSON, and a plot of the bytes that each dispatch sends."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from typing import Any

from ase_dist.errors import UserError
from ase_dist.overwriting import PNG_MARK
from ase_dist.planning.communication import OUTGROWS, crossover, dispatch_bytes
from ase_dist.planning.plan import Plan
from ase_dist.planning.sizes import BF16, ModelSizes
from ase_dist.tables import Cell, Table

DISPATCHES = ("gather", "all_to_all")
MB = 1e6
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, by group size
ASSUMPTIONS = (
    "Assumed: ring collectives; gradients travel in the weights' type; nothing overlaps, so step time = FLOPs / "
    "sustained FLOP/s + bytes sent / bandwidth (latency left out); routing is even; the optimiser in float32; "
    "activations are what autograd keeps of a micro-step, losses included; buffers and padding of ZeRO are not counted."
)


def report(sizes: ModelSizes, plans: Sequence[Plan], *, tokens: int, bandwidth: float, flops: float) -> str:
    """The tables of memory, bytes sent and time, and what they assume; ``tokens`` per rank and micro-step."""
    routed = sum(layer.routed * layer.expert_values for layer in sizes.layers)
    facts = (
        f"{'bf16' if sizes.width == BF16 else 'fp32'}, {tokens:,} tokens per rank and micro-step, "
        f"{bandwidth / 1e9:g} GB/s and {flops / 1e12:g} TFLOP/s per rank; "
        f"weights: {sizes.frozen:,} frozen, {sizes.dense:,} trained, {routed:,} of routed experts"
    )
    memory = [
        (
            p.ep_size,
            p.zero,
            p.parameters,
            p.trained,
            *(size / MB for size in (p.weights, p.gradients, p.optimizer, p.activations, p.memory)),
        )
        for p in plans
    ]
    has_balancing = any(p.wire_balancing for p in plans)

    def balanced(p: Plan) -> list[float]:
        return [p.wire_balancing] if has_balancing else []

    wire: list[list[Cell]] = []
    for p in plans:
        moved = [p.wire_dispatch[name] / MB if name in p.wire_dispatch else None for name in DISPATCHES]
        times = [p.step_seconds[n] * 1e3 if n in p.step_seconds else None for n in ("local", *DISPATCHES)]
        data_parallel = [size / MB for size in (p.wire_dense, p.wire_replicas, *balanced(p))]
        wire.append([p.ep_size, p.zero, *data_parallel, *moved, p.auto, p.crossover, p.compute_seconds * 1e3, *times])
    titles = f"on each of {plans[0].world} ranks (MB)", "sent by each rank per optimiser step (MB), and its time (ms)"
    held = ("EP", "ZeRO", "parameters", "trained", "weights", "gradients", "master+moments", "activations", "sum")
    sent = (
        "EP",
        "ZeRO",
        "dense",
        "experts' replicas",
        *(["balancing"] if has_balancing else []),
        *DISPATCHES,
        "auto",
        "crossover tokens",
        "compute ms",
        *(f"step ms, {name}" for name in ("local", *DISPATCHES)),
    )
    tables = Table(held, memory, title=titles[0]), Table(sent, wire, title=titles[1])
    return "\n".join([facts, *(table.to_text() for table in (*tables, _collectives(plans))), ASSUMPTIONS, OUTGROWS])


def _collectives(plans: Sequence[Plan]) -> Table:
    """How many collectives of each kind a step has, for each plan, and how many bytes a rank sends in all of them."""
    names = dict.fromkeys((each.what, each.kind) for p in plans for each in p.collectives or ())
    counts = [{(each.what, each.kind): each.number for each in p.collectives or ()} for p in plans]
    lines: list[list[Cell]] = [
        [
            what,
            kind,
            *(
                None if p.collectives is None else count.get((what, kind), 0)
                for p, count in zip(plans, counts, strict=True)
            ),
        ]
        for what, kind in names
    ]
    sums = [None if p.collectives is None else sum(each.number for each in p.collectives) for p in plans]
    sent = [None if p.collectives is None else sum(each.sent for each in p.collectives) / MB for p in plans]
    lines += [["all", "", *sums], ["MB sent", "", *sent]]
    heads = ("for", "collective", *(f"EP {p.ep_size} ZeRO {p.zero}" for p in plans))
    return Table(
        heads, lines, title=f"collectives of an optimiser step on {plans[0].world} ranks, experts as auto says"
    )


def as_json(sizes: ModelSizes, plans: Sequence[Plan], **given: object) -> dict[str, Any]:
    """Everything as plain values: the arguments that were ``given``, the assumptions, the sizes, the plans."""
    rows = [{**asdict(p), "memory": p.memory} for p in plans]
    return {**given, "assumptions": ASSUMPTIONS, "sizes": asdict(sizes), "plans": rows}


def draw_crossover(sizes: ModelSizes, *, ep_sizes: Sequence[int], tokens: int) -> bytes:
    """A PNG: bytes per rank and micro-step against tokens per rank, both dispatches for each size above 1.

    A vertical line marks ``tokens``, those of the settings. Raises UserError where no size is above 1 or no layer has
    experts.
    """
    shown = sorted({size for size in ep_sizes if size > 1})
    if not shown or not sizes.layers:
        raise UserError("--plot: there is nothing to compare without an expert-parallel size above 1; give --ep 2,4")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    top = 4 * max(tokens, *(crossover(sizes.sharded(size)) or 0 for size in shown))
    counts = [top ** (i / 200) for i in range(201)]
    with rc_context({"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(7.0, 4.4), layout="constrained")  # without pyplot: no display, no global state
        ax = figure.subplots()
        for size, color in zip(shown, cycle(COLORS), strict=False):
            _draw_size(ax, sizes, size, counts, color)
        ax.axvline(tokens, color="#666666", linestyle=":", linewidth=1.2)
        ax.annotate(
            f"this run: {tokens:,}",
            (tokens, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            color="#666666",
        )
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="Tokens per rank (images x tasks x tokens)",
            ylabel="MB sent per rank and micro-step",
            title="Experts travel or tokens travel",
        )
        ax.grid(color="#e4e4e4", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.legend(loc="upper left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, metadata=dict([PNG_MARK]))
    return buffer.getvalue()


def _draw_size(ax: Any, sizes: ModelSizes, ep_size: int, counts: Sequence[float], color: str) -> None:
    """Both lines of one size; the crossing stands in the legend, since those of several sizes lie close together."""
    layers = sizes.sharded(ep_size)
    bytes_at = [dispatch_bytes(layers, tokens=count, forwards=sizes.forwards) for count in counts]
    meeting = crossover(layers)
    note = "" if meeting is None else f", less from {max(1, math.ceil(meeting))} tokens"
    for name, style, text in zip(DISPATCHES, ("--", "-"), (note, ""), strict=True):
        ax.plot(
            counts,
            [each[name] / MB for each in bytes_at],
            color=color,
            linestyle=style,
            linewidth=1.6,
            label=f"EP {ep_size}, {name}{text}",
        )
    if meeting is not None and meeting >= 1:
        height = dispatch_bytes(layers, tokens=meeting, forwards=sizes.forwards)["gather"] / MB
        ax.plot([meeting], [height], "o", color=color, markersize=6, zorder=3)
