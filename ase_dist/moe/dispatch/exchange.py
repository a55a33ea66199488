"""All-to-all dispatch: each token goes once to every other rank that has one of its experts, and one sum comes back.

Dropless, with uneven splits: only rows that routing needs are sent. The counts are exchanged once per layer and serve
fc1, fc2 and the backward pass. Rows are under way while the frozen base product and the local experts compute.

Letters: T tokens, D width, O output width, P ranks, m slots per rank, n routed experts, L rows sent, M rows received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ase_dist import collectives
from ase_dist.collectives import Pending
from ase_dist.moe.sharding import Shard
from ase_dist.ops import products
from ase_dist.ops.activations import Activation, recompute_activation
from ase_dist.ops.grouped import Groups, add_rows, group_pairs, take_pairs
from ase_dist.ops.modes import autocast, wants_second_order
from ase_dist.ops.pairs import Pair, as_autocast, flattened_gradients, flattened_pairs, unflattened_pairs


@dataclass(frozen=True)
class TokenExchange:
    """Which rows go where: ``sent`` pairs rows with ranks, ``send[p]`` for rank p, ``receive[p]`` come from it.

    ``local_gates_Tm`` are the gates of this rank's experts for its own tokens, ``remote_gates_Mm`` for the rows that
    arrive; ``local_pairs`` and ``remote_pairs`` how many of them are not 0. ``num_routed`` is n.
    """

    sent: Groups
    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup
    num_routed: int
    local_gates_Tm: Tensor
    remote_gates_Mm: Tensor
    local_pairs: int
    remote_pairs: int

    def start(self, rows_T: Tensor) -> Pending:
        """Send the rows of [T, ...] that other ranks need to the experts: [M, ...]."""
        rows = rows_T.index_select(0, self.sent.row_K)
        return collectives.start_all_to_all_rows(rows, send=self.send, receive=self.receive, group=self.group)

    def start_return(self, rows: Tensor) -> Pending:
        """Send rows [M, ...] back to where they came from: [L, ...]."""
        return collectives.start_all_to_all_rows(rows, send=self.receive, receive=self.send, group=self.group)

    def add_returned(self, y_TO: Tensor, returned_LO: Tensor) -> Tensor:
        """What came back added to its tokens, in place."""
        return add_rows(y_TO, returned_LO, self.sent)

    def local_groups(self) -> Groups:
        """This rank's tokens by its own experts."""
        return group_pairs(self.local_gates_Tm != 0, pairs=self.local_pairs)

    def remote_groups(self) -> Groups:
        """The rows that arrive by the experts that they came for."""
        return group_pairs(self.remote_gates_Mm != 0, pairs=self.remote_pairs)


def plan_exchange(gates_TN: Tensor, active_TN: Tensor, shard: Shard, group: dist.ProcessGroup) -> TokenExchange:
    """A token goes to each *other* rank that has one of its active routed experts, once (collective).

    Uneven splits need the counts on the host: the one time that a layer waits for the device. All shapes follow.
    """
    n, padding = shard.routed, shard.slots * shard.count - shard.routed
    gates_TPm = F.pad(gates_TN[:, :n], (0, padding)).unflatten(1, (shard.count, shard.slots))
    needs_TP = F.pad(active_TN[:, :n], (0, padding)).unflatten(1, (shard.count, shard.slots)).any(dim=2)
    needs_TP[:, shard.index] = False
    counts_P2 = torch.stack([needs_TP.sum(dim=0), (gates_TPm != 0).sum(dim=(0, 2))], dim=1)  # rows, pairs with experts
    each = [1] * shard.count
    theirs_P2 = collectives.start_all_to_all_rows(counts_P2, send=each, receive=each, group=group).wait()
    (send, pairs), (receive, arriving) = torch.stack([counts_P2, theirs_P2]).mT.tolist()
    local_pairs = pairs[shard.index]

    sent = group_pairs(needs_TP, pairs=sum(send))
    remote_gates_Mm = _ExchangeRows.apply(take_pairs(gates_TPm, sent), send, receive, group)
    return TokenExchange(
        sent,
        send,
        receive,
        group,
        num_routed=n,
        local_gates_Tm=gates_TPm[:, shard.index],
        remote_gates_Mm=remote_gates_Mm,
        local_pairs=local_pairs,
        remote_pairs=sum(arriving) - local_pairs,
    )


def exchanged_linear(
    x_TD: Tensor,
    weight_OD: Tensor | None,
    bias_O: Tensor | None,
    local: Sequence[Pair],
    remote: Sequence[Pair],
    exchange: TokenExchange,
    *,
    activation: Activation | None = None,
) -> Tensor:
    """act(x) W^T + bias + the gated pairs of local experts + what remote experts return; without W the pairs alone.

    ``local`` are the pairs of this rank's routed and the shared experts, for its own tokens, ``remote`` those of its
    routed experts for the rows that arrive.
    """
    x_TD, pairs = as_autocast(x_TD, [*local, *remote])
    with autocast(x_TD.device.type, None):
        y_TO: Tensor = _ExchangedLinear.apply(
            x_TD, weight_OD, bias_O, exchange, len(local), activation, *flattened_pairs(pairs)
        )
    return y_TO


class _ExchangedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_OD: Tensor | None,
        bias_O: Tensor | None,
        exchange: TokenExchange,
        num_local: int,
        activation: Activation | None,
        are_dense: tuple[bool, ...],
        *tensors: Tensor,
    ) -> Tensor:
        pairs = unflattened_pairs(are_dense, tensors)
        local, remote = pairs[:num_local], pairs[num_local:]
        h_TD = x_TD if activation is None else activation(x_TD)
        outbound = exchange.start(h_TD)
        narrow = [pair.narrow(h_TD) for pair in local]
        if weight_OD is None:
            y_TO = h_TD.new_zeros(h_TD.shape[0], pairs[0].b.shape[-2])
        else:
            y_TO = products.linear(h_TD, weight_OD, bias_O)
        for pair, u in zip(local, narrow, strict=True):
            pair.add(y_TO, u)
        rows_MD = outbound.wait()
        remote_narrow = [pair.narrow(rows_MD) for pair in remote]
        returned_MO = rows_MD.new_zeros(rows_MD.shape[0], y_TO.shape[1])
        for pair, u in zip(remote, remote_narrow, strict=True):
            pair.add(returned_MO, u)
        exchange.add_returned(y_TO, exchange.start_return(returned_MO).wait())
        ctx.save_for_backward(x_TD, weight_OD, rows_MD, *tensors, *narrow, *remote_narrow)
        ctx.exchange, ctx.activation, ctx.num_local, ctx.are_dense = exchange, activation, num_local, are_dense
        return y_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        require_first_order()
        x_TD, weight_OD, rows_MD, *rest = ctx.saved_tensors
        pairs, narrow = unflattened_pairs(ctx.are_dense, rest), rest[len(rest) - len(ctx.are_dense) :]
        num_local, exchange = ctx.num_local, ctx.exchange
        grad_TO = grad_TO.contiguous()
        outbound = exchange.start(grad_TO)
        h_TD, pull_back = recompute_activation(x_TD, ctx.activation, differentiate=True)
        grad_h_TD = torch.zeros_like(h_TD) if weight_OD is None else products.linear(grad_TO, weight_OD.T)
        grad_MO = outbound.wait()
        grad_rows_MD = torch.zeros_like(rows_MD)
        gradients = [
            pair.backward(grad_MO, rows_MD, u, grad_rows_MD)
            for pair, u in zip(pairs[num_local:], narrow[num_local:], strict=True)
        ]
        inbound = exchange.start_return(grad_rows_MD)
        gradients = [
            pair.backward(grad_TO, h_TD, u, grad_h_TD)
            for pair, u in zip(pairs[:num_local], narrow[:num_local], strict=True)
        ] + gradients
        exchange.add_returned(grad_h_TD, inbound.wait())
        return pull_back(grad_h_TD), None, None, None, None, None, *flattened_gradients(pairs, gradients)


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
        return exchange.start(x_TD).wait()

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:
        """Return the gradients, added up per token."""
        require_first_order()
        grad_LD = ctx.exchange.start_return(grad_MD).wait()
        return ctx.exchange.add_returned(grad_LD.new_zeros(ctx.tokens, grad_LD.shape[1]), grad_LD), None


class ReturnRows(torch.autograd.Function):
    """``apply(y [M, D], exchange)``: the experts' outputs back with their tokens, added up per token, [T, D]."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, exchange: TokenExchange) -> Tensor:
        """Return them."""
        ctx.exchange = exchange
        y_LD = exchange.start_return(y_MD).wait()
        return exchange.add_returned(y_LD.new_zeros(exchange.sent.num_rows, y_LD.shape[1]), y_LD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        """Send the gradients of the rows."""
        require_first_order()
        return ctx.exchange.start(grad_TD).wait(), None


def require_first_order() -> None:
    """Raise where a backward pass through a collective must be differentiable: its derivative is not implemented."""
    if wants_second_order():
        raise NotImplementedError(
            "second derivatives (create_graph=True) through experts that several ranks share: build the layer with "
            "ep_size=1, where they are exact"
        )
