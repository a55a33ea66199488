"""A frozen linear plus gated low-rank pairs that are computed for all experts at once, or for a row's own experts only.

    dense     y += (repeat(gates, r) * (x A^T)) B^T        N * r columns whatever is active; two products
    grouped   y[t] += sum over t's experts e of gate (x[t] A_e^T) B_e^T        k * r columns, in groups by expert

The two are the same function. Gates act in rank space; a pair's gradients need its narrow values u = x A^T alone.

Letters: T rows, D input width, O output width, N experts side by side, n experts in groups, r rank, R = N * r,
K pairs of a row and an expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ase_dist.ops import grouped, products
from ase_dist.ops.activations import Activation, recompute_activation
from ase_dist.ops.grouped import Groups, combined_product, gathered_product
from ase_dist.ops.lowrank import gate_gradient, gated
from ase_dist.ops.modes import autocast, autocast_dtype, differentiable_gradients, wants_second_order

PairGradients = tuple[Tensor, Tensor, Tensor]  # of A, B and the gates


class DensePair(NamedTuple):
    """A [R, D], B [O, R] and gates [T, N] of all experts side by side."""

    a: Tensor
    b: Tensor
    gates: Tensor

    def narrow(self, x_TD: Tensor) -> Tensor:
        """x A^T: [T, R]."""
        return products.linear(x_TD, self.a)

    def add(self, y_TO: Tensor, u_TR: Tensor) -> Tensor:
        """The pair's output added to y in place."""
        return products.add_linear(y_TO, gated(u_TR, self.gates), self.b)

    def backward(self, grad_TO: Tensor, x_TD: Tensor, u_TR: Tensor, grad_x_TD: Tensor | None) -> PairGradients:
        """Gradients of A, B and gates; that of x is added to ``grad_x_TD`` in place."""
        grad_v_TR = products.linear(grad_TO, self.b.T)
        grad_u_TR = gated(grad_v_TR, self.gates)
        if grad_x_TD is not None:
            products.add_linear(grad_x_TD, grad_u_TR, self.a.T)
        grad_b_OR = products.outer(gated(u_TR, self.gates), grad_TO).T
        return products.outer(grad_u_TR, x_TD), grad_b_OR, gate_gradient(grad_v_TR, u_TR, self.gates)

    def plain(self, x_TD: Tensor) -> Tensor:
        """The pair's output [T, O] by plain autograd."""
        return F.linear(gated(F.linear(x_TD, self.a), self.gates), self.b)


class GroupedPair(NamedTuple):
    """A [n, r, D], B [n, O, r] of n experts, and the gates [K] of the pairs in ``groups``."""

    a: Tensor
    b: Tensor
    gates: Tensor
    groups: Groups

    def narrow(self, x_TD: Tensor) -> Tensor:
        """x A^T for each pair: [K, r]."""
        return grouped.product(x_TD, self.a.mT, self.groups)

    def add(self, y_TO: Tensor, u_Kr: Tensor) -> Tensor:
        """The pairs' outputs added to y in place."""
        return grouped.add_product(y_TO, self._gated(u_Kr), self.b.mT, self.groups)

    def backward(self, grad_TO: Tensor, x_TD: Tensor, u_Kr: Tensor, grad_x_TD: Tensor | None) -> PairGradients:
        """Gradients of A, B and gates; that of x is added to ``grad_x_TD`` in place."""
        grad_v_Kr = grouped.product(grad_TO, self.b, self.groups)
        grad_u_Kr = self._gated(grad_v_Kr)
        if grad_x_TD is not None:
            grouped.add_product(grad_x_TD, grad_u_Kr, self.a, self.groups)
        grad_b_nOr = grouped.outer(self._gated(u_Kr), grad_TO, self.groups).mT
        grad_gates_K = (grad_v_Kr.to(self.gates.dtype) * u_Kr).sum(dim=-1)
        return grouped.outer(grad_u_Kr, x_TD, self.groups), grad_b_nOr, grad_gates_K

    def plain(self, x_TD: Tensor) -> Tensor:
        """The pairs' summed output [T, O], differentiable any number of times."""
        u_Kr = gathered_product(x_TD, self.a.mT, self.groups)
        return combined_product(self._gated(u_Kr), self.b.mT, self.groups)

    def _gated(self, u_Kr: Tensor) -> Tensor:
        return (u_Kr * self.gates.unsqueeze(-1)).to(u_Kr.dtype)


Pair = DensePair | GroupedPair


def paired_linear(
    x_TD: Tensor,
    weight_OD: Tensor | None,
    bias_O: Tensor | None,
    pairs: Sequence[Pair],
    *,
    activation: Activation | None = None,
) -> Tensor:
    """act(x) W^T + bias + the pairs' outputs, [T, O], in one step of autograd; without W the pairs' alone.

    W and bias get no gradient. ``activation`` must be elementwise and deterministic: it is run again in backward.
    Under autocast the pairs are cast to its type.
    """
    x_TD, pairs = as_autocast(x_TD, pairs)
    with autocast(x_TD.device.type, None):
        if torch.compiler.is_compiling():  # which decides itself what to compute again, and traces no gradient inside
            return _plain(x_TD, weight_OD, bias_O, pairs, activation)
        y_TO: Tensor = _PairedLinear.apply(x_TD, weight_OD, bias_O, activation, *flattened_pairs(pairs))
    return y_TO


def as_autocast(x_TD: Tensor, pairs: Sequence[Pair]) -> tuple[Tensor, Sequence[Pair]]:
    """x and the pairs in the type that autocast casts to at this moment; as they are where it is off."""
    dtype = autocast_dtype(x_TD.device.type)
    if dtype is None:
        return x_TD, pairs
    return x_TD.to(dtype), [pair._replace(a=pair.a.to(dtype), b=pair.b.to(dtype)) for pair in pairs]


def flattened_pairs(pairs: Sequence[Pair]) -> tuple[Any, ...]:
    """The pairs as arguments of an autograd function: whether each is dense, then all their tensors."""
    tensors = [t for p in pairs for t in (p[:3] if isinstance(p, DensePair) else (*p[:3], *p.groups))]
    return tuple(isinstance(pair, DensePair) for pair in pairs), *tensors


def unflattened_pairs(are_dense: Sequence[bool], tensors: Iterable[Tensor]) -> list[Pair]:
    """The pairs again."""
    rest = iter(tensors)
    pairs: list[Pair] = []
    for is_dense in are_dense:
        a, b, gates = islice(rest, 3)
        pairs.append(DensePair(a, b, gates) if is_dense else GroupedPair(a, b, gates, Groups(*islice(rest, 5))))
    return pairs


def flattened_gradients(pairs: Sequence[Pair], gradients: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """What ``backward`` returns for ``flattened_pairs(pairs)``."""
    flat: list[Tensor | None] = [None]
    for pair, found in zip(pairs, gradients, strict=True):
        flat += [*found, *([] if isinstance(pair, DensePair) else [None] * len(pair.groups))]
    return flat


def _plain(
    x_TD: Tensor,
    weight_OD: Tensor | None,
    bias_O: Tensor | None,
    pairs: Sequence[Pair],
    activation: Activation | None,
) -> Tensor:
    """``paired_linear`` by autograd of its parts."""
    h_TD = x_TD if activation is None else activation(x_TD)
    y_TO = None if weight_OD is None else F.linear(h_TD, weight_OD, bias_O)
    for pair in pairs:
        delta_TO = pair.plain(h_TD)
        y_TO = delta_TO if y_TO is None else y_TO + delta_TO
    assert y_TO is not None
    return y_TO


class _PairedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_OD: Tensor | None,
        bias_O: Tensor | None,
        activation: Activation | None,
        are_dense: tuple[bool, ...],
        *tensors: Tensor,
    ) -> Tensor:
        pairs = unflattened_pairs(are_dense, tensors)
        h_TD = x_TD if activation is None else activation(x_TD)
        narrow = [pair.narrow(h_TD) for pair in pairs]
        if weight_OD is None:
            y_TO = h_TD.new_zeros(h_TD.shape[0], pairs[0].b.shape[-2])
        else:
            y_TO = products.linear(h_TD, weight_OD, bias_O)
        for pair, u in zip(pairs, narrow, strict=True):
            pair.add(y_TO, u)
        ctx.save_for_backward(x_TD, weight_OD, *tensors, *narrow)
        ctx.activation, ctx.are_dense = activation, are_dense
        return y_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_OD, *rest = ctx.saved_tensors
        narrow = rest[len(rest) - len(ctx.are_dense) :]
        pairs = unflattened_pairs(ctx.are_dense, rest)
        needs_x = ctx.needs_input_grad[0]
        if wants_second_order():

            def plain(x: Tensor, *tensors: Tensor) -> Tensor:
                parts = iter(tensors)
                own = [pair._replace(a=next(parts), b=next(parts), gates=next(parts)) for pair in pairs]
                return _plain(x, weight_OD, None, own, ctx.activation)

            inputs = [x_TD, *(tensor for pair in pairs for tensor in pair[:3])]
            grad_x, *found = differentiable_gradients(plain, inputs, [t.requires_grad for t in inputs], grad_TO)
            triples = [found[i : i + 3] for i in range(0, len(found), 3)]
            return grad_x, None, None, None, *flattened_gradients(pairs, triples)

        grad_TO = grad_TO.contiguous()
        h_TD, pull_back = recompute_activation(x_TD, ctx.activation, differentiate=needs_x)
        if not needs_x:
            grad_h_TD = None
        elif weight_OD is None:
            grad_h_TD = torch.zeros_like(h_TD)
        else:
            grad_h_TD = products.linear(grad_TO, weight_OD.T)
        gradients = [pair.backward(grad_TO, h_TD, u, grad_h_TD) for pair, u in zip(pairs, narrow, strict=True)]
        grad_x = None if grad_h_TD is None else pull_back(grad_h_TD)
        return grad_x, None, None, None, *flattened_gradients(pairs, gradients)
