"""Global names of a model's tensors, those of every checkpoint and export: no rank and no shard in a name.

Experts are stored one by one under their global ids, as in ``blocks.3.mlp.fc1.A.07``; every other tensor under its own
name, as in ``heads.edge.linear.weight``. Some tensors, and some names, depend on the order of the tasks: an ``Entry``
knows where, so that a checkpoint can be loaded by a model with the same tasks in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ase_dist.models.lora import TaskPairs
from ase_dist.models.multitask import TaskEmbedding
from ase_dist.models.sharing import CrossStitch, MixingConv, TaskList
from ase_dist.moe import MoEFFN, deepspeed_compat
from ase_dist.moe.router import TaskRouter
from ase_dist.moe.state import expert_names

# By module: the tensors, and their axes along which the tasks are stacked, in equal blocks.
TASK_AXES: dict[type[nn.Module], tuple[tuple[str, ...], tuple[int, ...]]] = {
    TaskRouter: (("weight",), (0,)),
    TaskEmbedding: (("weight",), (0,)),
    TaskPairs: (("A", "B"), (0,)),
    CrossStitch: (("weight",), (0, 1)),
    MixingConv: (("weight",), (1,)),
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a model and its global names.

    ``path`` is its own name. ``names`` is that one, or for stacked experts one name per expert that this rank holds,
    padding left out; ``all_names`` are those of all ranks, and ``is_sharded`` says that other ranks of the
    expert-parallel group hold other experts. ``task_axes`` are the axes along which the tasks are stacked,
    ``task_positions`` the parts of ``path`` (split at its dots) that are the number of a task.
    """

    path: str
    tensor: Tensor
    names: tuple[str, ...]
    all_names: tuple[str, ...]
    is_stacked: bool = False
    is_sharded: bool = False
    task_axes: tuple[int, ...] = ()
    task_positions: tuple[int, ...] = ()

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape under each of ``names``."""
        return tuple(deepspeed_compat.full_shape(self.tensor))[1 if self.is_stacked else 0 :]

    def split(self, full: Tensor) -> dict[str, Tensor]:
        """A tensor of the full shape by name; experts are copies, so that one does not keep the others in memory."""
        if not self.is_stacked:
            return {self.path: full}
        return {name: full[i].clone() for i, name in enumerate(self.names)}

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The reverse of ``split``: the tensors of ``names`` in order, padding filled with zeros."""
        if not self.is_stacked:
            return parts[0]
        shape = deepspeed_compat.full_shape(self.tensor)
        padding = [torch.zeros(shape[1:])] * (shape[0] - len(parts))
        return torch.stack([*parts, *padding]) if parts else torch.zeros(shape)

    def names_of(self, order: Sequence[int]) -> tuple[str, ...]:
        """``names`` in a model whose tasks have another order; ``order[i]`` is the number there of task i here."""
        if not self.task_positions:
            return self.names
        parts = self.path.split(".")
        for i in self.task_positions:
            parts[i] = str(order[int(parts[i])])
        return (".".join(parts),)

    def reordered(self, tensor: Tensor, order: Sequence[int]) -> Tensor:
        """A full tensor of a model whose tasks have another order (see ``names_of``) in the order of this model."""
        index = torch.tensor(order)
        for axis in self.task_axes:
            blocks = tensor.unflatten(axis, (len(order), -1))
            tensor = blocks.index_select(axis, index).flatten(axis, axis + 1)
        return tensor


def task_order(here: Sequence[str], there: Sequence[str]) -> list[int]:
    """For each task of ``here`` its number in ``there``, which has the same tasks."""
    assert sorted(here) == sorted(there), (here, there)
    return [there.index(name) for name in here]


def trained_entries(model: nn.Module) -> list[Entry]:
    """An entry for every trained parameter of ``model``, in the model's order, which is the same on all ranks."""
    return [entry for entry in _entries(model) if entry.tensor.requires_grad]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All of the model's tensors by global name, detached: what is copied into one changes the model.

    With sharded layers the routed experts are those of this rank.
    """
    state: dict[str, Tensor] = {}
    for entry in _entries(model):
        tensor = entry.tensor.detach()
        state |= {name: tensor[i] for i, name in enumerate(entry.names)} if entry.is_stacked else {entry.path: tensor}
    return state


def _entries(model: nn.Module) -> Iterator[Entry]:
    """An entry for every parameter and every persistent buffer of ``model``."""
    experts: dict[int, Entry] = {}  # by id of the tensor, as the next
    task_axes: dict[int, tuple[int, ...]] = {}
    task_lists: list[str] = []
    buffers: list[tuple[str, Tensor]] = []
    for path, module in model.named_modules():
        if isinstance(module, MoEFFN):
            experts |= {id(entry.tensor): entry for entry in _expert_entries(module, path)}
        if isinstance(module, TaskList):
            task_lists.append(path)
        if type(module) in TASK_AXES:
            tensors, axes = TASK_AXES[type(module)]
            task_axes |= {id(getattr(module, name)): axes for name in tensors}
        passing = module._non_persistent_buffers_set
        prefix = f"{path}." if path else ""
        buffers += [(prefix + name, b) for name, b in module.named_buffers(recurse=False) if name not in passing]
    for path, tensor in [*model.named_parameters(), *buffers]:
        positions = tuple(name.count(".") + 1 for name in task_lists if path.startswith(f"{name}."))
        plain = Entry(path, tensor, (path,), (path,), task_axes=task_axes.get(id(tensor), ()), task_positions=positions)
        yield experts.get(id(tensor), plain)


def _expert_entries(layer: MoEFFN, path: str) -> Iterator[Entry]:
    """The stacked tensors of ``layer``, which is called ``path``."""
    shard, routed_ids = layer.shard, range(layer.shard.routed)
    shared_ids = range(layer.shard.routed, layer.num_experts)
    kinds = [(layer.routed, shard.ids[: shard.real], routed_ids, shard.count > 1)]
    kinds += [(layer.shared, shared_ids, shared_ids, False)] if layer.shared is not None else []
    for experts, own, everyone, is_sharded in kinds:
        for name, tensor in experts.tensors().items():
            names, all_names = (
                tuple(expert_names(f"{path}.{name}", ids, count=layer.num_experts)) for ids in (own, everyone)
            )
            yield Entry(f"{path}.{name}", tensor, names, all_names, is_stacked=True, is_sharded=is_sharded)
