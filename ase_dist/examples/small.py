"""A run of two steps on a few generated scenes, which the pages on adding something add it to. No page itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ase_dist.commands import train
from ase_dist.training.record.run_folder import RunFolder

SMALL = (
    "data.scenes.train_images=6",
    "data.scenes.val_images=3",
    "data.scenes.size=40",
    "data.size=32",
    "model.backbone=vit_tiny_patch16_224",
    "model.backbone_args={embed_dim: 24, depth: 2, num_heads: 2}",
    "model.pretrained=none",
    "model.head=linear",
    "model.moe.num_experts=6",
    "train.max_steps=2",
    "train.warmup_steps=0",
    "train.batch_size=3",
    "train.threads=1",
    "eval.at_start=false",
    "eval.pictures=1",
    "monitor.tensorboard=false",
)


def run(*settings: str, prepare: Callable[[Path], None] | None = None) -> dict[str, Any]:
    """The summary of a small run with ``settings`` on top; ``prepare`` is given the folder that data.root names."""
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder) / "data", Path(folder) / "run"
        data.mkdir()
        if prepare is not None:
            prepare(data)
        code = train.main([*SMALL, f"data.root={data}", f"output={output}", *settings])
        if code:
            raise SystemExit(code)
        summary: dict[str, Any] = RunFolder(output).read_summary()
    for task, metrics in summary["metrics"].items():
        print(f"{task:12}", ", ".join(f"{name} {value:.3g}" for name, value in metrics.items() if "/" not in name))
    return summary
