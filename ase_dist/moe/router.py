"""The routers of all tasks, kept as one tensor, and the statistics of what they decide.

Letters: t tasks, T tokens of one task, D width, N experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ase_dist import collectives
from ase_dist.moe.gating import Gates
from ase_dist.moe.losses import RouterStatistics
from ase_dist.ops.modes import autocast
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

    def forward(self, x_tTD: Tensor, tasks: list[int]) -> tuple[Tensor, Gates]:
        """Logits and gates [t, T, N], at least in float32, of x [t, T, D]; stream i belongs to task ``tasks[i]``."""
        dtype = torch.promote_types(x_tTD.dtype, torch.float32)
        every = tasks == list(range(self.weight.shape[0]))
        weight_tND = (self.weight if every else torch.stack([self.weight[i] for i in tasks])).to(dtype)
        if self.shared_scale is not None:
            routed_tnD, shared_tSD = weight_tND.split([weight_tND.shape[1] - self.num_shared, self.num_shared], dim=1)
            weight_tND = torch.cat([routed_tnD, shared_tSD * self.shared_scale], dim=1)
        with autocast(x_tTD.device.type, None):
            logits_tTN = torch.bmm(x_tTD.to(dtype), weight_tND.transpose(1, 2))
        return logits_tTN, GATINGS[self.gating](logits_tTN, k=self.k, num_shared=self.num_shared)

    def scale_shared_logits(self, scale: float) -> None:
        """From now on multiply the logits of the shared experts by ``scale``; at 0 all of them are 0."""
        if self.shared_scale is None:
            self.shared_scale = torch.ones((), device=self.weight.device, dtype=torch.float32)
        self.shared_scale.fill_(scale)


def router_statistics(logits_tTN: Tensor, routing: Gates, *, over_ranks: bool) -> RouterStatistics:
    """Means over a task's tokens: of this process, or of the tokens of all ranks (``over_ranks``).

    Over ranks the value is the global mean and the gradient the local share, scaled so that averaging the ranks'
    gradients gives the gradient of one process with all tokens; a rank without tokens takes part with zeros.
    """
    sums = [
        routing.probs.sum(dim=1),
        routing.active.sum(dim=1).to(routing.gates.dtype),
        routing.gates.sum(dim=1),
        logits_tTN.logsumexp(dim=-1).square().sum(dim=1).unsqueeze(-1),
    ]
    packed_tM = torch.cat(sums, dim=-1)
    if not over_ranks or collectives.world_size() == 1:
        packed_tM = packed_tM / max(logits_tTN.shape[1], 1)
    else:
        count_t1 = packed_tM.new_full((packed_tM.shape[0], 1), float(logits_tTN.shape[1]))
        total = collectives.all_reduce_sum(torch.cat([packed_tM, count_t1], dim=-1))
        count_t1 = total[:, -1:].clamp(min=1.0)
        own = packed_tM * collectives.world_size() / count_t1
        packed_tM = own + (total[:, :-1] / count_t1 - own).detach()
    N = logits_tTN.shape[-1]
    probs_tN, load_tN, gates_tN, squared_lse_t1 = torch.split(packed_tM, [N, N, N, 1], dim=-1)
    return RouterStatistics(probs_tN, load_tN.detach(), gates_tN, squared_lse_t1.squeeze(-1))
