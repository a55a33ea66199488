"""A frozen linear plus a gated low-rank pair, in as few passes over wide tensors as there can be.

    y = act(x) W^T + bias + (repeat(gates, r) * (act(x) A^T)) B^T

Letters: T tokens, D input width, O output width, R = N * r rank columns of N experts side by side. The gates act in
rank space, on [T, R], between two skinny products: inactive experts have gate 0, add nothing and get no gradient, so
this is exact, and the delta is added into the output of the base product, never formed. The backward keeps x, the
rank activations and the gates; it recomputes act(x) and never touches the frozen W but for the input's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ase_dist.ops import products

Activation = Callable[[Tensor], Tensor]


def lowrank_linear(
    x: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    a_RD: Tensor,
    b_OR: Tensor,
    *,
    gates: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """The formula above for x [..., D]: returns [..., O].

    ``gates`` [..., N] weigh N equal groups of R / N columns (None: all 1); a scale such as alpha / r is folded into
    them or into B by the caller. ``activation`` must be elementwise and deterministic: it is run again in backward.
    Under autocast, or where W itself is trained, the same formula is left to PyTorch's autograd; and in a program that
    is exported to run elsewhere.
    """
    if not _is_frozen(weight_OD, bias_O) or not products.may_use_custom_autograd(x):
        x = x if activation is None else activation(x)
        return add_lowrank(F.linear(x, weight_OD, bias_O), x, a_RD, b_OR, gates=gates)
    x_TD = x.reshape(-1, x.shape[-1])
    gates_TN = None if gates is None else gates.reshape(-1, gates.shape[-1])
    y_TO = _LowRankLinear.apply(x_TD, weight_OD, bias_O, a_RD, b_OR, gates_TN, activation)
    return y_TO.view(*x.shape[:-1], weight_OD.shape[0])


def add_lowrank(y: Tensor, x: Tensor, a_RD: Tensor, b_OR: Tensor, *, gates: Tensor | None = None) -> Tensor:
    """y + (repeat(gates, r) * (x A^T)) B^T by plain autograd, for a base that is not a frozen ``nn.Linear``."""
    return y + F.linear(gated(F.linear(x, a_RD), gates), b_OR)


def gated(u: Tensor, gates: Tensor | None) -> Tensor:
    """u [..., N * r] times the gate [..., N] of its group; the product in the gates' precision, the result in u's."""
    if gates is None:
        return u
    return (u.unflatten(-1, (gates.shape[-1], -1)) * gates.unsqueeze(-1)).flatten(-2).to(u.dtype)


def gate_gradient(grad: Tensor, u: Tensor, gates: Tensor) -> Tensor:
    """The gradient [..., N] of ``gated`` with respect to the gates, given that of its result, in their precision."""
    return (grad.to(gates.dtype) * u).unflatten(-1, (gates.shape[-1], -1)).sum(dim=-1)


def is_frozen_linear(module: nn.Module, x: Tensor) -> bool:
    """Whether ``module`` is a plain frozen ``nn.Linear`` whose products with x are for hand-written autograd."""
    return type(module) is nn.Linear and _is_frozen(module.weight, module.bias) and products.may_use_custom_autograd(x)


def _is_frozen(weight_OD: Tensor, bias_O: Tensor | None) -> bool:
    return not weight_OD.requires_grad and (bias_O is None or not bias_O.requires_grad)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_OD: Tensor,
        bias_O: Tensor | None,
        a_RD: Tensor,
        b_OR: Tensor,
        gates_TN: Tensor | None,
        activation: Activation | None,
    ) -> Tensor:
        h_TD = x_TD if activation is None else activation(x_TD)
        u_TR = products.linear(h_TD, a_RD)
        y_TO = products.linear(h_TD, weight_OD, bias_O)
        products.add_linear(y_TO, gated(u_TR, gates_TN), b_OR)
        ctx.save_for_backward(x_TD, weight_OD, a_RD, b_OR, gates_TN, u_TR)
        ctx.activation = activation
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_OD, a_RD, b_OR, gates_TN, u_TR = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, needs_gates, _ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = grad_gates = None

        grad_v_TR = products.linear(grad_TO, b_OR.T)
        grad_u_TR = gated(grad_v_TR, gates_TN)
        if needs_gates:
            grad_gates = gate_gradient(grad_v_TR, u_TR, gates_TN)
        if needs_b:
            grad_b = products.outer(gated(u_TR, gates_TN), grad_TO).T

        h_TD, pull_back = recompute_activation(x_TD, ctx.activation, differentiate=needs_x)
        if needs_a:
            grad_a = products.outer(grad_u_TR, h_TD)
        if needs_x:
            grad_h_TD = products.linear(grad_TO, weight_OD.T)
            grad_x = pull_back(products.add_linear(grad_h_TD, grad_u_TR, a_RD.T))
        return grad_x, None, None, grad_a, grad_b, grad_gates, None


def recompute_activation(x: Tensor, activation: Activation | None, *, differentiate: bool) -> tuple[Tensor, Activation]:
    """act(x) computed again, and the function that pulls a gradient back through it; None is the identity."""
    if activation is None:
        return x, lambda grad: grad
    if not differentiate:
        return activation(x), lambda grad: grad
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = activation(leaf)
    return output.detach(), lambda grad: torch.autograd.grad(output, leaf, grad)[0]
