"""A frozen feed-forward network with gated low-rank pairs on its linears, as one step of autograd.

    y = fc2(act(fc1(x))), each fc(x) = x W^T + bias + (repeat(gates, r) * (x A^T)) B^T     (Eq. 10, arXiv 2510.00570)

Letters: T tokens, D width, H hidden width, O output width, N experts, R = N * r rank columns side by side.
Of the width H only fc1's output is kept for the backward pass. On a CPU act(.) and the gradients that wide exist for
one band of rows at a time, in memory that stays in the cache, so that a step needs less at its peak than the frozen
network alone does under plain autograd, which holds three more tensors [T, H].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ase_dist.ops import products
from ase_dist.ops.lowrank import Activation, gate_gradient, gated, recompute_activation


class Adapted(NamedTuple):
    """A frozen linear, W [O, D] and bias [O] or None, and its pairs A [R, D], B [O, R], or None for both."""

    weight_OD: Tensor
    bias_O: Tensor | None
    a_RD: Tensor | None
    b_OR: Tensor | None


def gated_ffn(x_TD: Tensor, fc1: Adapted, fc2: Adapted, *, gates_TN: Tensor, activation: Activation) -> Tensor:
    """The formula above: [T, O]. W and bias get no gradient; ``activation`` as in ``lowrank_linear``."""
    return _GatedFFN.apply(x_TD, gates_TN, *fc1, *fc2, activation)


class _GatedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gates_TN: Tensor, *rest: Any) -> Tensor:
        fc1, fc2, activation = Adapted(*rest[:4]), Adapted(*rest[4:8]), rest[8]
        y_TO, kept = [], []
        for rows in _bands(x_TD, fc1):
            h_TH, u1_TR = _adapted(x_TD[rows], fc1, gates_TN[rows])
            y, u2_TR = _adapted(activation(h_TH), fc2, gates_TN[rows])
            y_TO.append(y)
            kept += [h_TH, u1_TR, u2_TR]
        ctx.save_for_backward(x_TD, gates_TN, *fc1, *fc2, *kept)
        ctx.activation = activation
        return _joined(y_TO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gates_TN, *rest = ctx.saved_tensors
        fc1, fc2, kept = Adapted(*rest[:4]), Adapted(*rest[4:8]), rest[8:]
        pair1, pair2 = _PairGradients(fc1), _PairGradients(fc2)
        grad_x: list[Tensor] = []
        grad_gates_TN = torch.zeros_like(gates_TN)
        for i, rows in enumerate(_bands(x_TD, fc1)):
            h_TH, u1_TR, u2_TR = kept[3 * i : 3 * i + 3]
            gates, grad_gates = gates_TN[rows], grad_gates_TN[rows]
            act_TH, pull_back = recompute_activation(h_TH, ctx.activation, differentiate=True)
            grad_u = pair2.add(grad_TO[rows], act_TH, u2_TR, gates, grad_gates)
            grad_h = pull_back(_input_gradient(grad_TO[rows], fc2, grad_u))
            grad_u = pair1.add(grad_h, x_TD[rows], u1_TR, gates, grad_gates)
            if ctx.needs_input_grad[0]:
                grad_x.append(_input_gradient(grad_h, fc1, grad_u))
        grads = (*(None, None), *pair1.result(), *(None, None), *pair2.result())
        return _joined(grad_x) if grad_x else None, grad_gates_TN, *grads, None


class _PairGradients:
    """The gradients of A and B, added up over the bands; B's as [R, O], in which orientation the product is fast."""

    def __init__(self, linear: Adapted) -> None:
        self._b_OR = linear.b_OR
        self._grad_a_RD: Tensor | None = None
        self._grad_b_RO: Tensor | None = None

    def add(
        self, grad_TO: Tensor, x_TD: Tensor, u_TR: Tensor | None, gates_TN: Tensor, grad_gates_TN: Tensor
    ) -> Tensor | None:
        """A band's share, that of the gates added to ``grad_gates_TN`` in place; the gradient of x A^T, [T, R]."""
        if u_TR is None or self._b_OR is None:
            return None
        grad_v_TR = products.linear(grad_TO, self._b_OR.T)
        grad_u_TR = gated(grad_v_TR, gates_TN)
        grad_gates_TN += gate_gradient(grad_v_TR, u_TR, gates_TN)
        self._grad_b_RO = _sum(self._grad_b_RO, products.outer(gated(u_TR, gates_TN), grad_TO))
        self._grad_a_RD = _sum(self._grad_a_RD, products.outer(grad_u_TR, x_TD))
        return grad_u_TR

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of A [R, D] and B [O, R]."""
        return self._grad_a_RD, None if self._grad_b_RO is None else self._grad_b_RO.T


def _bands(x_TD: Tensor, fc1: Adapted) -> list[slice]:
    """Rows whose tensors [rows, H] are a band."""
    return products.row_chunks(x_TD[:, :1].expand(-1, fc1.weight_OD.shape[0]))


def _adapted(x_TD: Tensor, linear: Adapted, gates_TN: Tensor) -> tuple[Tensor, Tensor | None]:
    """A linear's output [T, O] and its rank activations [T, R]."""
    y_TO = products.linear(x_TD, linear.weight_OD, linear.bias_O)
    if linear.a_RD is None or linear.b_OR is None:
        return y_TO, None
    u_TR = products.linear(x_TD, linear.a_RD)
    return products.add_linear(y_TO, gated(u_TR, gates_TN), linear.b_OR), u_TR


def _input_gradient(grad_TO: Tensor, linear: Adapted, grad_u_TR: Tensor | None) -> Tensor:
    grad_x_TD = products.linear(grad_TO, linear.weight_OD.T)
    if grad_u_TR is None or linear.a_RD is None:
        return grad_x_TD
    return products.add_linear(grad_x_TD, grad_u_TR, linear.a_RD.T)


def _sum(total: Tensor | None, share: Tensor) -> Tensor:
    return share if total is None else total.add_(share)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
