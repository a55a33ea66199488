"""The interface of a dispatch, and the compute of a layer all of whose experts are at hand.

Letters: T tokens of all tasks together, D width, N experts, S of them shared (last), n = N - S, k active routed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ase_dist.moe.experts import FFNExperts, LoRAExperts, apply_all, apply_routed, lora_pairs
from ase_dist.ops.lora_ffn import Adapted, gated_ffn
from ase_dist.ops.lowrank import Activation, add_lowrank, is_frozen_linear, lowrank_linear

FeedForward = Any  # an nn.Module with fc1, act and fc2


class Routed(NamedTuple):
    """The tokens of all tasks and what the routers decided for them."""

    x_TD: Tensor
    gates_TN: Tensor
    active_TN: Tensor
    k: int
    num_shared: int


class Dispatch(Protocol):
    """Brings tokens and experts together; both methods return the layer's output [T, D]."""

    def lora(self, tokens: Routed, base: FeedForward, routed: LoRAExperts, shared: LoRAExperts | None) -> Tensor:
        """The frozen base with the gated LoRA pairs on its linears."""

    def ffn(self, tokens: Routed, act: Activation, routed: FFNExperts, shared: FFNExperts | None) -> Tensor:
        """The gated sum of full feed-forward experts."""


def lora_ffn(tokens: Routed, base: FeedForward, bank: Mapping[str, Tensor], places: tuple[str, ...]) -> Tensor:
    """fc2(act(fc1(x))) with each adapted place's pairs of all N experts; ``bank`` holds them in global order."""
    pairs = lora_pairs(bank, places)
    if is_frozen_linear(base.fc1, tokens.x_TD) and is_frozen_linear(base.fc2, tokens.x_TD):
        fc1, fc2 = (
            Adapted(fc.weight, fc.bias, *pairs.get(name, (None, None)))
            for name, fc in (("fc1", base.fc1), ("fc2", base.fc2))
        )
        y_TD = gated_ffn(tokens.x_TD, fc1, fc2, gates_TN=tokens.gates_TN, activation=base.act)
    else:
        h = adapted_linear(tokens.x_TD, base.fc1, pairs.get("fc1"), tokens.gates_TN)
        y_TD = adapted_linear(h, base.fc2, pairs.get("fc2"), tokens.gates_TN, activation=base.act)
    if "bypass" in pairs:
        y_TD = add_lowrank(y_TD, tokens.x_TD, *pairs["bypass"], gates=tokens.gates_TN)
    return y_TD


def adapted_linear(
    x: Tensor,
    linear: nn.Module,
    pair: tuple[Tensor, Tensor] | None,
    gates: Tensor,
    *,
    activation: Activation | None = None,
) -> Tensor:
    """linear(act(x)) plus the gated pair; fused where ``linear`` is a plain ``nn.Linear``."""
    if pair is not None and type(linear) is nn.Linear:
        return lowrank_linear(x, linear.weight, linear.bias, *pair, gates=gates, activation=activation)
    x = x if activation is None else activation(x)
    y: Tensor = linear(x)
    return y if pair is None else add_lowrank(y, x, *pair, gates=gates)


def full_ffn(
    tokens: Routed, act: Activation, routed: Mapping[str, Tensor], shared: Mapping[str, Tensor] | None
) -> Tensor:
    """Gated sum of routed and shared feed-forward experts that are all at hand."""
    n = tokens.gates_TN.shape[-1] - tokens.num_shared
    gates_Tn, active_Tn = tokens.gates_TN[:, :n], tokens.active_TN[:, :n]
    y_TD = torch.zeros_like(tokens.x_TD)
    if tokens.k:
        y_TD = apply_routed(tokens.x_TD, gates_Tn, active_Tn, tokens.k, routed, act)
    if shared is not None:
        y_TD = y_TD + apply_all(tokens.x_TD, tokens.gates_TN[:, n:], shared, act)
    return y_TD


def joined(routed: Mapping[str, Tensor], shared: LoRAExperts | None) -> dict[str, Tensor]:
    """Routed experts first, the shared ones last: [N, ...] per tensor."""
    if shared is None:
        return dict(routed)
    others = shared.tensors()
    return {name: torch.cat([tensor, others[name]]) for name, tensor in routed.items()}
