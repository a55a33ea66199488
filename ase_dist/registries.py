"""What settings choose by name: heads, gating modes and augmentations.

One line adds one, and nothing is imported before it is used. The names are known without torch, so that a wrong one is
told at once. A program may add its own before it reads settings, ``HEADS["mine"] = MyHead``; tasks and data sets have
their tables in ``ase_dist.tasks``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any, TypeVar

from ase_dist.errors import UserError, did_you_mean

T = TypeVar("T")


class Registry(MutableMapping[str, T]):
    """Objects by name; one given as "module:attribute" is imported when it is first asked for."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        self._entries: dict[str, T | str] = dict(entries)

    def __getitem__(self, name: str) -> T:
        entry = self._entries[name]
        if isinstance(entry, str):
            entry = self._entries[name] = resolve(entry)
        return entry

    def __setitem__(self, name: str, entry: T) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def refusal(self, name: str) -> str:
        """The clause that says that ``name`` is none of them, and which there are."""
        return f"got {name!r}, wanted one of {list(self)}{did_you_mean(name, self)}"

    def checked(self, name: str) -> str:
        """``name``; UserError with ``refusal`` where it is none of them. Imports nothing."""
        if name not in self:
            raise UserError(self.refusal(name))
        return name


def resolve(place: str) -> Any:
    """The object at "module:attribute"."""
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)


HEADS: Registry[Any] = Registry(  # an ase_dist.models.heads.HeadFactory or LevelsHeadFactory each
    {
        "pup": "ase_dist.models.heads:PUPHead",
        "linear": "ase_dist.models.heads:LinearHead",
        "pup_linear": "ase_dist.models.heads:PUPLinearHead",
        "dpt": "ase_dist.models.level_heads:DPTHead",
        "hrnet": "ase_dist.models.level_heads:HRNetHead",
        "multi_level": "ase_dist.models.level_heads:MultiLevelHead",
    }
)

GATINGS: Registry[Any] = Registry(  # an ase_dist.moe.gating.GatingMode each
    {
        "ase": "ase_dist.moe.gating:joint",
        "naive": "ase_dist.moe.gating:naive",
        "topk": "ase_dist.moe.gating:topk",
        "renormalised": "ase_dist.moe.gating:renormalised",
        "separate": "ase_dist.moe.gating:separate",
        "dense": "ase_dist.moe.gating:dense",
    }
)

AUGMENTATIONS: Registry[Any] = Registry(  # an ase_dist.data.augmentation.Augmentation each
    {
        "eigen": "ase_dist.data.augmentation:EIGEN",
        "astmt": "ase_dist.data.augmentation:ASTMT",
        "atrc": "ase_dist.data.augmentation:ATRC",
        "mtan": "ase_dist.data.augmentation:MTAN",
        "none": "ase_dist.data.augmentation:NONE",
    }
)

_LOSSES, _GRADIENTS = "ase_dist.training.balancing.from_losses", "ase_dist.training.balancing.from_gradients"
BALANCINGS: Registry[Any] = Registry(  # a subclass of ase_dist.training.balancing.method.Method each
    {
        "fixed": "ase_dist.training.balancing.method:Fixed",
        "uncertainty": f"{_LOSSES}:Uncertainty",
        "dwa": f"{_LOSSES}:DynamicAverage",
        "gls": f"{_LOSSES}:GeometricMean",
        "imtl_l": f"{_LOSSES}:ImpartialLosses",
        "rlw": f"{_LOSSES}:RandomWeights",
        "famo": f"{_LOSSES}:Famo",
        "gradnorm": f"{_GRADIENTS}:GradNorm",
        "mgda": f"{_GRADIENTS}:MultipleGradientDescent",
        "pcgrad": f"{_GRADIENTS}:ProjectedConflicts",
        "cagrad": f"{_GRADIENTS}:ConflictAverse",
        "imtl_g": f"{_GRADIENTS}:ImpartialGradients",
        "nash_mtl": f"{_GRADIENTS}:NashBargaining",
        "aligned_mtl": f"{_GRADIENTS}:AlignedComponents",
        "upgrad": f"{_GRADIENTS}:UnconflictingProjections",
    }
)
