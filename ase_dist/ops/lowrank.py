"""Gated low-rank pairs on frozen linears, one linear or a whole feed-forward network, as single steps of autograd.

    linear   y = act(x) W^T + bias + (repeat(gates, r) * (act(x) A^T)) B^T
    FFN      y = fc2(act(fc1(x))), each fc such a linear without its own activation   (Eq. 10, arXiv 2510.00570)

Letters: T tokens, D input width, H hidden width, O output width, N experts, R = N * r rank columns side by side.
The gates act in rank space, on [T, R], between two skinny products: inactive experts have gate 0, add nothing and get
no gradient, so this is exact. The delta is added into the output of the base product and never formed.

For the backward pass a linear keeps x, the rank activations and the gates and recomputes act(x); the FFN keeps fc1's
output, the only tensor [T, H]. On a CPU act(.) and the gradients that wide exist for one chunk of rows at a time, in
memory that stays in the cache: a step needs less at its peak than the frozen network under plain autograd, which holds
three more tensors [T, H]. The frozen W is read in the backward pass for the input's gradient only.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ase_dist.ops import products
from ase_dist.ops.activations import Activation, recompute_activation
from ase_dist.ops.joined import JoinedLinear
from ase_dist.ops.modes import differentiable_gradients, may_use_custom_autograd, wants_second_order


class AdaptedLinear(NamedTuple):
    """A frozen linear, W [O, D] and bias [O] or None, and its pairs A [R, D], B [O, R], or None for both."""

    weight_OD: Tensor
    bias_O: Tensor | None
    a_RD: Tensor | None
    b_OR: Tensor | None


def gated_ffn(
    x_TD: Tensor, fc1: AdaptedLinear, fc2: AdaptedLinear, *, gates_TN: Tensor, activation: Activation
) -> Tensor:
    """The FFN above: [T, O]. W and bias get no gradient; ``activation`` as in ``lowrank_linear``."""
    return _GatedFFN.apply(x_TD, gates_TN, *fc1, *fc2, activation)


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
    """The linear above for x [..., D]: returns [..., O].

    ``gates`` [..., N] weigh N equal groups of R / N columns (None: all 1); a scale such as alpha / r is folded into
    them or into B by the caller. ``activation`` must be elementwise and deterministic: it is run again in backward
    (``check_activation``). Under autocast, where W itself is trained, and in a program that is exported to run
    elsewhere the same formula is left to PyTorch's autograd.
    """
    if not _is_frozen(weight_OD, bias_O) or not may_use_custom_autograd(x):
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


# ---------------------------------------------------------------------------------------------------------------------
# Which modules the formulas may stand for


def is_plain_linear(module: nn.Module | JoinedLinear) -> TypeGuard[nn.Linear]:
    """Whether a call of ``module`` is the product with its weight and nothing else; of joined linears, of each.

    Not for subclasses (quantised or parametrised linears), nor where hooks or a replaced ``forward`` (pruning, CPU
    offload, feature extraction) must run: such a module is called. DeepSpeed's own hooks do not count: ZeRO-3's gather
    the weight, which reading it does too.
    """
    if isinstance(module, JoinedLinear):
        return all(map(is_plain_linear, module.parts))
    tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks = [hook for table in tables for hook in table.values()]
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and all((getattr(hook, "__module__", None) or "").startswith("deepspeed.") for hook in hooks)
    )


def is_frozen_linear(module: nn.Module | JoinedLinear, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether ``module`` is a plain frozen linear whose products with x may have hand-written autograd."""
    if isinstance(module, JoinedLinear):
        return all(is_frozen_linear(part, x) for part in module.parts)
    return is_plain_linear(module) and _is_frozen(module.weight, module.bias) and may_use_custom_autograd(x)


def _is_frozen(weight_OD: Tensor, bias_O: Tensor | None) -> bool:
    return not weight_OD.requires_grad and (bias_O is None or not bias_O.requires_grad)


# ---------------------------------------------------------------------------------------------------------------------
# The linear


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
        h_TD = products.dense(x_TD if activation is None else activation(x_TD))
        u_TR = products.linear(h_TD, a_RD)
        y_TO = products.linear(h_TD, weight_OD, bias_O)
        products.add_linear(y_TO, gated(u_TR, gates_TN), b_OR)
        ctx.save_for_backward(x_TD, weight_OD, bias_O, a_RD, b_OR, gates_TN, u_TR)
        ctx.activation = activation
        return y_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_OD, bias_O, a_RD, b_OR, gates_TN, u_TR = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, needs_gates, _ = ctx.needs_input_grad
        if wants_second_order():

            def plain(x: Tensor, a: Tensor, b: Tensor, gates: Tensor | None) -> Tensor:
                h = x if ctx.activation is None else ctx.activation(x)
                return add_lowrank(F.linear(h, weight_OD, bias_O), h, a, b, gates=gates)

            needed = (needs_x, needs_a, needs_b, needs_gates)
            grad_x, *grads = differentiable_gradients(plain, (x_TD, a_RD, b_OR, gates_TN), needed, grad_TO)
            return grad_x, None, None, *grads, None

        grad_TO = products.dense(grad_TO)
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


# ---------------------------------------------------------------------------------------------------------------------
# The feed-forward network


class _GatedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gates_TN: Tensor, *rest: Any) -> Tensor:
        fc1, fc2, activation = AdaptedLinear(*rest[:4]), AdaptedLinear(*rest[4:8]), rest[8]
        y_TO, kept = [], []
        for rows in products.row_chunks(x_TD, width=fc1.weight_OD.shape[0]):
            h_TH, u1_TR = _apply_adapted(products.dense(x_TD[rows]), fc1, gates_TN[rows])
            y, u2_TR = _apply_adapted(activation(h_TH), fc2, gates_TN[rows])
            y_TO.append(y)
            kept += [h_TH, u1_TR, u2_TR]
        ctx.save_for_backward(x_TD, gates_TN, *fc1, *fc2, *kept)
        ctx.activation = activation
        return y_TO[0] if len(y_TO) == 1 else torch.cat(y_TO)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gates_TN, *rest = ctx.saved_tensors
        fc1, fc2, kept = AdaptedLinear(*rest[:4]), AdaptedLinear(*rest[4:8]), rest[8:]
        if wants_second_order():

            def plain(x: Tensor, gates: Tensor, *pairs: Tensor | None) -> Tensor:
                h = _plain_adapted(x, fc1._replace(a_RD=pairs[0], b_OR=pairs[1]), gates)
                return _plain_adapted(ctx.activation(h), fc2._replace(a_RD=pairs[2], b_OR=pairs[3]), gates)

            inputs = (x_TD, gates_TN, fc1.a_RD, fc1.b_OR, fc2.a_RD, fc2.b_OR)
            needed = [ctx.needs_input_grad[i] for i in (0, 1, 4, 5, 8, 9)]
            grad_x, grad_gates, *grads = differentiable_gradients(plain, inputs, needed, grad_TO)
            return grad_x, grad_gates, None, None, *grads[:2], None, None, *grads[2:], None

        pair1, pair2 = _PairGradients(fc1), _PairGradients(fc2)
        grad_x_TD: list[Tensor] = []
        grad_gates_TN = torch.zeros_like(gates_TN)
        for i, rows in enumerate(products.row_chunks(x_TD, width=fc1.weight_OD.shape[0])):
            h_TH, u1_TR, u2_TR = kept[3 * i : 3 * i + 3]
            gates, grad_gates, grad = gates_TN[rows], grad_gates_TN[rows], products.dense(grad_TO[rows])
            act_TH, pull_back = recompute_activation(h_TH, ctx.activation, differentiate=True)
            grad_u = pair2.add(grad, act_TH, u2_TR, gates, grad_gates)
            grad_h = pull_back(_input_gradient(grad, fc2, grad_u))
            grad_u = pair1.add(grad_h, x_TD[rows], u1_TR, gates, grad_gates)
            if ctx.needs_input_grad[0]:
                grad_x_TD.append(_input_gradient(grad_h, fc1, grad_u))
        grad_x = None if not grad_x_TD else grad_x_TD[0] if len(grad_x_TD) == 1 else torch.cat(grad_x_TD)
        return grad_x, grad_gates_TN, None, None, *pair1.result(), None, None, *pair2.result(), None


class _PairGradients:
    """The gradients of A and B, added up over the chunks; B's as [R, O], in which orientation the product is fast."""

    def __init__(self, linear: AdaptedLinear) -> None:
        self._b_OR = linear.b_OR
        self._grad_a_RD: Tensor | None = None
        self._grad_b_RO: Tensor | None = None

    def add(
        self, grad_TO: Tensor, x_TD: Tensor, u_TR: Tensor | None, gates_TN: Tensor, grad_gates_TN: Tensor
    ) -> Tensor | None:
        """A chunk's share, that of the gates added to ``grad_gates_TN`` in place; the gradient of x A^T, [T, R]."""
        if u_TR is None or self._b_OR is None:
            return None
        grad_v_TR = products.linear(grad_TO, self._b_OR.T)
        grad_u_TR = gated(grad_v_TR, gates_TN)
        grad_gates_TN += gate_gradient(grad_v_TR, u_TR, gates_TN)
        grad_b_RO = products.outer(gated(u_TR, gates_TN), grad_TO)
        grad_a_RD = products.outer(grad_u_TR, x_TD)
        self._grad_b_RO = grad_b_RO if self._grad_b_RO is None else self._grad_b_RO.add_(grad_b_RO)
        self._grad_a_RD = grad_a_RD if self._grad_a_RD is None else self._grad_a_RD.add_(grad_a_RD)
        return grad_u_TR

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of A [R, D] and B [O, R]."""
        return self._grad_a_RD, None if self._grad_b_RO is None else self._grad_b_RO.T


def _apply_adapted(x_TD: Tensor, linear: AdaptedLinear, gates_TN: Tensor) -> tuple[Tensor, Tensor | None]:
    """A linear's output [T, O] and its rank activations [T, R]."""
    y_TO = products.linear(x_TD, linear.weight_OD, linear.bias_O)
    if linear.a_RD is None or linear.b_OR is None:
        return y_TO, None
    u_TR = products.linear(x_TD, linear.a_RD)
    return products.add_linear(y_TO, gated(u_TR, gates_TN), linear.b_OR), u_TR


def _plain_adapted(x_TD: Tensor, linear: AdaptedLinear, gates_TN: Tensor) -> Tensor:
    """A linear's output [T, O] by plain autograd."""
    y_TO = F.linear(x_TD, linear.weight_OD, linear.bias_O)
    if linear.a_RD is None or linear.b_OR is None:
        return y_TO
    return add_lowrank(y_TO, x_TD, linear.a_RD, linear.b_OR, gates=gates_TN)


def _input_gradient(grad_TO: Tensor, linear: AdaptedLinear, grad_u_TR: Tensor | None) -> Tensor:
    grad_x_TD = products.linear(grad_TO, linear.weight_OD.T)
    if grad_u_TR is None or linear.a_RD is None:
        return grad_x_TD
    return products.add_linear(grad_x_TD, grad_u_TR, linear.a_RD.T)
