"""All-to-all dispatch: each token goes once to every other rank that has one of its experts, and one sum comes back.

Dropless, with uneven splits: only rows that routing needs are sent. The counts are exchanged once per layer and serve
fc1, fc2 and the backward pass. Rows are under way while the frozen base product and the local experts compute.

Letters: T tokens, D width, O output width, P ranks, m slots per rank, n routed experts, L rows sent, M rows received,
r rank, R = m * r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ase_dist import collectives
from ase_dist.collectives import Pending
from ase_dist.moe.sharding import Shard
from ase_dist.ops.activations import Activation, recompute_activation
from ase_dist.ops.lowrank import gate_gradient, gated
from ase_dist.ops.modes import wants_second_order


@dataclass(frozen=True)
class TokenExchange:
    """Which rows go where: ``tokens_L`` of this rank, ``send[p]`` of them to rank p, ``receive[p]`` from it.

    ``local_gates_Tm`` are the gates of this rank's experts for its own tokens, ``remote_gates_Mm`` for the rows that
    arrive; ``num_routed`` is n.
    """

    tokens_L: Tensor
    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup
    num_routed: int
    local_gates_Tm: Tensor
    remote_gates_Mm: Tensor

    def start(self, rows: Tensor) -> Pending:
        """Send rows [L, ...] to the experts: [M, ...]."""
        return collectives.start_all_to_all_rows(rows, send=self.send, receive=self.receive, group=self.group)

    def start_return(self, rows: Tensor) -> Pending:
        """Send rows [M, ...] back to where they came from: [L, ...]."""
        return collectives.start_all_to_all_rows(rows, send=self.receive, receive=self.send, group=self.group)


def plan_exchange(gates_TN: Tensor, active_TN: Tensor, shard: Shard, group: dist.ProcessGroup) -> TokenExchange:
    """A token goes to each *other* rank that has one of its active routed experts, once (collective).

    The counts are read back to the host, as uneven splits need.
    """
    n, padding = shard.routed, shard.slots * shard.count - shard.routed
    needs_TP = F.pad(active_TN[:, :n], (0, padding)).unflatten(1, (shard.count, shard.slots)).any(dim=2)
    needs_TP[:, shard.index] = False
    counts_P = needs_TP.sum(dim=0)
    each = [1] * shard.count
    theirs_P = collectives.start_all_to_all_rows(counts_P, send=each, receive=each, group=group).wait()
    tokens_L = needs_TP.T.nonzero()[:, 1]
    send, receive = torch.stack([counts_P, theirs_P]).tolist()

    gates_TPm = F.pad(gates_TN[:, :n], (0, padding)).unflatten(1, (-1, shard.slots))
    device = tokens_L.device
    target_L = torch.repeat_interleave(
        torch.arange(shard.count, device=device), torch.tensor(send, device=device), output_size=sum(send)
    )
    remote_gates_Mm = _ExchangeRows.apply(gates_TPm[tokens_L, target_L], send, receive, group)
    return TokenExchange(tokens_L, send, receive, group, n, gates_TPm[:, shard.index], remote_gates_Mm)


def exchanged_linear(
    x_TD: Tensor,
    weight_OD: Tensor | None,
    bias_O: Tensor | None,
    pairs: tuple[Tensor, Tensor, Tensor, Tensor],
    local_gates: Tensor,
    exchange: TokenExchange,
    *,
    activation: Activation | None = None,
) -> Tensor:
    """act(x) W^T + bias + the gated pairs of local experts + what remote experts return; without W the pairs alone.

    ``pairs`` are A and B of this rank's routed and the shared experts (for its own tokens), then A and B of its routed
    experts (for the rows that arrive).
    """
    return _ExchangedLinear.apply(
        x_TD, weight_OD, bias_O, *pairs, local_gates, exchange.remote_gates_Mm, exchange, activation
    )


class _ExchangedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_OD: Tensor | None,
        bias_O: Tensor | None,
        a_RD: Tensor,
        b_OR: Tensor,
        remote_a_RD: Tensor,
        remote_b_OR: Tensor,
        gates_TN: Tensor,
        remote_gates_Mm: Tensor,
        exchange: TokenExchange,
        activation: Activation | None,
    ) -> Tensor:
        h_TD = x_TD if activation is None else activation(x_TD)
        outbound = exchange.start(h_TD[exchange.tokens_L])
        u_TR = h_TD @ a_RD.T
        delta_TR = gated(u_TR, gates_TN)
        y_TO = delta_TR @ b_OR.T if weight_OD is None else F.linear(h_TD, weight_OD, bias_O).addmm_(delta_TR, b_OR.T)
        rows_MD = outbound.wait()
        remote_u_MR = rows_MD @ remote_a_RD.T
        returned_LO = exchange.start_return(gated(remote_u_MR, remote_gates_Mm) @ remote_b_OR.T).wait()
        y_TO.index_add_(0, exchange.tokens_L, returned_LO)
        saved = (x_TD, weight_OD, a_RD, b_OR, remote_a_RD, remote_b_OR, gates_TN, remote_gates_Mm)
        ctx.save_for_backward(*saved, u_TR, rows_MD, remote_u_MR)
        ctx.exchange, ctx.activation = exchange, activation
        return y_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        require_first_order()
        x_TD, weight_OD, a_RD, b_OR, remote_a_RD, remote_b_OR, gates_TN, remote_gates_Mm, *kept = ctx.saved_tensors
        u_TR, rows_MD, remote_u_MR = kept
        exchange: TokenExchange = ctx.exchange
        outbound = exchange.start(grad_TO[exchange.tokens_L])
        grad_v_TR = grad_TO @ b_OR
        grad_u_TR = gated(grad_v_TR, gates_TN)
        grad_h_TD = grad_u_TR @ a_RD if weight_OD is None else (grad_TO @ weight_OD).addmm_(grad_u_TR, a_RD)
        grad_MO = outbound.wait()
        remote_grad_v_MR = grad_MO @ remote_b_OR
        remote_grad_u_MR = gated(remote_grad_v_MR, remote_gates_Mm)
        inbound = exchange.start_return(remote_grad_u_MR @ remote_a_RD)
        h_TD, pull_back = recompute_activation(x_TD, ctx.activation, differentiate=True)
        grads = (
            grad_u_TR.T @ h_TD,
            grad_TO.T @ gated(u_TR, gates_TN),
            remote_grad_u_MR.T @ rows_MD,
            grad_MO.T @ gated(remote_u_MR, remote_gates_Mm),
            gate_gradient(grad_v_TR, u_TR, gates_TN),
            gate_gradient(remote_grad_v_MR, remote_u_MR, remote_gates_Mm),
        )
        grad_h_TD.index_add_(0, exchange.tokens_L, inbound.wait())
        return pull_back(grad_h_TD), None, None, *grads, None, None


class _ExchangeRows(torch.autograd.Function):
    """Rows [L, ...] to the experts' ranks [M, ...]; gradients come back the same way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return collectives.start_all_to_all_rows(rows, send=send, receive=receive, group=group).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        require_first_order()
        own = collectives.start_all_to_all_rows(grad, send=ctx.receive, receive=ctx.send, group=ctx.group).wait()
        return own, None, None, None


class SendRows(torch.autograd.Function):
    """``apply(x [T, D], exchange)``: the rows of x that other ranks' experts need, where they arrive, [M, D]."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, exchange: TokenExchange) -> Tensor:
        """Send them."""
        ctx.exchange, ctx.tokens = exchange, x_TD.shape[0]
        return exchange.start(x_TD[exchange.tokens_L]).wait()

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:
        """Return the gradients, added up per token."""
        require_first_order()
        grad_LD = ctx.exchange.start_return(grad_MD).wait()
        return grad_LD.new_zeros(ctx.tokens, grad_LD.shape[1]).index_add_(0, ctx.exchange.tokens_L, grad_LD), None


class ReturnRows(torch.autograd.Function):
    """``apply(y [M, D], exchange, T)``: the experts' outputs back with their tokens, added up per token, [T, D]."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, exchange: TokenExchange, tokens: int) -> Tensor:
        """Return them."""
        ctx.exchange = exchange
        y_LD = exchange.start_return(y_MD).wait()
        return y_LD.new_zeros(tokens, y_LD.shape[1]).index_add_(0, exchange.tokens_L, y_LD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        """Send the gradients of the rows."""
        require_first_order()
        return ctx.exchange.start(grad_TD[ctx.exchange.tokens_L]).wait(), None, None


def require_first_order() -> None:
    """Raise where a backward pass through a collective must be differentiable: its derivative is not implemented."""
    if wants_second_order():
        raise NotImplementedError(
            "second derivatives (create_graph=True) through experts that several ranks share: build the layer with "
            "ep_size=1, where they are exact"
        )
