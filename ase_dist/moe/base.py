"""The FFN under a layer, whatever its class calls its parts: two linears and what is between them.

    plain   y = last(norm(act(first(x))))                  timm's Mlp, and FFN below
    gated   y = last(norm(act(gate(x)) * up(x)))           timm's SwiGLU and GluMlp, Llama's FFN, and GatedFFN below

A gated FFN is computed as a plain one, last(between(first(x))): its first linear gives gate and up side by side, [T,
2H], and ``between`` makes [T, H] of them. So every form of the layer's compute is the same for both. The norm is mostly
the identity.

Letters: T tokens, D input width, H hidden width, O output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ase_dist.errors import UserError, did_you_mean
from ase_dist.ops.activations import (
    Activation,
    CopyFirst,
    GatedActivation,
    NormedActivation,
    check_activation,
)
from ase_dist.ops.joined import JoinedLinear, JoinedWeight

FeedForward = Any  # an nn.Module that FFNForm takes
Linear = Any  # an nn.Linear, another module with in_features and out_features, or a JoinedLinear


class FFN(nn.Module):
    """fc2(norm(act(fc1(x)))) of parts that a model already has, under the names that ``MoEFFN`` wants its base to have.

    ``norm`` None: without.
    """

    def __init__(self, fc1: nn.Module, act: Activation, fc2: nn.Module, *, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.norm = fc1, act, fc2, norm

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., O]."""
        h = self.act(self.fc1(x))
        y: Tensor = self.fc2(h if self.norm is None else self.norm(h))
        return y


class GatedFFN(nn.Module):
    """fc2(norm(act(gate(x)) * up(x))) of parts that a model already has, under names that ``MoEFFN`` knows."""

    def __init__(
        self, gate: nn.Module, act: Activation, up: nn.Module, fc2: nn.Module, *, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.gate, self.act, self.up, self.fc2, self.norm = gate, act, up, fc2, norm

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., O]."""
        h = self.act(self.gate(x)) * self.up(x)
        y: Tensor = self.fc2(h if self.norm is None else self.norm(h))
        return y


class Place(NamedTuple):
    """Where the LoRA experts of a place act: from ``dim_in`` values to ``dim_out`` of the outputs of ``linear``.

    ``linear`` is "fc1", "fc2" or "bypass" of the form, ``width`` its outputs, the place's from ``offset`` on.
    """

    linear: str
    dim_in: int
    dim_out: int
    offset: int
    width: int


class _Names(NamedTuple):
    """Of a base's parts; ``first`` are one linear, or gate and up."""

    first: tuple[str, ...]
    act: str
    last: str


SEPARATE = (
    _Names(("gate", "up"), "act", "fc2"),
    _Names(("fc1_g", "fc1_x"), "act", "fc2"),  # timm's SwiGLU
    _Names(("gate_proj", "up_proj"), "act_fn", "down_proj"),  # Llama's, Qwen's, Mistral's, Gemma's
)
PLAIN = _Names(("fc1",), "act", "fc2")


class FFNForm:
    """``base`` as last(between(first(x))): ``fc1``, ``act`` and ``fc2`` of it, read at each use.

    ``recomputed``: the activation runs again in the backward pass. Raises UserError where it gives something else then,
    and for a base that computes something else, as far as its parts and a trial on a few rows tell.
    """

    def __init__(self, base: FeedForward, *, recomputed: bool) -> None:
        self.base = base
        self.joined_weight = JoinedWeight()  # of a gate and an up projection that are linears of their own
        self._names = next((names for names in SEPARATE if _has(base, names)), PLAIN)
        if self._names is PLAIN:
            _require_plain_parts(base)
        self._check_linears()
        packed = self._names is PLAIN and self.fc1.out_features == 2 * self.fc2.in_features
        is_gated = packed or len(self._names.first) == 2
        if packed and not isinstance(getattr(base, "gate_last", None), bool):
            raise UserError(
                f"base: fc1 of {type(base).__name__} gives twice the {self.fc2.in_features} features that fc2 takes, "
                "and nothing says which half is the gate; wanted timm's GluMlp, or separate linears as "
                "ase_dist.moe.GatedFFN(gate, act, up, fc2)"
            )
        self.gate_last: bool | None = bool(packed and base.gate_last) if is_gated else None  # None: not gated
        self.hidden: int = self.fc2.in_features
        if self.fc1.out_features != self.hidden * (2 if is_gated else 1):
            raise UserError(
                f"base: the first linear of {type(base).__name__} gives {self.fc1.out_features} features and the last "
                f"takes {self.hidden}; wanted as many, or of a gated FFN twice as many"
            )
        drops = [getattr(base, name, None) for name in ("drop1", "drop2", "drop")]
        if any(isinstance(drop, nn.Dropout) and drop.p > 0 for drop in drops):
            raise UserError("base: its dropout would be skipped; build it without")
        self._copies_first = recomputed and check_activation(getattr(base, self._names.act), width=self.hidden)
        self._check_by_trial()

    @property
    def fc1(self) -> Linear:
        """The first linear, D to H, or to 2H of a gated base."""
        first = [getattr(self.base, name) for name in self._names.first]
        return first[0] if len(first) == 1 else JoinedLinear(first, self.joined_weight)

    @property
    def fc2(self) -> Linear:
        """The last linear, H to O."""
        return getattr(self.base, self._names.last)

    @property
    def act(self) -> Activation:
        """What is between the two: each row of the result from that row alone."""
        act = CopyFirst(self.own_act) if self._copies_first else self.own_act
        act = act if self.gate_last is None else GatedActivation(act, gate_last=self.gate_last)
        return act if self._norm is None else NormedActivation(act, self._norm)

    @property
    def own_act(self) -> Activation:
        """The base's activation alone."""
        act: Activation = getattr(self.base, self._names.act)
        return act

    @property
    def trains_between(self) -> bool:
        """Whether the norm or the activation is trained, which hand-written autograd would leave without gradient."""
        between = (getattr(self.base, self._names.act), self._norm)
        return any(p.requires_grad for m in between if isinstance(m, nn.Module) for p in m.parameters())

    @property
    def has_norm(self) -> bool:
        """Whether there is a norm between the linears."""
        return self._norm is not None

    def places(self, adapt: Sequence[str]) -> dict[str, Place]:
        """What the names of ``adapt`` mean here; UserError for names that this base does not have."""
        D, H, O = self.fc1.in_features, self.hidden, self.fc2.out_features
        wide = self.fc1.out_features
        found = {"fc1": Place("fc1", D, wide, 0, wide)}
        if self.gate_last is not None:
            found["gate"] = Place("fc1", D, H, H if self.gate_last else 0, wide)
            found["up"] = Place("fc1", D, H, 0 if self.gate_last else H, wide)
        found |= {"fc2": Place("fc2", H, O, 0, O), "bypass": Place("bypass", D, O, 0, O)}
        places = (adapt,) if isinstance(adapt, str) else tuple(adapt)
        for place in places:
            if place not in found:
                note = "; gate and up are of a gated FFN" if place in ("gate", "up") else did_you_mean(place, found)
                raise UserError(f"adapt: got {place!r}, wanted some of {list(found)}{note}")
        if not places or len(set(places)) != len(places):
            raise UserError(f"adapt: got {list(places)}, wanted one or more of {list(found)}, each once")
        if "fc1" in places and {"gate", "up"} & set(places):
            raise UserError(f"adapt: got {list(places)}; fc1 is gate and up together, wanted it or them")
        return {place: found[place] for place in places}

    def linears_without(self, places: Sequence[str]) -> list[str]:
        """The names in ``base`` of its linears that carry no experts where ``places`` do; none under a bypass."""
        if "bypass" in places:
            return []
        halves = ("gate", "up") if len(self._names.first) == 2 else ("fc1",)
        names = dict(zip(halves, self._names.first, strict=True)) | {"fc2": self._names.last}
        adapted = set(places) | ({"gate", "up"} if "fc1" in places else set())
        adapted |= {"fc1"} if {"gate", "up"} & adapted else set()
        return [name for place, name in names.items() if place not in adapted]

    @property
    def _norm(self) -> nn.Module | None:
        norm = getattr(self.base, "norm", None)
        return None if isinstance(norm, nn.Identity) else norm

    def _check_linears(self) -> None:
        for name in (*self._names.first, self._names.last):
            linear = getattr(self.base, name)
            if not (hasattr(linear, "in_features") and hasattr(linear, "out_features")):
                raise UserError(
                    f"base: {name} of {type(self.base).__name__} is a {type(linear).__name__}, wanted a linear with "
                    "in_features and out_features; a 1x1 convolution can be rewritten as nn.Linear"
                )
        widths = {(m.in_features, m.out_features) for m in (getattr(self.base, name) for name in self._names.first)}
        if len(widths) > 1:
            raise UserError(f"base: gate and up of {type(self.base).__name__} have other widths: {sorted(widths)}")

    def _check_by_trial(self) -> None:
        """Raise UserError where the base's own forward gives something else on a few tokens."""
        weight = getattr(self.fc2, "weight", None)
        if not isinstance(weight, Tensor) or type(weight.data) is not Tensor or not weight.is_floating_point():
            return  # a kind of tensor that may have no values here, or packed ones
        if weight.is_meta or weight.numel() != self.hidden * self.fc2.out_features:  # ZeRO-3 has the weights elsewhere
            return
        if torch.compiler.is_compiling():
            return
        generator = torch.Generator().manual_seed(0)
        x_1TD = torch.randn(1, 4, self.fc1.in_features, generator=generator).to(weight)
        with torch.no_grad():
            found = self.fc2(self.act(self.fc1(x_1TD[0])))
            try:
                wanted = self.base.forward(x_1TD)[0]
            except NotImplementedError:  # a module of parts alone
                return
            except RuntimeError:  # its parts take rows alone
                wanted = self.base.forward(x_1TD[0])
        tolerance = 1e-3 if torch.finfo(weight.dtype).bits >= 32 else 0.1
        error = (found - wanted).float().norm() if found.shape == wanted.shape else torch.inf
        if not error <= tolerance * (wanted.float().norm() + 1e-6):
            parts, own = ("act(fc1(x))", "FFN(fc1, act, fc2, norm=...)")
            if self.gate_last is not None:
                parts, own = ("act(gate(x)) * up(x)", "GatedFFN(gate, act, up, fc2, norm=...)")
            raise UserError(
                f"base: {type(self.base).__name__} computes something else than fc2(norm({parts})) of its parts, on "
                f"each token alone; where it does not, say what is what with ase_dist.moe.{own}"
            )


def _has(base: FeedForward, names: _Names) -> bool:
    return all(hasattr(base, name) for name in (*names.first, names.act, names.last))


def _require_plain_parts(base: FeedForward) -> None:
    missing = [name for name in ("fc1", "act", "fc2") if not hasattr(base, name)]
    if missing:
        raise UserError(
            f"base: {type(base).__name__} has no {', '.join(missing)}; wanted a module with fc1, act and fc2, which "
            "ase_dist.moe.FFN(fc1, act, fc2) makes of parts with other names, or GatedFFN(gate, act, up, fc2) of those "
            "of a gated one"
        )
