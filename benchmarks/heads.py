"""What each head costs in the training step, counted on meta tensors as ``roofline.py`` counts it: nothing runs.

    python benchmarks/heads.py [--shape vit_s] [--images 8] [--size 224] [--head-width 256] [--json out.json]

The step of ase_16_3_1_4 on five tasks: forward, losses, backward, AdamW. ``kernels``, ``GFLOP``, ``MB`` moved and
``least ms`` are of the whole step and, in the columns "heads", of what runs inside the heads and their backward pass;
``kept MB`` is what autograd keeps of one image, ``M trained`` the parameters of a head.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from _kernels import ACCELERATORS, by, total
from roofline import BACKBONES, GFLOP, MB, OURS, _count_step_side, _dtype, step_sides

from ase_dist.files import write_atomic
from ase_dist.planning.activations import measure_activations
from ase_dist.planning.flops import bare_model
from ase_dist.read_config import override_settings
from ase_dist.registries import HEADS
from ase_dist.tables import Table


def main() -> None:
    """Count every head, print a table, write JSON when asked."""
    arguments = _parse()
    rows = [_count(head, arguments) for head in arguments.heads]
    title = (
        f"step of {arguments.shape}, {arguments.images} images of {arguments.size} x five tasks, {arguments.dtype}, "
        f"heads of width {arguments.head_width}, counted"
    )
    print(Table(tuple(rows[0]), [tuple(row.values()) for row in rows], title=title).to_text())
    if arguments.json:
        report = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "rows": rows}
        write_atomic(arguments.json, json.dumps(report, indent=2) + "\n")


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    p.add_argument("--shape", choices=BACKBONES, default="vit_s")
    p.add_argument("--depth", type=int, help="blocks of the backbone; all of them where not given")
    p.add_argument("--images", type=int, default=8)
    p.add_argument("--size", type=int, default=224, help="side of the images")
    p.add_argument("--head-width", type=int, default=256)
    p.add_argument("--accelerator", choices=ACCELERATORS, default="h100_sxm")
    p.add_argument("--dtype", choices=("bfloat16", "tf32", "float32"), default="bfloat16")
    p.add_argument("--json", type=Path, help="write the figures here too")
    return p.parse_args()


def _count(head: str, arguments: argparse.Namespace) -> dict[str, Any]:
    given = argparse.Namespace(**{**vars(arguments), "head": head, "attention": "fused"})
    settings = override_settings(step_sides(arguments.shape, given)[OURS][0], {"model.head_width": given.head_width})
    dtype = _dtype(given)
    model = bare_model(settings).to(dtype)
    kernels = _count_step_side(model, given)
    accelerator, tf32 = ACCELERATORS[given.accelerator].sustained(compute=0.81, memory=0.9), given.dtype != "float32"
    whole = total(kernels, accelerator, tf32=tf32)
    own = by(lambda kernel: kernel.part, kernels, accelerator, tf32=tf32)["heads.*"]
    kept = measure_activations(settings, width=torch.finfo(dtype).bits // 8).kept("none")
    per_head = sum(p.numel() for p in model.heads.parameters()) / len(model.heads)
    return {
        "head": head,
        "kernels": whole.kernels,
        "GFLOP": whole.flops / GFLOP,
        "MB": whole.bytes / MB,
        "least ms": 1e3 * whole.seconds,
        "kernels, heads": own.kernels,
        "GFLOP, heads": own.flops / GFLOP,
        "least ms, heads": 1e3 * own.seconds,
        "kept MB": kept / MB,
        "M trained": per_head / 1e6,
    }


if __name__ == "__main__":
    main()
