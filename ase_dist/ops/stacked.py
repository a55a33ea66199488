"""A gated FFN as accelerators compute it fastest: low-rank products are parts of products that are made anyway.

A pass over a tensor [T, H] costs a third of a base product there. So the narrow matrices stand beside the frozen ones
and are multiplied with them (v is gated u):

    narrow    [u1 | logits] = x [A1 ; router_t]^T                    for the tokens of task t
    fc1       h = [x | v1] [W1 | B1]^T + bias
    fc2       [y | u2] = act(h) [W2 ; A2]^T + bias,                  then y += v2 B2^T
    backward  grad_act = [grad_y | grad_u2] [W2 ; A2],               [grad_x | grad_v1] = grad_h [W1 | B1],
              grad_x += [grad_u1 | grad_logits] [A1 ; router_t]

[W1 | B1] and [W2 ; A2] are kept in a ``WeightStack`` each. The backward pass keeps what ``ase_dist.ops.lowrank`` keeps:
of the width H fc1's output alone.

Letters: t tasks, T tokens (of one task in [t, T, ...]), D input width, H hidden width, O output width, N experts, m of
one kind (routed first, then shared), r rank, R = N * r rank columns side by side, M = R + N.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ase_dist.ops import kernels, products
from ase_dist.ops.activations import Activation, activation_and_gradient
from ase_dist.ops.lowrank import add_lowrank
from ase_dist.ops.modes import differentiable_gradients, wants_second_order
from ase_dist.ops.origin import Origin

LowRank = tuple[Tensor, Tensor | None]  # of the routed experts, of the shared ones: A [m, r, D] or B [m, O, r]


class Linear(NamedTuple):
    """A frozen linear: W [O, D] and its bias [O], or None."""

    weight_OD: Tensor
    bias_O: Tensor | None


class WeightStack:
    """[W | B] or [W ; A] in memory that stays: W is copied when it is new, the low-rank part at every ``fill``.

    ``Origin`` says when W is new; what it does not see is copied after ``forget``. Copies and pickles of a stack are
    empty, and it is in no state dict.
    """

    def __init__(self) -> None:
        self._origin: Origin | None = None
        self._stacked = Linear(torch.empty(0), None)
        self._fills = 0

    def __reduce__(self) -> tuple[type[WeightStack], tuple[()]]:
        return WeightStack, ()

    def forget(self) -> None:
        """Free the memory; the next call makes it again."""
        self.__init__()  # type: ignore[misc]

    def fill(self, linear: Linear, low_rank: LowRank, *, beside: bool) -> tuple[Linear, int]:
        """``stacked`` of these, in this memory, and the number of this call for ``refill``."""
        parts = [linear.weight_OD] if linear.bias_O is None else [linear.weight_OD, linear.bias_O]
        shapes = [part.shape for part in low_rank if part is not None]
        is_inference = torch.is_inference_mode_enabled()  # whose memory cannot be written elsewhere
        if self._origin is None or not self._origin.is_same(parts, beside, is_inference, *shapes):
            self._stacked, self._origin = stacked(linear, low_rank, beside=beside), Origin()
            self._origin.take(parts, beside, is_inference, *shapes)
        elif beside:
            columns_HR = self._stacked.weight_OD[:, linear.weight_OD.shape[1] :]
            torch.cat(_experts_columns(low_rank), dim=1, out=columns_HR.unflatten(1, (-1, shapes[0][2])))
        else:
            torch.cat(_rows(low_rank), out=self._stacked.weight_OD[len(linear.weight_OD) :])
        self._fills += 1
        return self._stacked, self._fills

    def refill(self, number: int, linear: Linear, low_rank: LowRank, *, beside: bool) -> Linear:
        """What ``fill`` gave as its call ``number``, made again where another one came between."""
        if self._origin is not None and self._fills == number:
            return self._stacked
        return self.fill(linear, low_rank, beside=beside)[0]


def stacked(linear: Linear, low_rank: LowRank, *, beside: bool) -> Linear:
    """[W | B] [O, D + R] of B [m, O, r] (``beside``), or [W ; A] [O + R, D] of A [m, r, D], with a bias of 0 for A."""
    weight_OD, bias_O = linear
    if beside:
        return Linear(torch.cat([weight_OD, _columns(low_rank)], dim=1), bias_O)
    weight = torch.cat([weight_OD, *_rows(low_rank)])
    return Linear(weight, None if bias_O is None else F.pad(bias_O, (0, len(weight) - len(bias_O))))


def narrow_product(x_tTD: Tensor, router_tND: Tensor, a: LowRank | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """x for the FFN, its rank activations u [t * T, R] (None without A) and the logits [t, T, N], in float32 or higher.

    The FFN must take the x that is returned: its gradient is then added where those of u and the logits are.
    """
    if a is None:
        x_tTD, logits_tTN = _Narrow.apply(x_tTD, router_tND, None, None)
        return x_tTD, None, logits_tTN
    x_tTD, logits_tTN, u_tTR = _Narrow.apply(x_tTD, router_tND, *a)
    return x_tTD, u_tTR.flatten(0, 1), logits_tTN


def stacked_ffn(
    x_TD: Tensor,
    fc1: Linear,
    fc2: Linear,
    *,
    u1_TR: Tensor | None,
    b1: LowRank | None,
    a2: LowRank | None,
    b2: LowRank | None,
    gates_TN: Tensor,
    activation: Activation,
    stacks: tuple[WeightStack, WeightStack] | None,
) -> Tensor:
    """fc2(act(fc1(x))) with the gated pairs, [T, O]; ``u1_TR`` and ``x_TD`` as ``narrow_product`` gives them.

    ``b1`` and ``u1_TR``, or ``a2`` and ``b2``, are None where that linear has no pairs; ``stacks`` None: W is copied in
    every call. W and bias get no gradient; ``activation`` as in ``lowrank_linear``.
    """
    none = (None, None)
    return _StackedFFN.apply(
        x_TD, u1_TR, gates_TN, *fc1, *(b1 or none), *fc2, *(a2 or none), *(b2 or none), activation, stacks
    )


# ---------------------------------------------------------------------------------------------------------------------
# The product with A1 and the router


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_tTD: Tensor, router_tND: Tensor, routed_a: Tensor | None, shared_a: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_tTD, router_tND, routed_a, shared_a)
        weight_tMD = _narrow_weight(router_tND, routed_a, shared_a)
        N = router_tND.shape[1]
        narrow_tTM = products.bmm_float32(x_tTD, weight_tMD.transpose(1, 2))
        logits_tTN, x_tTD = narrow_tTM[..., -N:], x_tTD.view_as(x_tTD)
        return (x_tTD, logits_tTN) if routed_a is None else (x_tTD, logits_tTN, narrow_tTM[..., :-N])

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_logits_tTN: Tensor, *grad_u: Tensor) -> tuple[Tensor | None, ...]:
        x_tTD, router_tND, routed_a, shared_a = ctx.saved_tensors
        if wants_second_order():

            def plain(x: Tensor, router: Tensor, *a: Tensor | None) -> tuple[Tensor, ...]:
                wide = x.to(grad_logits_tTN.dtype)
                narrow = [part.to(wide.dtype) for part in (router, *(_rows(a) if a[0] is not None else []))]
                u = [F.linear(wide, torch.cat(narrow[1:]))] if grad_u else []
                return (x.view_as(x), wide @ narrow[0].transpose(1, 2), *u)

            inputs = (x_tTD, router_tND, routed_a, shared_a)
            grads = (grad_x, grad_logits_tTN, *grad_u)
            return tuple(differentiable_gradients(plain, inputs, ctx.needs_input_grad, grads))

        needs_x, needs_router, needs_routed, needs_shared = ctx.needs_input_grad
        grad_tTM = _join_columns([*grad_u, grad_logits_tTN], x_tTD)
        R = grad_tTM.shape[2] - grad_logits_tTN.shape[2]
        grad_router = grad_tTM[..., R:].transpose(1, 2) @ x_tTD if needs_router else None
        grad_a: tuple[Tensor | None, ...] = (None, None)
        if needs_routed or needs_shared:
            grad_a_RD = grad_tTM[..., :R].flatten(0, 1).T @ x_tTD.flatten(0, 1)
            grad_a = _split_experts(grad_a_RD.unflatten(0, (-1, routed_a.shape[1])), (routed_a, shared_a))
        if needs_x:
            grad_x = torch.baddbmm(grad_x, grad_tTM, _narrow_weight(router_tND, routed_a, shared_a))
        return grad_x if needs_x else None, grad_router, *grad_a


def _narrow_weight(router_tND: Tensor, routed_a: Tensor | None, shared_a: Tensor | None) -> Tensor:
    """[A ; router_t] for each task: [t, M, D]."""
    if routed_a is None:
        return router_tND
    rows = _rows((routed_a, shared_a))
    return torch.cat([*(part.expand(len(router_tND), -1, -1) for part in rows), router_tND], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The feed-forward network


class _StackedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        u1_TR: Tensor | None,
        gates_TN: Tensor,
        weight1_HD: Tensor,
        bias1_H: Tensor | None,
        routed_b1: Tensor | None,
        shared_b1: Tensor | None,
        weight2_OH: Tensor,
        bias2_O: Tensor | None,
        routed_a2: Tensor | None,
        shared_a2: Tensor | None,
        routed_b2: Tensor | None,
        shared_b2: Tensor | None,
        activation: Activation,
        stacks: tuple[WeightStack, WeightStack] | None,
    ) -> Tensor:
        fc1, fc2 = Linear(weight1_HD, bias1_H), Linear(weight2_OH, bias2_O)
        ctx.numbers = [0, 0]
        u2_TR = b2_OR = None
        if routed_b1 is not None and u1_TR is not None:
            b1 = (routed_b1, shared_b1)
            if stacks is None:
                fc1 = stacked(fc1, b1, beside=True)
            else:
                fc1, ctx.numbers[0] = stacks[0].fill(fc1, b1, beside=True)
            h_TH = F.linear(_beside_gated(x_TD, u1_TR, gates_TN), *fc1)
        else:
            h_TH = F.linear(x_TD, *fc1)
        if routed_a2 is not None and routed_b2 is not None:
            a2 = (routed_a2, shared_a2)
            if stacks is None:
                fc2 = stacked(fc2, a2, beside=False)
            else:
                fc2, ctx.numbers[1] = stacks[1].fill(fc2, a2, beside=False)
            both = F.linear(activation(h_TH), *fc2)
            y_TO, u2_TR = both[:, : len(weight2_OH)], both[:, len(weight2_OH) :].contiguous()
            v2_TR = _gated(u2_TR, gates_TN, y_TO.dtype)
            b2_OR = _columns((routed_b2, shared_b2))
            y_TO = torch.addmm(y_TO, v2_TR, b2_OR.T)
        else:
            y_TO = F.linear(activation(h_TH), *fc2)
        weights = (weight1_HD, bias1_H, routed_b1, shared_b1, weight2_OH, bias2_O)
        pairs2 = (routed_a2, shared_a2, routed_b2, shared_b2)
        ctx.save_for_backward(x_TD, u1_TR, gates_TN, *weights, *pairs2, h_TH, u2_TR, b2_OR)
        ctx.activation, ctx.stacks = activation, stacks
        return y_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, u1_TR, gates_TN, weight1, bias1, *saved = ctx.saved_tensors
        b1, (weight2, bias2), a2, b2, (h_TH, u2_TR, b2_OR) = saved[:2], saved[2:4], saved[4:6], saved[6:8], saved[8:]
        fc1, fc2 = Linear(weight1, bias1), Linear(weight2, bias2)
        if wants_second_order():

            def plain(x: Tensor, u1: Tensor | None, gates: Tensor, *pairs: Tensor | None) -> Tensor:
                h = F.linear(x, *fc1)
                if u1 is not None:
                    h = h + F.linear(_plain_gated(u1, gates, h.dtype), _columns(pairs[:2]))
                h = ctx.activation(h)
                y = F.linear(h, *fc2)
                if pairs[2] is None:
                    return y
                return add_lowrank(y, h, torch.cat(_rows(pairs[2:4])), _columns(pairs[4:6]), gates=gates)

            inputs = (x_TD, u1_TR, gates_TN, *b1, *a2, *b2)
            needed = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5, 6, 9, 10, 11, 12)]
            grads = differentiable_gradients(plain, inputs, needed, grad_TO)
            return *grads[:3], None, None, *grads[3:5], None, None, *grads[5:], None, None

        O, D = grad_TO.shape[1], x_TD.shape[1]
        grad_gates_TN = grad_u1_TR = None
        grads_b1: tuple[Tensor | None, ...] = (None, None)
        grads_a2, grads_b2 = grads_b1, grads_b1
        if u2_TR is not None:
            grad_v2_TR = products.mm_float32(grad_TO, b2_OR)
            found = _gate_gradients(grad_v2_TR, u2_TR, gates_TN, grad_TO.dtype, grad_TO.dtype)
            grad_u2_TR, v2_TR, grad_gates_TN = found
            grad_TO = torch.cat([grad_TO, grad_u2_TR], dim=1)
            fc2 = (
                stacked(fc2, a2, beside=False)
                if ctx.stacks is None
                else ctx.stacks[1].refill(ctx.numbers[1], fc2, a2, beside=False)
            )
        act_TH, grad_h_TH = activation_and_gradient(h_TH, grad_TO @ fc2.weight_OD, ctx.activation)
        if u2_TR is not None:
            grads_a2 = _split_experts((grad_TO[:, O:].T @ act_TH).unflatten(0, (-1, a2[0].shape[1])), a2)
            grads_b2 = _split_columns(grad_TO[:, :O].T @ v2_TR, b2)
        del act_TH, grad_TO
        if u1_TR is not None:
            fc1 = (
                stacked(fc1, b1, beside=True)
                if ctx.stacks is None
                else ctx.stacks[0].refill(ctx.numbers[0], fc1, b1, beside=True)
            )
        grad_x_TD = grad_h_TH @ fc1.weight_OD
        if u1_TR is not None:
            grad_x_TD, grad_v1_TR = grad_x_TD[:, :D], grad_x_TD[:, D:]
            grad_u1_TR, v1_TR, grad_gates = _gate_gradients(grad_v1_TR, u1_TR, gates_TN, u1_TR.dtype, x_TD.dtype)
            grad_gates_TN = grad_gates if grad_gates_TN is None else grad_gates_TN.add_(grad_gates)
            grads_b1 = _split_columns(grad_h_TH.T @ v1_TR, b1)
        grads_fc1, grads_fc2 = (None, None, *grads_b1), (None, None, *grads_a2, *grads_b2)
        return grad_x_TD, grad_u1_TR, grad_gates_TN, *grads_fc1, *grads_fc2, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def _gated(u_TR: Tensor, gates_TN: Tensor, dtype: torch.dtype) -> Tensor:
    """u times the gate of its group as ``dtype``; the product in the higher precision of the two, in one kernel."""
    if torch.compiler.is_compiling():
        return _plain_gated(u_TR, gates_TN, dtype)
    groups = (gates_TN.shape[-1], -1)
    out = torch.empty(u_TR.shape, dtype=dtype, device=u_TR.device)
    torch.mul(u_TR.unflatten(-1, groups), gates_TN.unsqueeze(-1), out=out.unflatten(-1, groups))
    return out


def _gate_gradients(
    grad_v: Tensor, u: Tensor, gates: Tensor, grad_type: torch.dtype, v_type: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    compiling = torch.compiler.is_compiling()  # a compiler fuses the plain form itself
    compute = kernels.gate_gradients_plain if compiling else kernels.gate_gradients
    return compute(grad_v, u, gates, grad_type, v_type)


def _plain_gated(u_TR: Tensor, gates_TN: Tensor, dtype: torch.dtype) -> Tensor:
    return (u_TR.unflatten(-1, (gates_TN.shape[-1], -1)) * gates_TN.unsqueeze(-1)).flatten(-2).to(dtype)


def _beside_gated(x_TD: Tensor, u_TR: Tensor, gates_TN: Tensor) -> Tensor:
    """[x | gated u], [T, D + R] in x's type, whatever the strides of x."""
    return torch.cat([x_TD, _gated(u_TR, gates_TN, x_TD.dtype)], dim=1)


def _join_columns(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The parts side by side in the type of ``like``."""
    if len(parts) == 1 or torch.compiler.is_compiling():
        return torch.cat([part.to(like.dtype) for part in parts], dim=-1)
    shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
    return torch.cat(list(parts), dim=-1, out=torch.empty(shape, dtype=like.dtype, device=like.device))


def _rows(a: Sequence[Tensor | None]) -> list[Tensor]:
    """A [m, r, D] of each kind as [m * r, D]."""
    return [part.flatten(0, 1) for part in a if part is not None]


def _columns(b: Sequence[Tensor | None]) -> Tensor:
    """B [m, O, r] of all kinds as [O, R]."""
    return torch.cat(_experts_columns(b), dim=1).flatten(1)


def _experts_columns(b: Sequence[Tensor | None]) -> list[Tensor]:
    """B [m, O, r] of each kind as [O, m, r]."""
    return [part.transpose(0, 1) for part in b if part is not None]


def _split_experts(grad: Tensor, like: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradient of all experts, stacked, by kind."""
    routed, shared = like
    assert routed is not None
    return (grad, None) if shared is None else (grad[: len(routed)], grad[len(routed) :])


def _split_columns(grad_OR: Tensor, like: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradient of B [O, R] as [m, O, r] by kind."""
    assert like[0] is not None
    return _split_experts(grad_OR.unflatten(1, (-1, like[0].shape[2])).transpose(0, 1).contiguous(), like)
