"""What every side of the layer benchmark is given, and a LoRA feed-forward expert for libraries that bring none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from ase_dist.ops.lowrank import lowrank_linear

SHAPES = {"vit_s": (384, 1536), "vit_b": (768, 3072)}
TASKS = 5
Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Experts(NamedTuple):
    """N/k/S/r of the paper: N experts of rank r, S of them shared, k of the others active per token."""

    count: int
    k: int
    shared: int
    rank: int

    @property
    def active(self) -> int:
        """Per token, shared ones included: what a library without shared experts is given as its k."""
        return self.k + self.shared

    def __str__(self) -> str:
        return "/".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Experts:
        """From ``N/k/S/r``."""
        return cls(*map(int, text.split("/")))


@dataclass(frozen=True)
class Case:
    """The frozen FFN that all sides share, and the experts they put on it."""

    base: Mlp
    experts: Experts

    @property
    def dim(self) -> int:
        """D, the width of tokens."""
        return int(self.base.fc1.in_features)


class Side(NamedTuple):
    """``forward`` of x [5, T, D] gives y of the same shape and the auxiliary loss, if there is one."""

    module: nn.Module
    forward: Forward

    def step(self, x: Tensor) -> Callable[[], None]:
        """Forward and backward of values as ``x``, the gradients of the call before dropped first."""
        leaf, direction = x.clone().requires_grad_(), torch.randn_like(x)

        def step() -> None:
            self.module.zero_grad(set_to_none=True)
            leaf.grad = None
            self.forward(leaf)[0].backward(direction)

        return step


class UnavailableError(Exception):
    """Why a peer cannot take part."""


def frozen_ffn(dim: int, hidden: int, dtype: torch.dtype = torch.float32) -> Mlp:
    """A ViT's FFN with random weights, frozen."""
    base = Mlp(dim, hidden).requires_grad_(False)
    fill(base)
    return base.to(dtype)


def fill(module: nn.Module, *, seed: int = 0) -> None:
    """Random values everywhere: LoRA's B starts at zero, with which A and the gates would get no gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():  # of a GPU with the same values
            parameter.copy_(torch.empty(parameter.shape, dtype=parameter.dtype).normal_(std=0.02, generator=generator))


class LoRAFFN(nn.Module):
    """The whole frozen FFN with its own pairs on fc1 and fc2; copies of it share the FFN."""

    def __init__(self, base: Mlp, rank: int) -> None:
        super().__init__()
        self._frozen = (base,)  # in a tuple, so that a copy does not copy it
        self.pairs = nn.ParameterList(
            torch.randn(shape) * 0.02
            for linear in (base.fc1, base.fc2)
            for shape in ((rank, linear.in_features), (linear.out_features, rank))
        )

    def __deepcopy__(self, memo: object) -> LoRAFFN:
        return LoRAFFN(self._frozen[0], self.pairs[0].shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        (base,), (a1, b1, a2, b2) = self._frozen, self.pairs
        h = lowrank_linear(x, base.fc1.weight, base.fc1.bias, a1, b1)
        return lowrank_linear(h, base.fc2.weight, base.fc2.bias, a2, b2, activation=base.act)


def rows_of(x: Tensor) -> Tensor:
    """x as one sequence: [1, tasks * T, D]."""
    return x.reshape(1, -1, x.shape[-1])
