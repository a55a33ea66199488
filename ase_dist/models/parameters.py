"""How many parameters a model has, of which kind, and which of them are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from torch import nn

from ase_dist.models.heads import LevelsHead, TaskHead
from ase_dist.models.lora import LoRALinear, TaskPairs
from ase_dist.models.multitask import TaskEmbedding
from ase_dist.models.sharing import Sharing
from ase_dist.moe import MoEFFN
from ase_dist.moe.router import TaskRouter

GROUPS = ("backbone", "sharing", "routed", "shared", "router", "lora", "head", "task_embedding")
OWNERS: dict[type[nn.Module], str] = {
    TaskHead: "head",
    LevelsHead: "head",
    TaskEmbedding: "task_embedding",
    TaskRouter: "router",
    Sharing: "sharing",
}


@dataclass
class GroupSize:
    """Parameters of the whole model, how many of them are trained, and the bytes of all of them on this rank."""

    total: int = 0
    trained: int = 0
    bytes: int = 0

    def add(self, parameter: nn.Parameter, *, share: float = 1.0) -> None:
        """Count ``parameter``, of which the whole model has ``share`` times as many elements as this rank."""
        count = round(parameter.numel() * share)
        self.total += count
        self.trained += count if parameter.requires_grad else 0
        self.bytes += parameter.numel() * parameter.element_size()


@dataclass(frozen=True)
class ParameterTable:
    """The sizes by group, in the order of ``GROUPS``; sharded experts count once each, padding not at all."""

    groups: dict[str, GroupSize]

    @property
    def all(self) -> GroupSize:
        """The sums over the groups."""
        sizes = self.groups.values()
        return GroupSize(*(sum(getattr(size, name) for size in sizes) for name in ("total", "trained", "bytes")))

    def as_rows(self) -> list[tuple[str, str, str, str]]:
        """(group, total, trained, size) as text for a table; groups without parameters are left out."""
        rows = [(name, size) for name, size in self.groups.items() if size.total]
        return [
            (name.replace("_", " "), f"{size.total:,}", f"{size.trained:,}", f"{size.bytes / 1e6:.2f} MB")
            for name, size in [*rows, ("all", self.all)]
        ]

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Plain numbers for JSON: {group: {total, trained, bytes}}, with 'all' last."""
        return {name: asdict(size) for name, size in {**self.groups, "all": self.all}.items()}


def parameter_table(model: nn.Module) -> ParameterTable:
    """Count the parameters of a ``MultiTaskViT`` (or any module with such parts) by the module that owns them."""
    groups = {name: GroupSize() for name in GROUPS}
    shares = {  # by id of a routed parameter: experts of the whole layer over slots on this rank
        id(parameter): layer.shard.routed / layer.shard.slots
        for layer in model.modules()
        if isinstance(layer, MoEFFN) and layer.shard.slots
        for parameter in layer.routed.parameters()
    }
    for _, parameter, group in _walk(model, "", "backbone"):
        groups[group].add(parameter, share=shares.get(id(parameter), 1.0))
    return ParameterTable(groups)


def parameter_groups(model: nn.Module) -> dict[str, str]:
    """The group of every parameter by its name, for instance to set learning rates per group."""
    return {name: group for name, _, group in _walk(model, "", "backbone")}


def _walk(module: nn.Module, prefix: str, group: str) -> Iterator[tuple[str, nn.Parameter, str]]:
    """(name, parameter, group) below ``module``; ``group`` is inherited until a module of another owner comes."""
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter, "lora" if isinstance(module, LoRALinear | TaskPairs) else group
    for name, child in module.named_children():
        owned = next((owned for owner, owned in OWNERS.items() if isinstance(child, owner)), group)
        if isinstance(module, MoEFFN):
            owned = next((experts for experts in ("routed", "shared") if child is getattr(module, experts)), owned)
        yield from _walk(child, f"{prefix}{name}.", owned)
