"""From router logits to gates: one function per row of the paper.

Letters: T tokens (any leading shape), N experts (routed first, the S shared last), n = N - S, k active routed experts.
Source: "Adaptive Shared Experts with LoRA-Based Mixture of Experts for Multi-Task Learning", arXiv 2510.00570.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ase_dist.tasks import nearest


class Gates(NamedTuple):
    """What a gating mode makes of logits [..., N]; all of them are dense over the experts.

    ``gates`` weigh the experts' outputs and are exactly 0 where ``active`` is False; ``probs`` is the full softmax
    that the router losses look at, 0 for shared experts in the mode that gives these no probability.
    """

    gates: Tensor
    active: Tensor
    probs: Tensor


def joint(logits_TN: Tensor, *, k: int, num_shared: int) -> Gates:
    """Adaptive shared experts, Eq. 8-9: one softmax over the k best routed logits and all shared ones."""
    active_TN = _top_routed(logits_TN, k=k, num_shared=num_shared)
    return Gates(_masked(logits_TN, active_TN).softmax(dim=-1), active_TN, logits_TN.softmax(dim=-1))


def naive(logits_TN: Tensor, *, k: int, num_shared: int) -> Gates:
    """Naive shared experts, Eq. 5: softmax over the routed logits, then top-k, not renormalised; shared gates are 1."""
    routed = logits_TN.shape[-1] - num_shared
    probs_Tn = logits_TN[..., :routed].softmax(dim=-1)
    active_TN = _top_routed(logits_TN, k=k, num_shared=num_shared)
    shared_TS = logits_TN[..., routed:]
    gates_TN = torch.cat([probs_Tn * active_TN[..., :routed], torch.ones_like(shared_TS)], dim=-1)
    return Gates(gates_TN, active_TN, torch.cat([probs_Tn, torch.zeros_like(shared_TS)], dim=-1))


def topk(logits_TN: Tensor, *, k: int, num_shared: int) -> Gates:
    """The LoRA-MoE baseline, Eq. 1-3: softmax over all N logits, then top-k, not renormalised."""
    assert num_shared == 0, "checked by check_gating"
    active_TN = _top_routed(logits_TN, k=k, num_shared=0)
    probs_TN = logits_TN.softmax(dim=-1)
    return Gates(probs_TN * active_TN, active_TN, probs_TN)


def renormalised(logits_TN: Tensor, *, k: int, num_shared: int) -> Gates:
    """Softmax over all N logits, then the active ones divided by their sum: ``joint`` again, by another route.

    exp(z_i) / sum_all over sum_active exp(z_j) / sum_all is exp(z_i) / sum_active exp(z_j), so the two differ by
    rounding alone; a row of the normalisation ablation.
    """
    active_TN = _top_routed(logits_TN, k=k, num_shared=num_shared)
    probs_TN = logits_TN.softmax(dim=-1)
    chosen_TN = probs_TN * active_TN
    return Gates(chosen_TN / chosen_TN.sum(dim=-1, keepdim=True), active_TN, probs_TN)


def separate(logits_TN: Tensor, *, k: int, num_shared: int) -> Gates:
    """One softmax over the k best routed logits and another over the shared ones: the gates of each sum to 1."""
    routed = logits_TN.shape[-1] - num_shared
    active_TN = _top_routed(logits_TN, k=k, num_shared=num_shared)
    masked = _masked(logits_TN, active_TN).split([routed, num_shared], dim=-1)
    parts = [part.softmax(dim=-1) for part in masked]
    gates_TN = torch.cat(parts, dim=-1) if k else torch.cat([torch.zeros_like(parts[0]), parts[1]], dim=-1)
    return Gates(gates_TN, active_TN, logits_TN.softmax(dim=-1))


def dense(logits_TN: Tensor, *, k: int, num_shared: int) -> Gates:
    """Every expert active with its softmax probability; k is not used. For tests and upper bounds."""
    probs_TN = logits_TN.softmax(dim=-1)
    return Gates(probs_TN, torch.ones_like(probs_TN, dtype=torch.bool), probs_TN)


GATINGS: dict[str, Callable[..., Gates]] = {
    "ase": joint,
    "naive": naive,
    "topk": topk,
    "renormalised": renormalised,
    "separate": separate,
    "dense": dense,
}


def check_gating(gating: str, *, num_experts: int, k: int, num_shared: int) -> None:
    """Raise ValueError if N/k/S make no sense together under this mode."""
    if gating not in GATINGS:
        raise ValueError(f"gating: got {gating!r}, wanted one of {list(GATINGS)}{nearest(gating, GATINGS)}")
    if not 0 <= num_shared <= num_experts:
        raise ValueError(f"num_shared: got {num_shared}, wanted 0 to num_experts = {num_experts}")
    if gating == "topk" and num_shared:
        raise ValueError(
            f"num_shared: got {num_shared} with gating='topk', which has no shared experts; set num_shared=0, "
            "or gating='ase' or 'naive'"
        )
    routed = num_experts - num_shared
    least = 0 if num_shared else 1
    if gating != "dense" and not least <= k <= routed:
        raise ValueError(
            f"k: got {k}, wanted {least} to num_experts - num_shared = {routed} active routed experts; "
            "num_experts counts the shared ones"
        )


def _masked(logits_TN: Tensor, active_TN: Tensor) -> Tensor:
    """Minus infinity where inactive; unlike ``masked_fill`` it keeps no mask of its own for the backward pass."""
    return torch.where(active_TN, logits_TN, -torch.inf)


def _top_routed(logits_TN: Tensor, *, k: int, num_shared: int) -> Tensor:
    """Mask [..., N]: the k largest routed logits (exactly k, also under ties) and all shared experts."""
    routed = logits_TN.shape[-1] - num_shared
    active_TN = torch.zeros_like(logits_TN, dtype=torch.bool)
    active_TN[..., routed:] = True
    if k:
        idx_Tk = logits_TN.detach()[..., :routed].topk(k, dim=-1, sorted=False).indices
        active_TN.scatter_(-1, idx_Tk, value=True)
    return active_TN
