"""Router regularisers, as functions of the gates' statistics per task.

Letters: t tasks, N experts. All take means over the tokens of the whole global batch, so that the number of ranks
does not change them. The statistics of several layers may be stacked along a leading axis; a loss is then one for each.
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
    (no gradient), ``gates_tN`` of the gates, ``squared_lse_t`` of logsumexp(logits) squared, where ``z`` is wanted.
    """

    probs_tN: Tensor
    load_tN: Tensor
    gates_tN: Tensor
    squared_lse_t: Tensor | None


def mutual_information(stats: RouterStatistics) -> Tensor:
    """-I(T; E), Mod-Squad's loss (arXiv 2212.08066, Eq. 5): each task sure of its experts, all experts in use.

    P(t, e) is the mean probability p(t, e) of expert e given task t over the number of tasks t. Without probability
    mass for an expert (x log x at 0) the term is 0. With P = p / t, P(t, e) / (P(t) P(e)) is p / (sum_e p * mean_t p).
    """
    p_tN = stats.probs_tN
    tiny = torch.finfo(p_tN.dtype).tiny ** 0.5  # 0 log 0 = 0, and its gradient finite: naive shared experts have P = 0
    independent_tN = p_tN.sum(dim=-1, keepdim=True) * p_tN.mean(dim=-2, keepdim=True)
    ratio_tN = p_tN / independent_tN.clamp(min=tiny)
    return (p_tN * ratio_tN.clamp(min=tiny).log()).sum(dim=(-2, -1)) * (-1 / p_tN.shape[-2])


def cv_squared(stats: RouterStatistics) -> Tensor:
    """Squared coefficient of variation of the experts' importance, the mean gate (Shazeer et al. 2017, Eq. 7)."""
    importance_N = stats.gates_tN.mean(dim=-2)
    mean_1 = importance_N.mean(dim=-1, keepdim=True)
    return (importance_N - mean_1).square().mean(dim=-1) / mean_1.squeeze(-1).square().clamp(min=1e-10)


def switch(stats: RouterStatistics) -> Tensor:
    """N * sum of load times probability (Switch Transformer, Eq. 4), loads as shares of all assignments."""
    load_N = stats.load_tN.mean(dim=-2)
    share_N = load_N / load_N.sum(dim=-1, keepdim=True).clamp(min=1e-10)
    return share_N.shape[-1] * (share_N * stats.probs_tN.mean(dim=-2)).sum(dim=-1)


def z(stats: RouterStatistics) -> Tensor:
    """Mean squared logsumexp of the logits (ST-MoE, Eq. 5): keeps logits small."""
    assert stats.squared_lse_t is not None
    return stats.squared_lse_t.mean(dim=-1)


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
    """The sum of the chosen losses times their weights, over all layers if there are several; 0 if none is chosen."""
    terms = [weight * ROUTER_LOSSES[name](stats) for name, weight in weights.items() if weight]
    total = sum(terms[1:], start=terms[0]) if terms else stats.probs_tN.new_zeros(())
    return total if total.dim() == 0 else total.sum()
