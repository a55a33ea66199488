"""The tensors of a model under names that no sharding changes: those of checkpoints and exports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ase_dist.models.multitask_resnet import MultiTaskModel
from ase_dist.moe import MoEFFN


def named_tensors(model: MultiTaskModel) -> dict[str, Tensor]:
    """The model's own tensors by global name, detached: what is copied into one changes the model.

    Names are those of the plain model, and the experts stand one by one as in ``blocks.3.mlp.fc1.A.07``. With sharded
    layers the routed experts are those of this rank.
    """
    state: dict[str, Tensor] = {}
    layers: dict[str, Any] = {f"blocks.{i}.mlp": block.mlp for i, block in enumerate(model.blocks) if block.has_moe}
    for name, tensor in model.state_dict().items():
        prefix = ".".join(name.split(".")[:3])
        if prefix not in layers:
            state[name] = tensor
            continue
        local = name.removeprefix(f"{prefix}.")
        state |= {f"{prefix}.{part}": row for part, row in _parts(layers[prefix], local, tensor)}
    return state


def _parts(layer: MoEFFN, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor of a MoE layer, a bank taken apart by expert, its padding left out."""
    bank, _, rest = name.partition(".")
    if bank not in ("routed", "shared"):
        yield name, tensor
        return
    ids = layer.shard.ids[: layer.shard.real] if bank == "routed" else range(layer.shard.routed, layer.num_experts)
    digits = len(str(layer.num_experts - 1))
    for row, expert in enumerate(ids):
        yield f"{rest.replace('_', '.')}.{expert:0{digits}}", tensor[row]
