"""Router regularisers, as functions of the gates' statistics per task.

Letters: t tasks, N experts. All take means over the tokens of the whole global batch, so that the number of ranks
does not change them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ase_dist.errors import UserError, did_you_mean


class RouterStatistics(NamedTuple):
    """Means over the tokens of a task.

    ``probs_tN`` of the full softmax (differentiable), ``load_tN`` the share of tokens for which an expert is active
    (no gradient), ``gates_tN`` of the gates, ``squared_lse_t`` of logsumexp(logits) squared.
    """

    probs_tN: Tensor
    load_tN: Tensor
    gates_tN: Tensor
    squared_lse_t: Tensor


def mutual_information(stats: RouterStatistics) -> Tensor:
    """-I(T; E), Mod-Squad's loss (arXiv 2212.08066, Eq. 5): each task sure of its experts, all experts in use.

    P(t, e) is the mean probability of expert e given task t over the number of tasks. Without probability mass for
    an expert (x log x at 0) the term is 0.
    """
    joint_tN = stats.probs_tN / stats.probs_tN.shape[0]
    task_t1 = joint_tN.sum(dim=1, keepdim=True)
    expert_1N = joint_tN.sum(dim=0, keepdim=True)
    tiny = torch.finfo(joint_tN.dtype).tiny  # 0 log 0 = 0, and its gradient finite: naive shared experts have P = 0
    ratio_tN = joint_tN.clamp(min=tiny).log() - (task_t1 * expert_1N).clamp(min=tiny).log()
    return -(joint_tN * ratio_tN).sum()


def cv_squared(stats: RouterStatistics) -> Tensor:
    """Squared coefficient of variation of the experts' importance, the mean gate (Shazeer et al. 2017, Eq. 7)."""
    importance_N = stats.gates_tN.mean(dim=0)
    mean = importance_N.mean()
    return (importance_N - mean).square().mean() / mean.square().clamp(min=1e-10)


def switch(stats: RouterStatistics) -> Tensor:
    """N * sum of load times probability (Switch Transformer, Eq. 4), loads as shares of all assignments."""
    load_N = stats.load_tN.mean(dim=0)
    share_N = load_N / load_N.sum().clamp(min=1e-10)
    return share_N.numel() * (share_N * stats.probs_tN.mean(dim=0)).sum()


def z(stats: RouterStatistics) -> Tensor:
    """Mean squared logsumexp of the logits (ST-MoE, Eq. 5): keeps logits small."""
    return stats.squared_lse_t.mean()


ROUTER_LOSSES: dict[str, Callable[[RouterStatistics], Tensor]] = {
    "mutual_information": mutual_information,
    "cv_squared": cv_squared,
    "switch": switch,
    "z": z,
}


def check_aux_losses(weights: Mapping[str, float]) -> None:
    """Raise UserError for an unknown loss or a weight that is not a finite number >= 0."""
    for name, weight in weights.items():
        if name not in ROUTER_LOSSES:
            raise UserError(
                f"aux_losses: got {name!r}, wanted some of {list(ROUTER_LOSSES)}{did_you_mean(name, ROUTER_LOSSES)}"
            )
        if not 0 <= weight < float("inf"):
            raise UserError(f"aux_losses: got weight {weight} for {name!r}, wanted a finite number >= 0")


def weighted_router_loss(stats: RouterStatistics, weights: Mapping[str, float]) -> Tensor:
    """The sum of the chosen losses times their weights; 0 if none is chosen."""
    total = stats.probs_tN.new_zeros(())
    for name, weight in weights.items():
        if weight:
            total = total + weight * ROUTER_LOSSES[name](stats)
    return total
