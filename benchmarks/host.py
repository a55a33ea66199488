"""The host's time for a layer's forward and backward pass: what is left of it on tensors too small to cost anything.

    python benchmarks/host.py [--experts 16/3/1/4 64/12/4/1] [--json out.json]

Where an accelerator computes faster than Python launches its kernels, this is the layer's time. Measured on this
machine's CPU, one thread, with the forms of the products that accelerators get: modules, autograd and torch's
dispatcher are as there, a kernel's launch is not, since here it is a call.

Sides: the frozen FFN, plain LoRA as peft writes it, ours. All take turns; a time is the least of all repetitions, for
other work on the machine can only add to it. "operators" are those that torch dispatches, views among them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _timing import prepare, write_report
from peers.common import TASKS, Case, Experts, Side, frozen_ffn
from peers.plain import PlainLoRA, frozen, ours
from torch.utils._python_dispatch import TorchDispatchMode

from ase_dist.ops import modes
from ase_dist.tables import Table

TOKENS, WIDTH, HIDDEN = 4, 16, 64


@dataclass(frozen=True)
class Row:
    """One side: the least microseconds of a forward and a backward pass, and the operators that they dispatch."""

    experts: str
    side: str
    microseconds: float
    operators: int


def main() -> None:
    """Measure every side, print the table, write JSON when asked."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--experts", nargs="+", default=["16/3/1/4"], metavar="N/k/S/r")
    p.add_argument("--repeats", type=int, default=1000)
    p.add_argument("--json", type=Path, help="write the figures here too")
    arguments = p.parse_args()
    prepare(1)
    with mock.patch.object(modes, "stacks_products", lambda x: True):  # what is chosen on accelerators
        rows = [row for experts in arguments.experts for row in measure(experts, arguments.repeats)]
    cells = [(row.experts, row.side, f"{row.microseconds:.0f}", row.operators) for row in rows]
    columns = ("experts", "side", "least us", "operators")
    print(Table(columns, cells, title="host: forward and backward of one layer").to_text())
    write_report(arguments.json, arguments, rows=[asdict(row) for row in rows])


def measure(experts: str, repeats: int) -> list[Row]:
    """Every side of one layer."""
    case = Case(frozen_ffn(WIDTH, HIDDEN), Experts.parse(experts))
    lora, x = PlainLoRA(case.base, rank=case.experts.rank), torch.randn(TASKS, TOKENS, WIDTH)
    sides = {"frozen FFN": frozen(case), "plain LoRA": Side(lora, lambda x: (lora(x), None)), "ours": ours(case)}
    steps = {name: side.step(x) for name, side in sides.items()}
    least = dict.fromkeys(steps, float("inf"))
    for _ in range(repeats + 1):  # the first makes what is made once and is never the least
        for side, step in steps.items():
            began = time.perf_counter()
            step()
            least[side] = min(least[side], time.perf_counter() - began)
    rows = []
    for side, step in steps.items():
        with _Operators() as operators:
            step()
        rows.append(Row(experts, side, 1e6 * least[side], operators.count))
    return rows


class _Operators(TorchDispatchMode):
    """Counts what is dispatched."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    main()
