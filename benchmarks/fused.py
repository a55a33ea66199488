"""How many kernels a layer and a whole block are once torch.compile has fused them, against the same run eagerly.

    python benchmarks/fused.py [--shapes vit_s vit_b] [--experts 16/3/1/4 64/12/4/1] [--json out.json]

Counted, not measured. Inductor writes its code for this machine's CPU, with the forms of the products that accelerators
get; a fused loop, a library's product and any other call of the written code are a kernel each, forward and backward.
Which operations are fused is decided above the device, so a GPU's code has about as many; it was not compiled for one.
Eager is what ``_kernels.py`` counts of the same call. Every program is one graph (``fullgraph=True``).

Sides: the frozen FFN, plain LoRA as peft writes it, ours, and a block of attention with LoRA and either FFN.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _kernels import counting
from _timing import write_report
from peers.common import Case, Experts, frozen_ffn
from peers.plain import PlainLoRA, ours
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from ase_dist.models.blocks import TaskBlock
from ase_dist.models.lora import add_lora
from ase_dist.ops import modes
from ase_dist.tables import Table

SHAPES = {"vit_s": (384, 6), "vit_b": (768, 12)}  # width and attention heads
TASKS = 5
CALL = re.compile(
    r"^\s*(?:\w+ = )?(?:cpp_fused_\w+|extern_kernels\.\w+|torch\.ops\.(?!inductor)[\w.]+)\(", re.MULTILINE
)


@dataclass(frozen=True)
class Row:
    """Kernels of one side, forward and backward together."""

    shape: str
    experts: str
    side: str
    eager: int
    fused: int


def main() -> None:
    """Count every side, print the table, write JSON when asked."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", choices=SHAPES, default=["vit_b"])
    p.add_argument("--experts", nargs="+", default=["16/3/1/4"], metavar="N/k/S/r")
    p.add_argument("--tokens", type=int, default=197, help="of an image and task")
    p.add_argument("--json", type=Path, help="write the figures here too")
    arguments = p.parse_args()
    rows: list[Row] = []
    with mock.patch.object(modes, "stacks_products", lambda x: True):  # what is chosen on accelerators
        for shape in arguments.shapes:
            for experts in arguments.experts:
                rows += count(shape, experts, tokens=arguments.tokens)
    cells = [(row.shape, row.experts, row.side, row.eager, row.fused, f"{row.eager / row.fused:.1f}") for row in rows]
    columns = ("shape", "experts", "side", "kernels, eager", "kernels, compiled", "fewer by")
    print(Table(columns, cells, title=f"COUNTED, not measured: forward and backward, {TASKS} tasks").to_text())
    write_report(arguments.json, arguments, rows=[asdict(row) for row in rows])


def count(shape: str, experts: str, *, tokens: int) -> list[Row]:
    """Every side of one shape."""
    width, heads = SHAPES[shape]
    case = Case(frozen_ffn(width, 4 * width), Experts.parse(experts))
    lora, layer = PlainLoRA(case.base, rank=case.experts.rank), ours(case).module
    sides: dict[str, nn.Module] = {"frozen FFN": case.base, "plain LoRA": lora, "ours": layer}
    for name in ("plain LoRA", "ours"):
        block = Block(width, heads, qkv_bias=True)
        add_lora(block.attn, rank=4, alpha=None, seed=0)
        block.mlp = lora
        sides[f"block, {name}"] = TaskBlock(block, moe=layer if name == "ours" else None)
    x = torch.randn(TASKS, 1, tokens, width)
    return [Row(shape, experts, name, _eager(side, x), _fused(side, x)) for name, side in sides.items()]


def _step(side: Callable[[Tensor], Any], x: Tensor, direction: Tensor) -> None:
    """Forward and backward of the output alone."""
    output = side(x)
    output = output if isinstance(output, Tensor) else output[0]
    output.backward(direction)


def _eager(side: nn.Module, x: Tensor) -> int:
    side, x = copy.deepcopy(side).to("meta"), x.to("meta")
    for _ in range(2):  # what is made once is not counted
        side.zero_grad(set_to_none=True)
        leaf, direction = x.clone().requires_grad_(), x.clone()
        with counting() as count:
            _step(side, leaf, direction)
    return len(count.kernels)


def _fused(side: nn.Module, x: Tensor) -> int:
    """The calls in the code that inductor writes for the forward and the backward pass."""
    torch._dynamo.reset()
    side.zero_grad(set_to_none=True)
    compiled = torch.compile(side, fullgraph=True)
    _, codes = run_and_get_code(_step, compiled, x.clone().requires_grad_(), x.clone())
    assert len(codes) == 2, f"{len(codes)} programs, wanted one forward and one backward"
    return sum(len(CALL.findall(code[code.index("def call(") :])) for code in codes)


if __name__ == "__main__":
    main()
