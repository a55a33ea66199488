"""The sides that need no library: ours, the floor, and a loop over the experts."""

from __future__ import annotations

import torch
from peers.common import TASKS, Case, Side, fill
from torch import Tensor, nn
from torch.nn import functional as F

from ase_dist.moe import MoEFFN


def frozen(case: Case) -> Side:
    """The FFN alone: the floor."""
    return Side(case.base, lambda x: (case.base(x), None))


def ours(case: Case) -> Side:
    """``MoEFFN``, its routers, gates and router loss included."""
    N, k, S, r = case.experts
    layer = MoEFFN(case.base, num_experts=N, k=k, num_shared=S, rank=r, num_tasks=TASKS)
    for experts in (layer.routed, layer.shared):
        fill(experts)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        result = layer(x)
        return result.output, result.aux_loss

    return Side(layer, forward)


def index_loop(case: Case) -> Side:
    """The same function as ours: rows sorted by expert, each expert's pair on its rows, gated sums by ``index_add_``.

    It has our routers and gates, and the statistics that ours has too; only the experts are applied otherwise.
    """
    side = ours(case)
    layer = side.module
    assert isinstance(layer, MoEFFN)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        result_gates = layer.router(x, list(range(TASKS)))[1]
        gates_TN = result_gates.gates.flatten(0, 1)
        x_TD = x.reshape(-1, x.shape[-1])
        visits = _visits(result_gates.active.flatten(0, 1))
        h = case.base.act(_looped(x_TD, case.base.fc1, "fc1", layer, gates_TN, visits))
        return _looped(h, case.base.fc2, "fc2", layer, gates_TN, visits).view_as(x), gates_TN.sum() * 0

    return Side(layer, forward)


def _visits(active_TN: Tensor) -> list[Tensor]:
    """The tokens of each expert, from one sort."""
    expert_M, token_M = active_TN.T.nonzero().unbind(dim=1)
    counts = torch.bincount(expert_M, minlength=active_TN.shape[1]).tolist()
    return list(token_M.split(counts))


def _looped(
    x_TD: Tensor, linear: nn.Linear, place: str, layer: MoEFFN, gates_TN: Tensor, visits: list[Tensor]
) -> Tensor:
    y_TO: Tensor = linear(x_TD)
    stacks = [experts.tensors() for experts in (layer.routed, layer.shared) if experts is not None]
    pairs = [(a, b) for stack in stacks for a, b in zip(stack[f"{place}.A"], stack[f"{place}.B"], strict=True)]
    for expert, ((a_rD, b_Or), tokens) in enumerate(zip(pairs, visits, strict=True)):
        delta = F.linear(F.linear(x_TD[tokens], a_rD), b_Or) * gates_TN[tokens, expert].unsqueeze(-1)
        y_TO = y_TO.index_add_(0, tokens, delta.to(y_TO.dtype))
    return y_TO
