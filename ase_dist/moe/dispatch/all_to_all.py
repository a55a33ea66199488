"""Tokens travel: each token goes once to every other rank that holds one of its experts, and comes back as one sum.

Dropless, with uneven splits: only rows that routing needs are on the wire. The counts are exchanged once per FFN and
serve fc1, fc2 and the backward pass. Rows are in flight while the frozen base product and the experts at home compute.

Letters: T tokens, D width, O output width, P ranks, m slots per rank, M rows received, L rows sent, r rank, R = m * r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ase_dist import collectives
from ase_dist.collectives import Pending
from ase_dist.moe.dispatch.base import FeedForward, Routed, joined
from ase_dist.moe.experts import FFNExperts, LoRAExperts, apply_all, grouped_ffn, lora_pairs
from ase_dist.moe.sharding import Shard
from ase_dist.ops.lowrank import Activation, gate_gradient, gated, recompute_activation


@dataclass(frozen=True)
class Journey:
    """Which rows travel where: ``tokens_L`` of this rank, ``send[p]`` of them to rank p, ``receive[p]`` from it."""

    tokens_L: Tensor
    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup

    def start(self, rows: Tensor) -> Pending:
        """Rows [L, ...] on their way to the experts: [M, ...]."""
        return collectives.start_all_to_all_rows(rows, send=self.send, receive=self.receive, group=self.group)

    def start_back(self, rows: Tensor) -> Pending:
        """Rows [M, ...] on their way home: [L, ...]."""
        return collectives.start_all_to_all_rows(rows, send=self.receive, receive=self.send, group=self.group)


def plan_journey(active_Tn: Tensor, shard: Shard, group: dist.ProcessGroup) -> Journey:
    """A token travels to each *other* rank that holds one of its active experts, once (collective).

    The counts are read back to the host, as uneven splits need; it is the only such wait of a layer.
    """
    slots = shard.slots * shard.count
    needs_TP = F.pad(active_Tn, (0, slots - shard.routed)).unflatten(1, (shard.count, shard.slots)).any(dim=2)
    needs_TP[:, shard.index] = False
    counts_P = needs_TP.sum(dim=0)
    each = [1] * shard.count
    theirs_P = collectives.start_all_to_all_rows(counts_P, send=each, receive=each, group=group).wait()
    tokens_L = needs_TP.T.nonzero()[:, 1]
    send, receive = torch.stack([counts_P, theirs_P]).tolist()
    return Journey(tokens_L, send, receive, group)


class AllToAllDispatch:
    """``Dispatch`` by sending tokens to their experts over ``group``."""

    def __init__(self, bank: LoRAExperts | FFNExperts, *, group: dist.ProcessGroup, shard: Shard) -> None:
        self._group, self._shard = group, shard

    def lora(self, tokens: Routed, base: FeedForward, routed: LoRAExperts, shared: LoRAExperts | None) -> Tensor:
        """See ``Dispatch.lora``."""
        journey, home_Tm, away_Mm = self._begin(tokens)
        home_gates = torch.cat([home_Tm, tokens.gates_TN[:, self._shard.routed :]], dim=1)
        away = lora_pairs(routed.tensors(), routed.places)
        home = lora_pairs(joined(routed.tensors(), shared), routed.places)
        trip = _Trip(journey, home_gates, away_Mm, home, away)
        h = _linear(tokens.x_TD, base.fc1, "fc1", trip)
        y_TD = _linear(h, base.fc2, "fc2", trip, activation=base.act)
        if "bypass" in home:
            y_TD = y_TD + _travel(tokens.x_TD, None, None, "bypass", trip)
        return y_TD

    def ffn(self, tokens: Routed, act: Activation, routed: FFNExperts, shared: FFNExperts | None) -> Tensor:
        """See ``Dispatch.ffn``."""
        journey, home_Tm, away_Mm = self._begin(tokens)
        bank = routed.tensors()
        rows_MD = _Send.apply(tokens.x_TD, journey)
        y_TD = _gated_rows(tokens.x_TD, home_Tm, bank, act)
        if shared is not None:
            y_TD = y_TD + apply_all(tokens.x_TD, tokens.gates_TN[:, self._shard.routed :], shared.tensors(), act)
        return y_TD + _Return.apply(_gated_rows(rows_MD, away_Mm, bank, act), journey, tokens.x_TD.shape[0])

    def _begin(self, tokens: Routed) -> tuple[Journey, Tensor, Tensor]:
        """The journey, the gates [T, m] of the experts at home, and those [M, m] of the rows that arrive."""
        n, shard = self._shard.routed, self._shard
        journey = plan_journey(tokens.active_TN[:, :n], shard, self._group)
        gates_TPm = F.pad(tokens.gates_TN[:, :n], (0, shard.slots * shard.count - n)).unflatten(1, (-1, shard.slots))
        target_L = torch.repeat_interleave(
            torch.arange(shard.count, device=journey.tokens_L.device),
            torch.tensor(journey.send, device=journey.tokens_L.device),
            output_size=sum(journey.send),
        )
        away_Mm = _Exchange.apply(gates_TPm[journey.tokens_L, target_L], journey)
        return journey, gates_TPm[:, shard.index], away_Mm


@dataclass(frozen=True)
class _Trip:
    """The two halves of a layer's experts: at home (own routed and shared), and for the rows that arrive."""

    journey: Journey
    home_gates: Tensor
    away_gates: Tensor
    home: Mapping[str, tuple[Tensor, Tensor]]
    away: Mapping[str, tuple[Tensor, Tensor]]


def _linear(x: Tensor, linear: nn.Module, place: str, trip: _Trip, *, activation: Activation | None = None) -> Tensor:
    """linear(act(x)) plus the gated pairs of all experts; fused and overlapped where ``linear`` is an ``nn.Linear``."""
    if place not in trip.home:
        y: Tensor = linear(x if activation is None else activation(x))
        return y
    if type(linear) is nn.Linear and not torch.is_autocast_enabled(x.device.type):
        return _travel(x, linear.weight, linear.bias, place, trip, activation=activation)
    x = x if activation is None else activation(x)
    return linear(x) + _travel(x, None, None, place, trip)  # type: ignore[no-any-return]


def _travel(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    place: str,
    trip: _Trip,
    *,
    activation: Activation | None = None,
) -> Tensor:
    pairs = (*trip.home[place], *trip.away[place])
    return _TravelLinear.apply(x, weight, bias, *pairs, trip.home_gates, trip.away_gates, trip.journey, activation)


class _TravelLinear(torch.autograd.Function):
    """act(x) W^T + bias + home pairs + what comes back from the experts away; W may be None, for the pairs alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_OD: Tensor | None,
        bias_O: Tensor | None,
        a_RD: Tensor,
        b_OR: Tensor,
        away_a_RD: Tensor,
        away_b_OR: Tensor,
        gates_TN: Tensor,
        away_gates_Mm: Tensor,
        journey: Journey,
        activation: Activation | None,
    ) -> Tensor:
        h_TD = x_TD if activation is None else activation(x_TD)
        outbound = journey.start(h_TD[journey.tokens_L])
        u_TR = h_TD @ a_RD.T
        delta_TR = gated(u_TR, gates_TN)
        y_TO = delta_TR @ b_OR.T if weight_OD is None else F.linear(h_TD, weight_OD, bias_O).addmm_(delta_TR, b_OR.T)
        rows_MD = outbound.wait()
        away_u_MR = rows_MD @ away_a_RD.T
        home_LO = journey.start_back(gated(away_u_MR, away_gates_Mm) @ away_b_OR.T).wait()
        y_TO.index_add_(0, journey.tokens_L, home_LO)
        ctx.save_for_backward(
            x_TD, weight_OD, a_RD, b_OR, away_a_RD, away_b_OR, gates_TN, away_gates_Mm, u_TR, rows_MD, away_u_MR
        )
        ctx.journey, ctx.activation = journey, activation
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        (x_TD, weight_OD, a_RD, b_OR, away_a_RD, away_b_OR, gates_TN, away_gates_Mm, u_TR, rows_MD, away_u_MR) = (
            ctx.saved_tensors
        )
        journey: Journey = ctx.journey
        outbound = journey.start(grad_TO[journey.tokens_L])
        grad_v_TR = grad_TO @ b_OR
        grad_u_TR = gated(grad_v_TR, gates_TN)
        grad_h_TD = grad_u_TR @ a_RD if weight_OD is None else (grad_TO @ weight_OD).addmm_(grad_u_TR, a_RD)
        grad_MO = outbound.wait()
        away_grad_v_MR = grad_MO @ away_b_OR
        away_grad_u_MR = gated(away_grad_v_MR, away_gates_Mm)
        inbound = journey.start_back(away_grad_u_MR @ away_a_RD)
        h_TD, pull_back = recompute_activation(x_TD, ctx.activation, differentiate=True)
        grads = (
            grad_u_TR.T @ h_TD,
            grad_TO.T @ gated(u_TR, gates_TN),
            away_grad_u_MR.T @ rows_MD,
            grad_MO.T @ gated(away_u_MR, away_gates_Mm),
            gate_gradient(grad_v_TR, u_TR, gates_TN),
            gate_gradient(away_grad_v_MR, away_u_MR, away_gates_Mm),
        )
        grad_h_TD.index_add_(0, journey.tokens_L, inbound.wait())
        return pull_back(grad_h_TD), None, None, *grads, None, None


def _gated_rows(x_MD: Tensor, gates_Mm: Tensor, bank: Mapping[str, Tensor], act: Activation) -> Tensor:
    """The gated sum, per row, of this rank's feed-forward experts with a gate: [M, D]."""
    expert_K, row_K = gates_Mm.T.nonzero().unbind(dim=1)  # ascending by expert
    y_KD = grouped_ffn(x_MD[row_K], expert_K, bank, act) * gates_Mm[row_K, expert_K].unsqueeze(-1)
    return torch.zeros_like(x_MD).index_add(0, row_K, y_KD.to(x_MD.dtype))


class _Exchange(torch.autograd.Function):
    """Rows [L, ...] to the experts' ranks [M, ...]; gradients come back the same way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return journey.start(rows).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.start_back(grad).wait(), None


class _Send(torch.autograd.Function):
    """The travelling rows of x [T, D], where they arrive: [M, D]."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, journey: Journey) -> Tensor:
        ctx.journey, ctx.tokens = journey, x_TD.shape[0]
        return journey.start(x_TD[journey.tokens_L]).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:
        home_LD = ctx.journey.start_back(grad_MD).wait()
        return home_LD.new_zeros(ctx.tokens, home_LD.shape[1]).index_add_(0, ctx.journey.tokens_L, home_LD), None


class _Return(torch.autograd.Function):
    """The experts' rows [M, D] back home, added up per token: [T, D]."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, journey: Journey, tokens: int) -> Tensor:
        ctx.journey = journey
        home_LD = journey.start_back(y_MD).wait()
        return home_LD.new_zeros(tokens, home_LD.shape[1]).index_add_(0, journey.tokens_L, home_LD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        return ctx.journey.start(grad_TD[ctx.journey.tokens_L]).wait(), None, None
