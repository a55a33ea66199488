"""One feed-forward layer with adaptive shared experts against its frozen FFN, other formulations and other libraries.

    python benchmarks/layer.py [--shapes vit_b] [--experts 16/3/1/4 64/12/4/1] [--json out.json] [--plot out.png]

Per ViT shape and N/k/S/r, forward and forward + backward on the same tokens (5 tasks x images x 197), with the same
allocator settings and threads for all; sides take turns in every repetition. A time is a median; a ratio is the median
over repetitions of the ratio to the frozen FFN in the same repetition, by the wall and by the processor's clock, which
other work on the machine disturbs less. Layers that hold one-hot tensors of tokens x experts x capacity, or a copy of
the tokens per expert, are compared at --few-images.
A library that is not installed, or that cannot run the case, is named with the reason.

Memory beyond the frozen FFN: the peak of torch's allocator over forward + backward, and the bytes kept for the backward
pass, the layer's own input apart (a normalisation made it, and may or may not need it itself). Both are exact counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from _timing import (
    MB,
    Times,
    Watch,
    drawing,
    interleaved,
    median,
    peak_bytes,
    prepare,
    ratio,
    saved_bytes,
    write_report,
)
from peers.common import SHAPES, TASKS, Case, Experts, Side, UnavailableError, frozen_ffn
from peers.libraries import PEERS, PLAIN_LORA
from peers.plain import frozen, index_loop, ours
from torch import Tensor, nn

from ase_dist.planning.flops import FlopCounter
from ase_dist.tables import Table

FLOOR, OURS, LOOP = "frozen FFN", "ours", "loop over experts"
BARS = {"16/3/1/4": (1.25, 1.7), "32/6/2/2": (1.25, 2.0), "64/12/4/1": (1.25, 2.8), "128/24/8/1": (1.4, None)}


@dataclass(frozen=True)
class Row:
    """One line: milliseconds, ratios to the frozen FFN, memory beyond it in MB, and GFLOP forward and in all."""

    shape: str
    experts: str
    tokens: int
    side: str
    forward_ms: float
    step_ms: float
    forward_ratio: float
    step_ratio: float
    processor_ratio: float
    peak_extra: float
    peak_share: float
    saved_extra: float
    saved_share: float
    forward_gflop: float
    step_gflop: float


def main() -> None:
    """Measure every case, print table, bars and what was skipped, write JSON and plot when asked."""
    arguments = _parse()
    prepare(arguments.threads)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    for shape in arguments.shapes:
        for text in arguments.experts:
            case = Case(frozen_ffn(*SHAPES[shape], getattr(torch, arguments.dtype)), Experts.parse(text))
            for images, few_tokens in ((arguments.images, False), (arguments.few_images, True)):
                sides = _sides(case, few_tokens, arguments, skipped)
                if few_tokens and len(sides) == 2:
                    continue
                found = _measure(shape, case, sides, images, arguments)
                rows += found
                _print(found, arguments)
                write_report(arguments.json, arguments, rows=[asdict(row) for row in rows], skipped=skipped)
    for name, reason in skipped.items():
        print(f"skipped: {name}: {reason}")
    if arguments.plot:
        _draw(rows, arguments.plot)


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    p.add_argument("--experts", nargs="+", default=list(BARS), metavar="N/k/S/r")
    p.add_argument("--images", type=int, default=8)
    p.add_argument("--few-images", type=int, default=1, help="for layers whose memory allows no more")
    p.add_argument("--tokens", type=int, default=197, help="of one image and task")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--repeats", type=int, default=5, help="after one that is not counted")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--without-libraries", action="store_true", help="only the sides that need none")
    p.add_argument("--leave-out", nargs="+", default=[], metavar="SIDE", help="such as what needs too much memory here")
    p.add_argument("--json", type=Path, help="write the figures here too")
    p.add_argument("--plot", type=Path, help="draw the ratios to the frozen FFN")
    return p.parse_args()


def _sides(case: Case, few_tokens: bool, arguments: argparse.Namespace, skipped: dict[str, str]) -> dict[str, Side]:
    """The sides that are compared on as many tokens; those that cannot be go into ``skipped`` with the reason."""
    sides = {FLOOR: frozen(case), OURS: ours(case)}
    if not few_tokens:
        sides[LOOP] = index_loop(case)
    for peer in (PLAIN_LORA, *(() if arguments.without_libraries else PEERS)):
        if peer.few_tokens == few_tokens and peer.name not in arguments.leave_out:
            try:
                sides[peer.name] = peer.side(case)
            except UnavailableError as reason:
                skipped[f"{peer.name}, {case.experts}"] = str(reason)
    for side in sides.values():
        side.module.to(case.base.fc1.weight.dtype)
    return {name: side for name, side in sides.items() if name not in arguments.leave_out}


def _measure(shape: str, case: Case, sides: dict[str, Side], images: int, arguments: argparse.Namespace) -> list[Row]:
    x, direction = _tokens(case, images * arguments.tokens)
    if LOOP in sides:
        _check_same_function(sides[OURS], sides[LOOP], x, direction)
    taken = interleaved({name: partial(_step, side, x, direction) for name, side in sides.items()}, arguments.repeats)
    costs = {name: _cost(side, case.base, x, direction) for name, side in sides.items()}
    return [_row(shape, case, x, name, taken, costs) for name in sides]


def _tokens(case: Case, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (TASKS, length, case.dim)
    dtype = case.base.fc1.weight.dtype
    x, direction = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return x, direction


def _step(side: Side, x: Tensor, direction: Tensor) -> Times:
    side.module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    watch = Watch()
    y, loss = side.forward(x)
    watch.forward_done()
    _backward(y, loss, direction)
    return watch.stop()


def _backward(y: Tensor, loss: Tensor | None, direction: Tensor) -> None:
    if loss is None:
        torch.autograd.backward([y], [direction])
    else:
        torch.autograd.backward([y, loss], [direction, torch.ones_like(loss)])


def _check_same_function(one: Side, other: Side, x: Tensor, direction: Tensor) -> None:
    """The loop computes what ours does, and the same gradient of its input."""
    found = []
    for side in (one, other):
        leaf = x[:, :64].clone().requires_grad_()
        y, _ = side.forward(leaf)
        found.append((y.detach(), torch.autograd.grad(y, leaf, direction[:, :64])[0]))
    for mine, theirs in zip(*found, strict=True):
        exact = x.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=1e-3 if exact else 0.1, atol=1e-3 if exact else 0.1)


@dataclass(frozen=True)
class _Cost:
    """Exact counts of one step."""

    peak: int
    saved: int
    forward_flops: float
    step_flops: float


def _cost(side: Side, base: nn.Module, x: Tensor, direction: Tensor) -> _Cost:
    peak = peak_bytes(partial(_step, side, x, direction))
    leaf = x.clone().requires_grad_()
    weights = [*side.module.parameters(), *base.parameters()]
    saved = saved_bytes(lambda: side.forward(leaf), inputs=[leaf], weights=weights)
    with FlopCounter() as forward:
        y, loss = side.forward(leaf)
    with FlopCounter() as backward:
        _backward(y, loss, direction)
    return _Cost(peak, saved.rest, forward.total, forward.total + backward.total)


def _row(shape: str, case: Case, x: Tensor, name: str, taken: dict[str, list[Times]], costs: dict[str, _Cost]) -> Row:
    times, floor, cost, least = taken[name], taken[FLOOR], costs[name], costs[FLOOR]
    return Row(
        shape, str(case.experts), x.shape[0] * x.shape[1], name,
        1e3 * median(times, "forward"), 1e3 * median(times, "step"),
        ratio(times, floor, "forward"), ratio(times, floor, "step"), ratio(times, floor, "processor"),
        (cost.peak - least.peak) / MB, cost.peak / least.peak - 1,
        (cost.saved - least.saved) / MB, cost.saved / least.saved - 1,
        cost.forward_flops / 1e9, cost.step_flops / 1e9,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Output


def _print(rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    """One case as soon as it is measured, and what was promised for it."""
    columns = ("side", "forward ms", "fwd+bwd ms", "fwd ratio", "fwd+bwd ratio", "processor ratio", "ours is faster",
               "peak MB more", "%", "kept MB more", "%", "GFLOP fwd", "GFLOP")  # fmt: skip
    mine = next(row for row in rows if row.side == OURS)
    cells = [
        (r.side, r.forward_ms, r.step_ms, r.forward_ratio, r.step_ratio, r.processor_ratio,
         r.step_ratio / mine.step_ratio, r.peak_extra, 100 * r.peak_share, r.saved_extra, 100 * r.saved_share,
         r.forward_gflop, r.step_gflop)
        for r in rows
    ]  # fmt: skip
    title = f"{mine.shape}, {mine.experts}, {mine.tokens} tokens, {arguments.dtype}, {arguments.threads} threads"
    print(Table(columns, cells, title=title).to_text())
    print(*_verdicts(mine, {row.side: row for row in rows}), sep="\n", end="\n\n", flush=True)


def _verdicts(mine: Row, sides: dict[str, Row]) -> list[str]:
    """What was promised for this case against what was measured, by the wall's clock and the processor's."""
    if mine.experts not in BARS:
        return []
    most, faster = BARS[mine.experts]
    lines = [_verdict("of the frozen FFN", mine.step_ratio, mine.processor_ratio, most=most)]
    for name, least in {LOOP: faster, "DeepSpeed MoE": 3.0, "MoE-PEFT MoLA": 1.8}.items():
        if name in sides and least:
            gains = (sides[name].step_ratio / mine.step_ratio, sides[name].processor_ratio / mine.processor_ratio)
            lines.append(_verdict(f"times faster than {name}", *gains, least=least))
    peak = 100 * mine.peak_share
    return [*lines, _verdict("% more memory at the peak", peak, peak, most=15.0)]


def _verdict(what: str, wall: float, processor: float, *, least: float | None = None, most: float | None = None) -> str:
    wanted = f"at least {least}" if least is not None else f"at most {most}"
    is_met = all((least is None or value >= least) and (most is None or value <= most) for value in (wall, processor))
    values = f"{wall:.3g}" if wall == processor else f"{wall:.3g} ({processor:.3g} by the processor's clock)"
    return f"  {values} {what}: {wanted}, {'met' if is_met else 'NOT met'}"


def _draw(rows: Sequence[Row], path: Path) -> None:
    shapes = list(dict.fromkeys(row.shape for row in rows))
    with drawing(path, panels=len(shapes)) as axes:
        for ax, shape in zip(axes, shapes, strict=True):
            own = [row for row in rows if row.shape == shape and row.side != FLOOR]
            cases = list(dict.fromkeys(row.experts for row in own))
            for side in dict.fromkeys(row.side for row in own):
                most = {row.experts: max(r.tokens for r in own if r.side == side and r.experts == row.experts)
                        for row in own if row.side == side}  # fmt: skip
                points = [(cases.index(row.experts), row.step_ratio) for row in own
                          if row.side == side and row.tokens == most[row.experts]]  # fmt: skip
                ax.plot(*zip(*sorted(points), strict=True), marker="o", label=side)
            ax.axhline(1.0, color="#888888", linewidth=0.8)
            ax.set_xticks(range(len(cases)), cases)
            ax.set(yscale="log", ylim=(0.5, 30), title=shape, xlabel="N/k/S/r",
                   ylabel="forward + backward over the frozen FFN's")  # fmt: skip
            ax.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
            ax.minorticks_off()
        axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    main()
