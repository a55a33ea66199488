"""The routers of all tasks, kept as one tensor, and the statistics of what they decide.

Letters: t tasks, T tokens of one task, D width, N experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ase_dist import collectives
from ase_dist.moe.gating import Gates
from ase_dist.moe.losses import RouterStatistics
from ase_dist.ops import modes
from ase_dist.ops.modes import autocast, may_use_custom_autograd
from ase_dist.ops.stacked import LowRank, narrow_product
from ase_dist.registries import GATINGS


class TaskRouter(nn.Module):
    """One bias-free matrix per task; logits in float32 or higher precision for inputs of any type.

    1. logits z = W_t x for the tokens of task t
    2. gates by the chosen mode (``ase_dist.moe.gating``)
    """

    def __init__(
        self, dim: int, *, num_experts: int, num_tasks: int, k: int, num_shared: int, gating: str, seed: int
    ) -> None:
        super().__init__()
        self.k, self.num_shared, self.gating = k, num_shared, gating
        self.shared_scale: Tensor | None = None
        self.weight = nn.Parameter(torch.empty(num_tasks, num_experts, dim))
        bound = 1 / math.sqrt(dim)  # nn.Linear's initialisation
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.weight.uniform_(-bound, bound, generator=generator)

    def forward(
        self, x_tTD: Tensor, tasks: list[int], beside: LowRank | None = None
    ) -> tuple[Tensor, Gates] | tuple[Tensor, Gates, Tensor, Tensor]:
        """Logits and gates [t, T, N], at least in float32, of x [t, T, D]; stream i belongs to task ``tasks[i]``.

        With A of the experts ``beside`` the router also x and u = x A^T of ``narrow_product``, by the same product.
        """
        every = tasks == list(range(self.weight.shape[0]))
        weight_tND = self.weight if every else torch.stack([self.weight[i] for i in tasks])
        u_TR: Tensor | None = None
        stacks = modes.stacks_products(x_tTD) and may_use_custom_autograd(x_tTD) and x_tTD.dtype == weight_tND.dtype
        if beside is not None or stacks:
            x_tTD, u_TR, logits_tTN = narrow_product(x_tTD, weight_tND, beside)
        else:
            dtype = torch.promote_types(x_tTD.dtype, torch.float32)
            with autocast(x_tTD.device.type, None):
                logits_tTN = torch.bmm(x_tTD.to(dtype), weight_tND.to(dtype).transpose(1, 2))
        if self.shared_scale is not None:
            routed_tTn, shared_tTS = logits_tTN.tensor_split([logits_tTN.shape[-1] - self.num_shared], dim=-1)
            logits_tTN = torch.cat([routed_tTn, shared_tTS * self.shared_scale], dim=-1)
        gates = GATINGS[self.gating](logits_tTN, k=self.k, num_shared=self.num_shared)
        return (logits_tTN, gates) if u_TR is None else (logits_tTN, gates, x_tTD, u_TR)

    def scale_shared_logits(self, scale: float) -> None:
        """From now on multiply the logits of the shared experts by ``scale``; at 0 all of them are 0."""
        if self.shared_scale is None:
            self.shared_scale = torch.ones((), device=self.weight.device, dtype=torch.float32)
        self.shared_scale.fill_(scale)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


class RoutingSums(NamedTuple):
    """Sums over the tokens of a task on this process, and how many tokens they are.

    ``sums_tM`` has side by side those of ``probs``, ``active`` and ``gates``, [t, N] each, and, where a loss wants it,
    of logsumexp(logits) squared, [t, 1]. The sums of several layers may be stacked: [L, t, M], with ``tokens``
    [L, 1, 1] where the layers have seen different numbers of them.
    """

    sums_tM: Tensor
    tokens: int | Tensor


def routing_sums(logits_tTN: Tensor, routing: Gates, *, squared_lse: bool = True) -> RoutingSums:
    """All that the statistics and losses of a layer need of its tokens."""
    parts_tTM = [routing.probs, routing.active, routing.gates]
    if squared_lse:
        parts_tTM.append(logits_tTN.logsumexp(dim=-1, keepdim=True).square())
    return RoutingSums(torch.cat(parts_tTM, dim=-1).sum(dim=1), logits_tTN.shape[1])


def stacked_sums(sums: Sequence[RoutingSums]) -> RoutingSums:
    """The sums of several layers with the same tasks and experts as one."""
    sums_LtM = torch.stack([each.sums_tM for each in sums])
    counts = [cast(int, each.tokens) for each in sums]
    if all(count == counts[0] for count in counts):
        return RoutingSums(sums_LtM, counts[0])
    # filled on the device, run by run of equal numbers: a copy from the host would wait for the device
    runs = [sums_LtM.new_full((len(list(run)), 1, 1), count) for count, run in groupby(counts)]
    return RoutingSums(sums_LtM, torch.cat(runs))


def router_statistics(logits_tTN: Tensor, routing: Gates, *, over_ranks: bool) -> RouterStatistics:
    """The means over the tokens of one layer: ``mean_statistics`` without what is counted."""
    return mean_statistics(routing_sums(logits_tTN, routing), over_ranks=over_ranks)[0]


def mean_statistics(found: RoutingSums, *, over_ranks: bool) -> tuple[RouterStatistics, Tensor, Tensor]:
    """Means over a task's tokens: of this process, or of the tokens of all ranks (``over_ranks``, one collective).

    Over ranks the value is the global mean and the gradient the local share, scaled so that averaging the ranks'
    gradients gives the gradient of one process with all tokens; a rank without tokens takes part with zeros. Beside
    them, without gradient and of this process alone, the tokens for which an expert was active and the mean gates.
    """
    sums_tM, tokens = found
    N = sums_tM.shape[-1] // 3
    own_tM = sums_tM / (tokens.clamp(min=1.0) if isinstance(tokens, Tensor) else max(tokens, 1))
    counts_tN, mean_gates_tN = sums_tM.detach()[..., N : 2 * N].long(), own_tM.detach()[..., 2 * N : 3 * N]
    if over_ranks and collectives.world_size() > 1:
        shape = (*sums_tM.shape[:-1], 1)
        count_t1 = tokens.expand(shape) if isinstance(tokens, Tensor) else sums_tM.new_full(shape, float(tokens))
        total = collectives.all_reduce_sum(torch.cat([sums_tM, count_t1], dim=-1))
        count_t1 = total[..., -1:].clamp(min=1.0)
        own_tM = sums_tM * collectives.world_size() / count_t1
        own_tM = own_tM + (total[..., :-1] / count_t1 - own_tM).detach()
    squared_lse_t = own_tM[..., -1] if own_tM.shape[-1] > 3 * N else None
    probs_tN, load_tN, gates_tN = own_tM[..., : 3 * N].split(N, dim=-1)
    return RouterStatistics(probs_tN, load_tN.detach(), gates_tN, squared_lse_t), counts_tN, mean_gates_tN
