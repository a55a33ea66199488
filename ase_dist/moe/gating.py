"""From router logits to gates: one function per mode, listed in ``ase_dist.registries.GATINGS``.

Letters: T tokens (any leading shape), N experts (routed first, the S shared last), n = N - S, k active routed experts.
Source: "Adaptive Shared Experts with LoRA-Based Mixture of Experts for Multi-Task Learning", arXiv 2510.00570.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ase_dist.errors import UserError
from ase_dist.ops import kernels, modes
from ase_dist.ops.modes import may_use_custom_autograd
from ase_dist.registries import GATINGS


class Gates(NamedTuple):
    """What a gating mode makes of logits [..., N]; all of them are dense over the experts.

    ``gates`` weigh the experts' outputs and are exactly 0 where ``active`` is False; ``probs`` is the full softmax
    that the router losses look at, 0 for shared experts in the mode that gives these no probability. All shared
    experts are active, and as many routed ones for one token as for another.
    """

    gates: Tensor
    active: Tensor
    probs: Tensor


class GatingMode(Protocol):
    """What ``GATINGS`` lists; a new one is held to ``Gates`` by ``check_gating``."""

    def __call__(self, logits_TN: Tensor, *, k: int, num_shared: int) -> Gates:
        """Gates of logits [..., N]; UserError for a k or number of shared experts that the mode cannot have."""


def joint(logits_TN: Tensor, *, k: int, num_shared: int) -> Gates:
    """Adaptive shared experts, Eq. 8-9: one softmax over the k best routed logits and all shared ones."""
    if modes.stacks_products(logits_TN) and may_use_custom_autograd(logits_TN) and not torch.compiler.is_compiling():
        return Gates(*_Joint.apply(logits_TN, k, num_shared))
    active_TN = top_routed(logits_TN, k=k, num_shared=num_shared)
    return Gates(_masked(logits_TN, active_TN).softmax(dim=-1), active_TN, logits_TN.softmax(dim=-1))


def naive(logits_TN: Tensor, *, k: int, num_shared: int) -> Gates:
    """Naive shared experts, Eq. 5: softmax over the routed logits, then top-k, not renormalised; shared gates are 1."""
    routed = logits_TN.shape[-1] - num_shared
    probs_Tn = logits_TN[..., :routed].softmax(dim=-1)
    active_TN = top_routed(logits_TN, k=k, num_shared=num_shared)
    shared_TS = logits_TN[..., routed:]
    gates_TN = torch.cat([probs_Tn * active_TN[..., :routed], torch.ones_like(shared_TS)], dim=-1)
    return Gates(gates_TN, active_TN, torch.cat([probs_Tn, torch.zeros_like(shared_TS)], dim=-1))


def topk(logits_TN: Tensor, *, k: int, num_shared: int) -> Gates:
    """The LoRA-MoE baseline, Eq. 1-3: softmax over all N logits, then top-k, not renormalised."""
    if num_shared:
        raise UserError(
            f"num_shared: got {num_shared} with gating='topk', which has no shared experts; set num_shared=0, "
            "or gating='ase' or 'naive'"
        )
    active_TN = top_routed(logits_TN, k=k, num_shared=0)
    probs_TN = logits_TN.softmax(dim=-1)
    return Gates(probs_TN * active_TN, active_TN, probs_TN)


def renormalised(logits_TN: Tensor, *, k: int, num_shared: int) -> Gates:
    """Softmax over all N logits, then the active ones divided by their sum: ``joint`` computed in another way.

    exp(z_i) / sum_all over sum_active exp(z_j) / sum_all is exp(z_i) / sum_active exp(z_j), so the two differ by
    rounding alone; a mode of the normalisation ablation.
    """
    active_TN = top_routed(logits_TN, k=k, num_shared=num_shared)
    probs_TN = logits_TN.softmax(dim=-1)
    chosen_TN = probs_TN * active_TN
    return Gates(chosen_TN / chosen_TN.sum(dim=-1, keepdim=True), active_TN, probs_TN)


def separate(logits_TN: Tensor, *, k: int, num_shared: int) -> Gates:
    """One softmax over the k best routed logits and another over the shared ones: the gates of each sum to 1."""
    routed = logits_TN.shape[-1] - num_shared
    active_TN = top_routed(logits_TN, k=k, num_shared=num_shared)
    masked = _masked(logits_TN, active_TN).split([routed, num_shared], dim=-1)
    parts = [part.softmax(dim=-1) for part in masked]
    gates_TN = torch.cat(parts, dim=-1) if k else torch.cat([torch.zeros_like(parts[0]), parts[1]], dim=-1)
    return Gates(gates_TN, active_TN, logits_TN.softmax(dim=-1))


def dense(logits_TN: Tensor, *, k: int, num_shared: int) -> Gates:
    """Every expert active with its softmax probability; k is not used. For tests and upper bounds."""
    probs_TN = logits_TN.softmax(dim=-1)
    return Gates(probs_TN, torch.ones_like(probs_TN, dtype=torch.bool), probs_TN)


def check_gating(gating: str, *, num_experts: int, k: int, num_shared: int) -> int:
    """How many routed experts act on a token under this mode: k, or all of them in one that is dense.

    Raises UserError if N/k/S make no sense together, and for a mode whose gates are not what ``Gates`` says.
    """
    if gating not in GATINGS:
        raise UserError(f"gating: {GATINGS.refusal(gating)}")
    if not 0 <= num_shared <= num_experts:
        raise UserError(f"num_shared: got {num_shared}, wanted 0 to num_experts = {num_experts}")
    routed = num_experts - num_shared
    least = 0 if num_shared else 1
    if not least <= k <= routed:
        raise UserError(
            f"k: got {k}, wanted {least} to num_experts - num_shared = {routed} active routed experts; "
            "num_experts counts the shared ones"
        )

    # tried on three tokens: logits that rise, that fall, and equal ones
    rising_N = torch.linspace(-1, 1, num_experts, device="cpu", dtype=torch.float32)
    logits_TN = torch.stack([rising_N, rising_N.flip(0), torch.zeros_like(rising_N)])
    found = GATINGS[gating](logits_TN, k=k, num_shared=num_shared)
    counts_T = found.active[:, :routed].sum(dim=1).tolist()
    rules = {
        "gates, active and probs are as large as the logits": all(t.shape == logits_TN.shape for t in found),
        "gates are 0 where an expert is inactive": not bool(found.gates[~found.active].any()),
        "shared experts, the last, are active": bool(found.active[:, routed:].all()),
        "every token has as many active routed experts": len(set(counts_T)) == 1,
    }
    for rule, holds in rules.items():
        if not holds:
            raise UserError(f"gating: {gating!r} breaks a rule of ase_dist.moe.gating.Gates: {rule}")
    return int(counts_T[0])


class _Joint(torch.autograd.Function):
    """``joint`` in one kernel, on an accelerator; its backward pass, of softmaxes, can be differentiated as it is."""

    @staticmethod
    def forward(ctx: Any, logits_TN: Tensor, k: int, num_shared: int) -> tuple[Tensor, Tensor, Tensor]:
        gates_TN, active_TN, probs_TN = kernels.route_jointly(logits_TN, k, num_shared)
        ctx.save_for_backward(gates_TN, probs_TN)
        ctx.mark_non_differentiable(active_TN)
        ctx.set_materialize_grads(False)
        return gates_TN, active_TN, probs_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        total = None
        for grad, output in zip((grads[0], grads[2]), ctx.saved_tensors, strict=True):
            if grad is not None:
                found = torch.ops.aten._softmax_backward_data(grad, output, -1, output.dtype)
                total = found if total is None else total + found
        return total, None, None


def _masked(logits_TN: Tensor, active_TN: Tensor) -> Tensor:
    """Minus infinity where inactive; unlike ``masked_fill`` it keeps no mask of its own for the backward pass.

    The number is made on the device: ``where`` would wait for the device to copy one of the host there.
    """
    return torch.where(active_TN, logits_TN, logits_TN.new_full((), -torch.inf))


def top_routed(logits_TN: Tensor, *, k: int, num_shared: int) -> Tensor:
    """Mask [..., N]: the k largest routed logits (exactly k, also under ties) and all shared experts."""
    routed = logits_TN.shape[-1] - num_shared
    active_TN = torch.zeros_like(logits_TN, dtype=torch.bool)
    active_TN[..., routed:].fill_(True)
    if k:
        idx_Tk = logits_TN.detach()[..., :routed].topk(k, dim=-1, sorted=False).indices
        active_TN.scatter_(-1, idx_Tk, value=True)
    return active_TN
