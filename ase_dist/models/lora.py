"""LoRA on a frozen linear (Hu et al. 2021, arXiv 2106.09685), in the fused form of ``ase_dist.ops.lowrank``.

A linear may have a further pair for each task, as in MTLoRA (Agiza et al. 2024, arXiv 2403.20320).

Letters: D input width, O output width, R rank, t tasks, T tokens of one task.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ase_dist.errors import UserError
from ase_dist.ops.lowrank import lowrank_linear
from ase_dist.seeding import derive_seed, generator


class Streams:
    """Which tasks the streams are that a block computes: the block sets it first thing in every forward pass.

    For linears inside modules that take no further argument, such as timm's attention. None: all tasks, in order.
    """

    def __init__(self) -> None:
        self.tasks: Sequence[int] | None = None


class TaskPairs(nn.Module):
    """y_t + alpha / R * (x_t A_t^T) B_t^T for the stream of each task t, whose tokens stand together in x."""

    def __init__(self, base: nn.Linear, *, num_tasks: int, rank: int, seed: int, alpha: float | None = None) -> None:
        super().__init__()
        self.scale = 1.0 if alpha is None else alpha / rank
        a_tRD = [_kaiming(rank, base.in_features, seed=derive_seed(seed, task)) for task in range(num_tasks)]
        self.A = nn.Parameter(torch.stack(a_tRD).to(base.weight))
        self.B = nn.Parameter(torch.zeros(num_tasks, base.out_features, rank).to(base.weight))

    def forward(self, y: Tensor, x: Tensor, tasks: Sequence[int] | None) -> Tensor:
        """Of x [..., D] and the shared y [..., O], whose first axis is a multiple of the tasks: [..., O]."""
        a_tRD: Tensor = self.A
        b_tOR: Tensor = self.B
        if tasks is not None and list(tasks) != list(range(self.A.shape[0])):
            a_tRD, b_tOR = (torch.stack([pair[task] for task in tasks]) for pair in (self.A, self.B))
        x_tTD, y_tTO = (each.reshape(a_tRD.shape[0], -1, each.shape[-1]) for each in (x, y))
        u_tTR = torch.bmm(x_tTD, a_tRD.transpose(1, 2))
        return torch.baddbmm(y_tTO, u_tTR, b_tOR.transpose(1, 2), alpha=self.scale).view(y.shape)

    def keep(self, tasks: Sequence[int]) -> None:
        """Drop the pairs of all others; those of ``tasks``, no longer trained, count from 0."""
        for name in ("A", "B"):
            kept = getattr(self, name).detach()[list(tasks)]
            setattr(self, name, nn.Parameter(kept, requires_grad=False))


class LoRALinear(nn.Module):
    """y = base(x) + alpha / R * (x A^T) B^T, with ``base`` frozen under its own name, so a file of it still fits.

    A starts Kaiming-uniform as in peft, drawn from ``seed`` alone, and B at zero: the layer starts as its base. Where
    the base is trained as well (``requires_grad``), its gradient flows too. ``lora_tasks`` adds what is each task's own
    to the streams that ``streams`` names, see ``TaskPairs``.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        seed: int,
        alpha: float | None = None,
        lora_tasks: TaskPairs | None = None,
        streams: Streams | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise UserError(f"rank: got {rank}, wanted 1 or more; without LoRA leave the linear as it is")
        self.scale = 1.0 if alpha is None else alpha / rank
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(_kaiming(rank, base.in_features, seed=seed).to(base.weight))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank).to(base.weight))
        self.lora_tasks, self.streams = lora_tasks, streams or Streams()

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., O]; with pairs of tasks the first axis holds their streams one after another."""
        y = lowrank_linear(x, self.base.weight, self.base.bias, self.lora_A, self._scaled_up())
        return y if self.lora_tasks is None else self.lora_tasks(y, x, self.streams.tasks)  # type: ignore[no-any-return]

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
            weight_OD = self.base.weight + self._scaled_up() @ self.lora_A
            if self.lora_tasks is not None:
                (a_RD,), (b_OR,) = self.lora_tasks.A, self.lora_tasks.B  # of one task; several are not one linear
                weight_OD = weight_OD + self.lora_tasks.scale * b_OR @ a_RD
            return weight_OD

    def _scaled_up(self) -> Tensor:
        return self.lora_B if self.scale == 1.0 else self.lora_B * self.scale


def merge_lora(module: nn.Module) -> None:
    """Replace every ``LoRALinear`` below ``module`` by the plain linear that computes the same.

    One with pairs of several tasks, which is no one linear, stays.
    """
    for name, child in list(module.named_children()):
        if not isinstance(child, LoRALinear):
            merge_lora(child)
        elif child.lora_tasks is None or child.lora_tasks.A.shape[0] == 1:
            setattr(module, name, child.merged())


def add_lora(
    module: nn.Module,
    *,
    rank: int,
    alpha: float | None,
    seed: int,
    only: Iterable[str] | None = None,
    task_rank: int = 0,
    num_tasks: int = 0,
    streams: Streams | None = None,
) -> None:
    """Replace the ``nn.Linear`` children of ``module`` (those named in ``only``) by ``LoRALinear``; none at rank 0.

    With a ``task_rank`` each has a pair of that rank for each of ``num_tasks``, too, and is told by ``streams`` which
    of them it computes. Each draws from ``seed`` and its own name, so neither rank nor order of construction matters.
    """
    names = None if only is None else set(only)
    for name, child in list(module.named_children()):
        if not rank or type(child) is not nn.Linear or (names is not None and name not in names):
            continue
        own, pairs = derive_seed(seed, name), None
        if task_rank:
            pairs = TaskPairs(child, num_tasks=num_tasks, rank=task_rank, alpha=alpha, seed=derive_seed(own, "tasks"))
        linear = LoRALinear(child, rank=rank, alpha=alpha, seed=own, lora_tasks=pairs, streams=streams)
        setattr(module, name, linear)


def _kaiming(rank: int, width: int, *, seed: int) -> Tensor:
    a_RD = torch.empty(rank, width)
    return nn.init.kaiming_uniform_(a_RD, a=math.sqrt(5), generator=generator(seed, "A"))
