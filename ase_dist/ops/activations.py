"""Activations that run again in the backward pass: which are fit for it, and their gradients.

A layer keeps the input of its activation, not the output, and computes the output again in the backward pass together
with the gradient. The common activations have their gradient's formula here; those of others come from autograd.

Letters: T tokens, H width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ase_dist.errors import UserError
from ase_dist.ops import kernels

Activation = Callable[[Tensor], Tensor]


def check_activation(activation: Activation, *, width: int) -> bool:
    """Whether the activation works in place, so that it needs ``CopyFirst``: the backward pass runs it again.

    It is tried on a few rows of ``width`` numbers, in training mode. Raises UserError where two runs on the same input
    differ (dropout, random slopes), or where a row depends on the others (batch norm): the second run takes chunks of
    rows.
    """
    parameter = next(activation.parameters(), None) if isinstance(activation, nn.Module) else None
    if parameter is not None and parameter.device.type == "meta":
        return False
    trial = copy.deepcopy(activation).train() if isinstance(activation, nn.Module) else activation
    like = torch.empty(0, device="cpu") if parameter is None else parameter.detach()
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(64, width, generator=generator, device="cpu").to(like)
    forked = [] if like.device.type == "cpu" else [like.device]
    with torch.no_grad(), torch.random.fork_rng(forked, device_type=like.device.type):
        given = x_TH.clone()
        first = trial(given).clone()
        is_in_place = not torch.equal(given, x_TH)
        second, rows = trial(x_TH.clone()), trial(x_TH[:5].clone())
    name = getattr(activation, "__name__", type(activation).__name__)
    if not torch.equal(first.nan_to_num(), second.nan_to_num()):
        raise UserError(
            f"act: {name} gives something else when it runs again on the same input, as it does in the backward pass; "
            "take the dropout or the randomness out of it, or put it behind the FFN"
        )
    if first.shape != x_TH.shape or not torch.allclose(rows, first[:5], rtol=1e-4, atol=1e-5, equal_nan=True):
        raise UserError(f"act: {name} is not elementwise; wanted one that computes a token from that token alone")
    return is_in_place


class CopyFirst:
    """An in-place activation on a copy of its input: the input is kept for the backward pass."""

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        """act(x), x unchanged."""
        return self.activation(x.clone())


class GatedActivation:
    """act(gate) * up of [gate | up], or of [up | gate] where the gate comes last: [T, 2H] to [T, H].

    The inner part of the GLU variants of arXiv 2002.05202; SwiGLU with SiLU as act.
    """

    def __init__(self, activation: Activation, *, gate_last: bool) -> None:
        self.activation, self.gate_last = activation, gate_last

    def __call__(self, x: Tensor) -> Tensor:
        """[..., 2H] to [..., H]."""
        gate, up = self.halves(x)
        return self.activation(gate) * up

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up, views [..., H]."""
        first, second = x.chunk(2, dim=-1)
        return (second, first) if self.gate_last else (first, second)

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        """What ``halves`` took apart, [..., 2H]."""
        return torch.cat([up, gate] if self.gate_last else [gate, up], dim=-1)


class NormedActivation:
    """norm(act(x)): what is between the linears of an FFN with a norm there. The norm is frozen, or autograd's own."""

    def __init__(self, activation: Activation, norm: nn.Module) -> None:
        self.activation, self.norm = activation, norm

    def __call__(self, x: Tensor) -> Tensor:
        """norm(act(x))."""
        y: Tensor = self.norm(self.activation(x))
        return y


def recompute_activation(x: Tensor, activation: Activation | None, *, differentiate: bool) -> tuple[Tensor, Activation]:
    """act(x) computed again, and the function that pulls a gradient back through it; None is the identity."""
    if activation is None:
        return x, lambda grad: grad
    if not differentiate:
        return activation(x), lambda grad: grad
    if isinstance(activation, GatedActivation):
        gate, up = activation.halves(x)
        act, pull_gate_back = recompute_activation(gate, activation.activation, differentiate=True)
        return act * up, lambda grad: activation.join(pull_gate_back(grad * up), grad * act)
    kind = _kind(activation)
    if kind is not None:
        return activation(x), lambda grad: kernels.activation_gradient(x, grad, kind)
    if torch.compiler.is_compiling():  # a compiler follows this, but no call of autograd in a backward pass
        output, pull_back = torch.func.vjp(activation, x)[:2]
        return output, lambda grad: pull_back(grad)[0]
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = activation(leaf)
    return output.detach(), lambda grad: torch.autograd.grad(output, leaf, grad)[0]


def activation_and_gradient(x: Tensor, grad: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """act(x) and the gradient of x for ``grad``, that of act(x), in one kernel where that is written."""
    if isinstance(activation, GatedActivation):
        gate, up = activation.halves(x)
        act, grad_gate = activation_and_gradient(gate, grad * up, activation.activation)
        return act * up, activation.join(grad_gate, grad * act)
    kind = _kind(activation)
    if kind is not None and not torch.compiler.is_compiling():  # a compiler fuses the plain form itself
        return kernels.activation_and_gradient(x, grad, kind)  # type: ignore[no-any-return]
    output, pull_back = recompute_activation(x, activation, differentiate=True)
    return output, pull_back(grad)


def _kind(activation: Activation) -> str | None:
    """Which of ``kernels.ACTIVATIONS`` this is; None for others, and where hooks or another ``forward`` must run."""
    if isinstance(activation, CopyFirst):
        activation = activation.activation
    if isinstance(activation, nn.Module):
        tables = (activation._forward_hooks, activation._forward_pre_hooks, activation._backward_hooks)
        if any(tables) or activation._backward_pre_hooks or "forward" in vars(activation):
            return None
    kind = type(activation) if isinstance(activation, nn.Module) else activation
    if kind is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"  # type: ignore[attr-defined]
    if kind is F.gelu:
        return "gelu"
    if kind in (nn.ReLU, F.relu, torch.relu):
        return "relu"
    return "silu" if kind in (nn.SiLU, F.silu) else None
