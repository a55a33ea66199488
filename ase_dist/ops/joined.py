"""Linears of the same input as one: the gate's and the up projection of a gated FFN, side by side in their output.

    [gate | up] = x [W_gate ; W_up]^T + [b_gate | b_up]

The products of a layer are made for one weight. That of several frozen linears is copied once into memory of its own
(``JoinedWeight``); where a copy must not be kept it is made in each call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ase_dist.ops import modes
from ase_dist.ops.origin import Origin, can_tell_changes


class JoinedWeight:
    """The weights of linears one upon the other, and their biases, in memory that stays while they are the same.

    ``Origin`` says when they are others. Copies and pickles are empty. ``keeps`` False: made in every call, for weights
    that are gathered for each use, as by ZeRO-3.
    """

    def __init__(self) -> None:
        self.keeps = True
        self._origin = Origin()
        self._joined: tuple[Tensor, Tensor | None] = (torch.empty(0), None)

    def __reduce__(self) -> tuple[type[JoinedWeight], tuple[()]]:
        return JoinedWeight, ()

    def forget(self) -> None:
        """Free the memory; the next call makes it again."""
        self._origin, self._joined = Origin(), (torch.empty(0), None)

    def join(self, linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
        """The weight [sum of O, D] and the bias [sum of O], 0 where a linear has none, or None where none has."""
        tensors = [t for linear in linears for t in (linear.weight, linear.bias) if isinstance(t, Tensor)]
        if torch.compiler.is_compiling() or not self.keeps or modes.is_transforming():
            return _join(linears)
        if not all(can_tell_changes(tensor) and not tensor.requires_grad for tensor in tensors):
            return _join(linears)
        mode = torch.is_inference_mode_enabled()
        if not self._origin.is_same(tensors, mode):
            self._joined = _join(linears)
            self._origin.take(tensors, mode)
        return self._joined


def _join(linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    weights: list[Tensor] = [linear.weight for linear in linears]  # type: ignore[misc]
    biases: list[Tensor | None] = [linear.bias for linear in linears]  # type: ignore[misc]
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    pairs = zip(weights, biases, strict=True)
    return torch.cat(weights), torch.cat([w.new_zeros(len(w)) if bias is None else bias for w, bias in pairs])


class JoinedLinear:
    """``parts`` as one linear, with the names that an ``nn.Linear`` has; its weight is kept in ``memory``."""

    def __init__(self, parts: Sequence[nn.Module], memory: JoinedWeight) -> None:
        self.parts = tuple(parts)
        self._memory = memory

    @property
    def in_features(self) -> int:
        """Of each part."""
        return int(self.parts[0].in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """Of all parts together."""
        return sum(int(part.out_features) for part in self.parts)  # type: ignore[arg-type,misc]

    @property
    def weight(self) -> Tensor:
        """[sum of O, D]; of trained linears with a gradient to each."""
        return self._memory.join(self.parts)[0]

    @property
    def bias(self) -> Tensor | None:
        """[sum of O]."""
        return self._memory.join(self.parts)[1]

    def __call__(self, x: Tensor) -> Tensor:
        """The parts' outputs side by side, each part called as the module that it is."""
        return torch.cat([part(x) for part in self.parts], dim=-1)
