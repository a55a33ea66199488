"""A layer and a training step as an accelerator sees them, counted without one: kernels, bytes, FLOPs, least time.

    python benchmarks/roofline.py [--accelerator h100_sxm] [--dtype bfloat16] [--shapes vit_b] [--experts 16/3/1/4]
        [--only layer] [--operators 12] [--modules] [--json out.json] [--plot out.png]

Nothing is measured: operators are dispatched on meta tensors, which hold no data, and priced by the peaks of a data
sheet (``_kernels.py`` has the table and says how). The same on any machine and at any load.

The layer: forward + backward of its output on 8 images x 5 tasks x 197 tokens; the router losses' backward pass is in
the step. Sides, of the same frozen FFN:

- frozen FFN: the floor
- plain LoRA: one pair of rank 4 per linear, as peft writes it
- loop over experts, sorted products: the same experts, routers and statistics as ours, applied one expert after the
  other, or in grouped products over a copy of each token for each of its experts; routing is even
- ours

The step: the five-task model of ``ase_16_3_1_4``, forward, losses, backward, and AdamW by torch's multi-tensor
operators over float32 weights, against the same with its experts applied otherwise, with plain LoRA in their place
(``mtl_vit_lora``), and without either. Left out: communication, DeepSpeed's own buffers, gradient clipping.

Ratios are over the frozen FFN for a layer and over plain LoRA for a step. "launches ms" is kernels x --launch-us: what
the host needs to launch them one by one, which a graph or a compiler saves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _kernels import ACCELERATORS, Accelerator, Cost, Kernel, KernelCount, by, counting, total
from _parts import PartTracker
from _timing import drawing, write_report
from peers.common import Case, Experts, Side
from peers.plain import PlainLoRA, apply_experts, by_loop, by_sorted_products, frozen, ours
from timm.layers import Mlp
from torch import Tensor, nn

from ase_dist.baselines import apply_baseline
from ase_dist.config import Settings
from ase_dist.models import MultiTaskModel
from ase_dist.moe.router import TaskRouter
from ase_dist.planning.flops import bare_model
from ase_dist.read_config import build_settings, override_settings
from ase_dist.registries import HEADS
from ase_dist.tables import Table
from ase_dist.tasks import Task, select_tasks
from ase_dist.training.loop import losses

SHAPES = {"vit_s": (384, 1536), "vit_b": (768, 3072), "vit_l": (1024, 4096)}
BACKBONES = {
    "vit_s": "vit_small_patch16_224",
    "vit_b": "vit_base_patch16_224",
    "vit_l": "vit_large_patch16_224",
    "tiny": "vit_tiny_patch16_224",
}
EXPERTS = ("16/3/1/4", "64/12/4/1", "128/24/8/1", "64/4/0/16", "256/4/0/16")
TASKS, TOKENS = 5, 197
FLOOR, LORA, LOOP, SORTED, OURS = "frozen FFN", "plain LoRA", "loop over experts", "sorted products", "ours"
ROW, LORA_ROW, OPTIMISER = "ase_16_3_1_4", "mtl_vit_lora", "optimiser"
MB, GFLOP = 1e6, 1e9


@dataclass(frozen=True)
class Counted:
    """One side of one case: everything that it dispatches."""

    what: str
    shape: str
    experts: str
    side: str
    kernels: list[Kernel]


def main() -> None:
    """Count every case, print tables, write JSON and plot when asked."""
    arguments = _parse()
    accelerator = ACCELERATORS[arguments.accelerator]
    compute, memory = arguments.sustained
    accelerator = accelerator.sustained(compute=compute, memory=memory)
    cases: list[list[Counted]] = []
    if "layer" in arguments.only:
        cases += [count_layer(shape, text, arguments) for shape in arguments.shapes for text in arguments.experts]
    if "step" in arguments.only:
        cases += [count_step(shape, arguments) for shape in arguments.step_shapes]
    print(f"COUNTED, not measured: {_basis(accelerator, arguments)}\n")
    for sides in cases:
        _print(sides, accelerator, arguments)
    if arguments.json:
        rows = [_as_json(side, sides, accelerator, arguments) for sides in cases for side in sides]
        basis = _basis(accelerator, arguments)
        write_report(arguments.json, arguments, counted=True, accelerator=asdict(accelerator), basis=basis, rows=rows)
    if arguments.plot:
        _draw(cases, accelerator, arguments)


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--accelerator", choices=ACCELERATORS, default="h100_sxm")
    p.add_argument(
        "--dtype",
        choices=("bfloat16", "tf32", "float32"),
        default="bfloat16",
        help="tf32: float32 tensors with products in TF32, in which the float32 products among bfloat16 are taken too",
    )
    p.add_argument(
        "--sustained",
        nargs=2,
        type=float,
        default=(0.81, 0.9),
        metavar=("COMPUTE", "MEMORY"),
        help="fractions of the data sheet's peaks; 1 1 takes the peaks themselves",
    )
    p.add_argument("--only", nargs="+", choices=("layer", "step"), default=["layer", "step"])
    p.add_argument("--shapes", nargs="+", choices=SHAPES, default=["vit_s", "vit_b", "vit_l"], help="of the layer")
    p.add_argument("--experts", nargs="+", default=list(EXPERTS), metavar="N/k/S/r", help="of the layer")
    p.add_argument("--step-shapes", nargs="+", choices=BACKBONES, default=["vit_b"])
    p.add_argument("--images", type=int, default=8)
    p.add_argument("--tokens", type=int, default=TOKENS, help="of one image and task, in the layer")
    p.add_argument("--size", type=int, default=224, help="side of the images, in the step")
    p.add_argument("--depth", type=int, help="blocks of the backbone, in the step; all of them where not given")
    p.add_argument("--head", default="pup", choices=list(HEADS), help="of the step's model")
    p.add_argument(
        "--attention",
        choices=("fused", "products"),
        default="fused",
        help="one operator each way, or what a meta tensor's attention is made of",
    )
    p.add_argument("--launch-us", type=float, default=5.0, help="microseconds to launch a kernel")
    p.add_argument("--operators", type=int, default=0, metavar="COUNT", help="list the dearest operators of each side")
    p.add_argument("--modules", action="store_true", help="list the modules of each side")
    p.add_argument("--json", type=Path, help="write the figures here too, by operator and by module")
    p.add_argument("--plot", type=Path, help="draw the least time of each side")
    return p.parse_args()


def _in_tf32(arguments: argparse.Namespace) -> bool:
    return bool(arguments.dtype != "float32")


def _dtype(arguments: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# The layer


def count_layer(shape: str, experts: str, arguments: argparse.Namespace) -> list[Counted]:
    """Every side of one layer, forward + backward."""
    dtype, (width, hidden) = _dtype(arguments), SHAPES[shape]
    with torch.device("meta"):
        case = Case(Mlp(width, hidden).to(dtype).requires_grad_(False), Experts.parse(experts))
        lora = PlainLoRA(case.base, rank=4)
        sides = {FLOOR: frozen(case), LORA: Side(lora, lambda x: (lora(x), None))}
        sides |= {name: ours(case) for name in (LOOP, SORTED, OURS)}
        apply_experts(sides[LOOP].module, by_loop)
        apply_experts(sides[SORTED].module, by_sorted_products)
        x = torch.empty(TASKS, arguments.images * arguments.tokens, width, dtype=dtype)
        return [
            Counted("layer", shape, experts, name, _count_layer_side(side, x, arguments))
            for name, side in sides.items()
        ]


def _count_layer_side(side: Side, x: Tensor, arguments: argparse.Namespace) -> list[Kernel]:
    leaf, direction = x.clone().requires_grad_(), x.clone()
    with _tracked(side.module, _layer_part, arguments) as (_, count):
        y, _ = side.forward(leaf)
        y.backward(direction)
    return count.kernels


def _layer_part(name: str, module: nn.Module) -> str | None:
    return "router" if isinstance(module, TaskRouter) else "FFN" if not name else None


@contextmanager
def _tracked(module: nn.Module, part_of: Callable[[str, nn.Module], str | None], arguments: argparse.Namespace) -> Any:
    parts = PartTracker(module, part_of)
    try:
        with counting(parts, fuse_attention=arguments.attention == "fused") as count:
            yield parts, count
    finally:
        parts.close()


# ---------------------------------------------------------------------------------------------------------------------
# The step


def count_step(shape: str, arguments: argparse.Namespace) -> list[Counted]:
    """Every side of a training step of the five-task model."""
    rows = []
    for name, (settings, adapt) in step_sides(shape, arguments).items():
        model = bare_model(settings).to(_dtype(arguments))
        if adapt is not None:
            apply_experts(model, adapt)
        rows.append(Counted("step", shape, "16/3/1/4", name, _count_step_side(model, arguments)))
    return rows


def step_sides(shape: str, arguments: argparse.Namespace) -> dict[str, tuple[Settings, Any]]:
    """The settings of each side, and how it applies the experts where that is not our way."""
    model = {
        "backbone": BACKBONES[shape],
        "backbone_args": {"depth": arguments.depth} if arguments.depth else {},
        "pretrained": "none",
        "head": arguments.head,
    }
    settings = build_settings({"data": {"size": arguments.size}, "model": model})
    experts, lora = _baseline(settings, ROW), _baseline(settings, LORA_ROW)
    return {
        FLOOR: (override_settings(lora, ["model.lora_rank=0"]), None),
        LORA: (lora, None),
        LOOP: (experts, by_loop),
        SORTED: (experts, by_sorted_products),
        OURS: (experts, None),
    }


def _baseline(settings: Settings, name: str) -> Settings:
    tree: dict[str, Any] = settings.model_dump()
    apply_baseline(tree, name, lr=settings.train.lr, output=settings.output)
    return build_settings(tree)


def _count_step_side(model: MultiTaskModel, arguments: argparse.Namespace) -> list[Kernel]:
    tasks, B, size = select_tasks("scenes"), arguments.images, arguments.size
    with torch.device("meta"):
        images = torch.empty(B, 3, size, size)
        labels = {task.name: _label(task, B, size) for task in tasks}

        def step() -> None:
            counts = losses.label_counts(labels, tasks)
            output = model(images)
            by_task = losses.task_losses(output.predictions, labels, tasks, counts)
            (losses.weighted_sum(by_task, tasks, {}) + output.aux_loss).backward()

        for _ in range(2):  # the second counts: what is made once is not of every step
            model.zero_grad(set_to_none=True)
            with _tracked(model, _step_part, arguments) as (parts, count):
                parts.outside = parts.unowned = "loss"
                step()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return count.kernels + [kernel._replace(part=OPTIMISER) for kernel in _count_optimizer(trained)]


def _label(task: Task, B: int, size: int) -> Tensor:
    if task.kind in {"normals", "depth"}:
        return torch.empty(B, task.channels, size, size)
    return torch.empty(B, size, size, dtype=torch.uint8)


def _count_optimizer(trained: Sequence[nn.Parameter]) -> list[Kernel]:
    """A later step of AdamW over float32 copies of the weights."""
    weights = [nn.Parameter(torch.empty_like(weight, dtype=torch.float32)) for weight in trained]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    optimizer = torch.optim.AdamW(weights, lr=1e-4, foreach=True)
    optimizer.step()
    with KernelCount() as count:
        optimizer.step()
    return count.kernels


def _step_part(name: str, module: nn.Module) -> str | None:
    """The module's own name with * for numbers and tasks: "blocks.*.attn"."""
    parts = name.split(".")
    if not name:
        return "the rest"
    if isinstance(module, TaskRouter):
        return "blocks.*.mlp.router"
    if len(parts) == 3 and parts[0] == "blocks":
        return f"blocks.*.{parts[2]}"
    if len(parts) == 2 and parts[0] == "heads":
        return "heads.*"
    return name if name in {"stem", "norm", "task_embedding"} else None


# ---------------------------------------------------------------------------------------------------------------------
# Output


def _basis(accelerator: Accelerator, arguments: argparse.Namespace) -> str:
    peak = getattr(accelerator, arguments.dtype)
    compute, memory = arguments.sustained
    sheet = f"{compute:g} and {memory:g} of the peaks of the {accelerator.source}"
    return (
        f"{accelerator.name}, {arguments.dtype} at {peak / 1e12:.4g} TFLOP/s dense, {accelerator.bandwidth / 1e12:.4g} "
        f"TB/s ({sheet}); attention "
        f"{'as one fused kernel each way' if arguments.attention == 'fused' else 'as products and a softmax'}"
    )


def _costs(sides: Sequence[Counted], accelerator: Accelerator, arguments: argparse.Namespace) -> dict[str, Cost]:
    return {side.side: total(side.kernels, accelerator, tf32=_in_tf32(arguments)) for side in sides}


def _print(sides: Sequence[Counted], accelerator: Accelerator, arguments: argparse.Namespace) -> None:
    first = sides[0]
    costs = _costs(sides, accelerator, arguments)
    base = costs[FLOOR if first.what == "layer" else LORA]
    columns = ("side", "time ratio", "kernel ratio", "kernels", "MB", "GFLOP", "least ms", "launches ms")
    cells = []
    for name, c in costs.items():
        ratios = c.seconds / base.seconds, c.kernels / base.kernels
        launches = 1e-3 * c.kernels * arguments.launch_us
        cells.append((name, *ratios, c.kernels, c.bytes / MB, c.flops / GFLOP, 1e3 * c.seconds, launches))
    tokens = f"{arguments.images} images x {TASKS} tasks"
    title = f"{first.what}, {first.shape}, {first.experts}, {tokens}, {arguments.dtype}, counted"
    print(Table(columns, cells, title=title).to_text())
    for side in sides:
        for wanted, key, heading in (
            (arguments.operators, lambda kernel: kernel.operator, "operator"),
            (len(side.kernels) if arguments.modules else 0, lambda kernel: kernel.part, "module"),
        ):
            groups = by(key, side.kernels, accelerator, tf32=_in_tf32(arguments))
            lines = [(name, c.kernels, c.bytes / MB, c.flops / GFLOP, 1e3 * c.seconds) for name, c in groups.items()]
            if wanted:
                table = Table((heading, "kernels", "MB", "GFLOP", "least ms"), lines[:wanted], title=side.side)
                print(table.to_text())
    print()


def _as_json(
    side: Counted, sides: Sequence[Counted], accelerator: Accelerator, arguments: argparse.Namespace
) -> dict[str, Any]:
    costs, tf32 = _costs(sides, accelerator, arguments), _in_tf32(arguments)
    base = costs[FLOOR if side.what == "layer" else LORA]
    own = costs[side.side]
    return {
        "what": side.what,
        "shape": side.shape,
        "experts": side.experts,
        "side": side.side,
        **asdict(own),
        "time_ratio": own.seconds / base.seconds,
        "kernel_ratio": own.kernels / base.kernels,
        "operators": {k: asdict(c) for k, c in by(lambda e: e.operator, side.kernels, accelerator, tf32=tf32).items()},
        "modules": {k: asdict(c) for k, c in by(lambda e: e.part, side.kernels, accelerator, tf32=tf32).items()},
    }


def _draw(cases: Sequence[Sequence[Counted]], accelerator: Accelerator, arguments: argparse.Namespace) -> None:
    """A bar per side, its modules stacked."""
    with drawing(arguments.plot, panels=len(cases), height=2.8) as axes:
        for ax, sides in zip(axes, cases, strict=True):
            groups = [
                by(lambda kernel: kernel.part, side.kernels, accelerator, tf32=_in_tf32(arguments)) for side in sides
            ]
            left = [0.0] * len(sides)
            for part in dict.fromkeys(name for group in groups for name in group):
                widths = [1e3 * group[part].seconds if part in group else 0.0 for group in groups]
                ax.barh([side.side for side in sides], widths, left=left, label=part)
                left = [start + width for start, width in zip(left, widths, strict=True)]
            ax.invert_yaxis()
            first = sides[0]
            ax.set(title=f"{first.what}, {first.shape}, {first.experts}", xlabel="least ms, counted")
            ax.legend(frameon=False, fontsize=6)


if __name__ == "__main__":
    main()
