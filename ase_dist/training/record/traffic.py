"""Bytes that expert parallelism sends in this run: those of both kinds of dispatch, and which one is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ase_dist.models import MultiTaskModel, MultiTaskViT
from ase_dist.moe import MoEFFN


def dispatch_summary(model: MultiTaskModel, *, images: int) -> dict[str, Any]:
    """Bytes that a rank sends per micro-step, over all layers with experts, for ``images`` on each rank.

    ``gather_bytes`` are exact; ``all_to_all_bytes`` expect tokens to choose among experts evenly. Empty where no
    experts are shared between ranks.
    """
    layers = [module for module in model.modules() if isinstance(module, MoEFFN) and module.shard.count > 1]
    if not layers:
        return {}
    tokens = images * len(model.task_names) * tokens_per_image(model)
    shapes = [layer.layer_shape() for layer in layers]
    return {
        "ep_size": shapes[0].ranks,
        "layers": len(layers),
        "tokens_per_rank": tokens,
        "gather_bytes": sum(shape.gather_bytes() for shape in shapes),
        "all_to_all_bytes": round(sum(shape.all_to_all_bytes(shape.expected_rows(tokens)) for shape in shapes)),
        "crossover_tokens": shapes[0].crossover(),
        "dispatch": [layer.dispatch for layer in layers],
    }


def dispatch_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary as rows of the start-up table."""
    return [
        ("tokens per rank and micro-step", f"{summary['tokens_per_rank']:,}"),
        ("sent if experts travel (gather)", f"{summary['gather_bytes'] / 1e6:.2f} MB"),
        ("sent if tokens travel (all_to_all)", f"{summary['all_to_all_bytes'] / 1e6:.2f} MB"),
        ("experts travel cheaper from", f"{summary['crossover_tokens']:.0f} tokens per rank"),
        ("used", ", ".join(sorted(set(summary["dispatch"])))),
    ]


def tokens_per_image(model: MultiTaskModel) -> int:
    """Tokens of one image for one task, prefix tokens included; 0 for a model without experts."""
    if not isinstance(model, MultiTaskViT):
        return 0
    return int(model.stem.patch_embed.num_patches) + int(model.stem.num_prefix_tokens)
