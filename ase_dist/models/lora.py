"""LoRA on a frozen linear (Hu et al. 2021, arXiv 2106.09685), in the fused form of ``ase_dist.ops.lowrank``.

Letters: D input width, O output width, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ase_dist.errors import UserError
from ase_dist.ops.lowrank import lowrank_linear
from ase_dist.seeding import derive_seed, generator


class LoRALinear(nn.Module):
    """y = base(x) + alpha / R * (x A^T) B^T, with ``base`` frozen under its own name, so a file of it still fits.

    A starts Kaiming-uniform as in peft, drawn from ``seed`` alone, and B at zero: the layer starts as its base. Where
    the base is trained as well (``requires_grad``), its gradient flows too.
    """

    def __init__(self, base: nn.Linear, *, rank: int, seed: int, alpha: float | None = None) -> None:
        super().__init__()
        if rank < 1:
            raise UserError(f"rank: got {rank}, wanted 1 or more; without LoRA leave the linear as it is")
        self.scale = 1.0 if alpha is None else alpha / rank
        self.base = base.requires_grad_(False)
        a_RD = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(a_RD, a=math.sqrt(5), generator=generator(seed, "A"))
        self.lora_A = nn.Parameter(a_RD.to(base.weight))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank).to(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., O]."""
        return lowrank_linear(x, self.base.weight, self.base.bias, self.lora_A, self._scaled_up())

    def merged(self) -> nn.Linear:
        """One plain linear that computes the same; frozen, its bias the base's own."""
        base = self.base
        with torch.device("meta"):
            linear = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
        linear.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        linear.bias = base.bias
        return linear

    def merged_weight(self) -> Tensor:
        """W + alpha / R * B A, [O, D]: the weight of one plain linear that computes the same; detached."""
        with torch.no_grad():
            return self.base.weight + self._scaled_up() @ self.lora_A

    def _scaled_up(self) -> Tensor:
        return self.lora_B if self.scale == 1.0 else self.lora_B * self.scale


def merge_lora(module: nn.Module) -> None:
    """Replace every ``LoRALinear`` below ``module`` by the plain linear that computes the same."""
    for name, child in list(module.named_children()):
        if isinstance(child, LoRALinear):
            setattr(module, name, child.merged())
        else:
            merge_lora(child)


def add_lora(
    module: nn.Module, *, rank: int, alpha: float | None, seed: int, only: Iterable[str] | None = None
) -> None:
    """Replace the ``nn.Linear`` children of ``module`` (those named in ``only``) by ``LoRALinear``; none at rank 0.

    Each draws from ``seed`` and its own name, so neither rank nor order of construction matters.
    """
    names = None if only is None else set(only)
    for name, child in list(module.named_children()):
        if rank and type(child) is nn.Linear and (names is None or name in names):
            setattr(module, name, LoRALinear(child, rank=rank, alpha=alpha, seed=derive_seed(seed, name)))
