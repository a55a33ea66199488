"""The trained tensors of a model under global names: no rank, no expert-parallel size, no wrapper in a name.

An expert's tensors stand one by one under its global id, as in ``blocks.3.mlp.fc1.A.07``; everything else under the
name of its parameter, as in ``heads.edge.linear.weight``. The names are those of a checkpoint and of an export.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ase_dist.moe import MoEFFN, deepspeed_compat
from ase_dist.moe.experts import FFNExperts, LoRAExperts


@dataclass(frozen=True)
class Entry:
    """A trained parameter and what it is called globally.

    ``path`` is the parameter's own name without wrappers; ``names`` is that one, or one per leading row for a bank of
    experts, padding rows left out. ``is_sharded``: other ranks of the expert-parallel group hold other experts in it.
    """

    path: str
    parameter: nn.Parameter
    names: tuple[str, ...]
    is_bank: bool
    is_sharded: bool

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape under each of ``names``."""
        return tuple(deepspeed_compat.full_shape(self.parameter))[1 if self.is_bank else 0 :]

    def split(self, full: Tensor) -> dict[str, Tensor]:
        """A tensor of the parameter's full shape by name; experts as copies, so that each can go its own way."""
        if not self.is_bank:
            return {self.names[0]: full}
        return {name: full[row].clone() for row, name in enumerate(self.names)}

    def join(self, parts: dict[str, Tensor]) -> Tensor:
        """The reverse of ``split``, padding rows filled with zeros."""
        if not self.is_bank:
            return parts[self.names[0]]
        rows = [parts[name] for name in self.names]
        shape = deepspeed_compat.full_shape(self.parameter)
        padding = [torch.zeros(shape[1:])] * (shape[0] - len(rows))
        return torch.stack([*rows, *padding]) if rows else torch.zeros(shape)


def trained_entries(model: nn.Module) -> list[Entry]:
    """An entry for every trained parameter of ``model``, in the model's order, which is the same on all ranks."""
    banks = _bank_names(model)
    wrappers = _wrapper_paths(model)
    entries = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        path = _without(name, wrappers)
        names, is_bank, is_sharded = banks.get(id(parameter), ((path,), False, False))
        entries.append(Entry(path, parameter, names, is_bank, is_sharded))
    return entries


def _bank_names(model: nn.Module) -> dict[int, tuple[tuple[str, ...], bool, bool]]:
    """By id of a bank's parameter: its experts' names, that it is a bank, and whether it is sharded."""
    wrappers = _wrapper_paths(model)
    found = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, MoEFFN):
            continue
        prefix = _without(path, wrappers)
        digits = len(str(layer.num_experts - 1))
        shared_ids = range(layer.shard.routed, layer.num_experts)
        for bank, ids in ((layer.routed, layer.shard.ids[: layer.shard.real]), (layer.shared, shared_ids)):
            for tensor_name, tensor in _tensors(bank):
                names = tuple(f"{prefix}.{tensor_name}.{i:0{digits}}" for i in ids)
                found[id(tensor)] = (names, True, bank is layer.routed and layer.shard.count > 1)
    return found


def _tensors(bank: LoRAExperts | FFNExperts | None) -> Iterator[tuple[str, Tensor]]:
    if bank is not None:
        yield from bank.tensors().items()


def _wrapper_paths(model: nn.Module) -> list[str]:
    """Paths of plain layers inside DeepSpeed's face of them: ``blocks.0.mlp.moe`` is called ``blocks.0.mlp``."""
    wrappers = (path for path, module in model.named_modules() if isinstance(getattr(module, "moe", None), MoEFFN))
    return [f"{path}.moe" if path else "moe" for path in wrappers]  # by what is in it: evaluation imports no DeepSpeed


def _without(name: str, wrappers: list[str]) -> str:
    for path in wrappers:
        if name == path or name.startswith(f"{path}."):
            return path.removesuffix("moe").rstrip(".") + name[len(path) :]
    return name
