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
    layers = [(layer, count) for layer, count in layer_tokens(model) if layer.shard.count > 1]
    if not layers:
        return {}
    tokens = [images * len(model.task_names) * count for _, count in layers]
    shapes = [layer.layer_shape() for layer, _ in layers]
    travelling = [shape.all_to_all_bytes(shape.expected_rows(n)) for shape, n in zip(shapes, tokens, strict=True)]
    return {
        "ep_size": shapes[0].ranks,
        "layers": len(layers),
        "tokens_per_rank": tokens[0],
        "least_tokens_per_rank": min(tokens),
        "gather_bytes": sum(shape.gather_bytes() for shape in shapes),
        "all_to_all_bytes": round(sum(travelling)),
        "crossover_tokens": shapes[0].crossover(),
        "dispatch": [layer.dispatch for layer, _ in layers],
    }


def dispatch_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary as rows of the start-up table."""
    first, least = summary["tokens_per_rank"], summary["least_tokens_per_rank"]
    tokens = f"{first:,}" if first == least else f"{first:,} in the first layer to {least:,}"
    return [
        ("tokens per rank and micro-step", tokens),
        ("sent if experts travel (gather)", f"{summary['gather_bytes'] / 1e6:.2f} MB"),
        ("sent if tokens travel (all_to_all)", f"{summary['all_to_all_bytes'] / 1e6:.2f} MB"),
        ("experts travel cheaper from", f"{summary['crossover_tokens']:.0f} tokens per rank"),
        ("used", ", ".join(sorted(set(summary["dispatch"])))),
    ]


def layer_tokens(model: MultiTaskModel) -> list[tuple[MoEFFN, int]]:
    """Each layer with experts, and the tokens of one image for one task that it sees, prefix tokens included."""
    if not isinstance(model, MultiTaskViT):
        return []
    pairs = zip(model.blocks, model.block_tokens, strict=True)
    return [(block.mlp, count) for block, count in pairs if isinstance(block.mlp, MoEFFN)]


def tokens_per_image(model: MultiTaskModel) -> int:
    """Tokens of one image for one task in the first block, prefix tokens included; 0 for a model without blocks."""
    return model.block_tokens[0] if isinstance(model, MultiTaskViT) else 0
