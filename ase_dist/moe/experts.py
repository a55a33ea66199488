"""Experts as stacked tensors that own their compute: LoRA pairs on a frozen FFN, and full feed-forward experts.

Letters: T tokens of all tasks together, N experts (routed first, the S shared last), n routed experts, m experts of
this rank, k active routed ones, r rank, D input width, O output width, H hidden width of a feed-forward expert,
L tokens sent to other ranks, M rows received from them, K = rows times their active experts.

An expert is initialised from its *global* id, so that the same experts result however they are sharded. Parameter
names avoid the word "expert", by which DeepSpeed's checkpoints would mistake them for its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ase_dist.moe.base import FFNForm, Linear, Place
from ase_dist.moe.dispatch.exchange import ReturnRows, SendRows, TokenExchange, exchanged_linear
from ase_dist.moe.forms import FormCost
from ase_dist.ops import modes, stacked
from ase_dist.ops.activations import Activation
from ase_dist.ops.grouped import Groups, combined_product, gathered_product, group_pairs, per_pair, take_pairs
from ase_dist.ops.lowrank import (
    AdaptedLinear,
    add_lowrank,
    gated_ffn,
    is_frozen_linear,
    is_plain_linear,
    lowrank_linear,
)
from ase_dist.ops.modes import autocast_dtype, is_exporting, may_use_custom_autograd
from ase_dist.ops.origin import can_tell_changes
from ase_dist.ops.pairs import DensePair, GroupedPair, Pair, paired_linear
from ase_dist.seeding import generator

Tensors = Mapping[str, Tensor]  # stacked tensors of experts by name


class RoutedTokens(NamedTuple):
    """The tokens of all tasks and what the routers decided for them; ``k`` routed experts are active for each.

    ``fc1_ranks_TR`` are the rank activations of fc1's pairs where the routers' product has computed them, too.
    """

    x_TD: Tensor
    gates_TN: Tensor
    active_TN: Tensor
    k: int
    fc1_ranks_TR: Tensor | None = None


class LoRAExperts(nn.Module):
    """For each adapted place a pair A [m, r, D], B [m, O, r]; A Kaiming-uniform, B zero (LoRA, arXiv 2106.09685).

    y = fc2(act(fc1(x))) with the gated pairs of a token's active experts on its linears (Eq. 10, arXiv 2510.00570). The
    linears are those of the base's ``FFNForm``, in which a gated FFN has one for gate and up.
    """

    def __init__(self, ids: Sequence[int], places: Mapping[str, Place], *, rank: int, seed: int) -> None:
        super().__init__()
        self.places, self._rank = dict(places), rank
        self.linears = tuple(dict.fromkeys(place.linear for place in places.values()))
        self.keeps_stacks = True  # False where the base's weights are gathered for each use, as by ZeRO-3
        self._stacks = stacked.WeightStack(), stacked.WeightStack()
        ends = {place.linear: place.dim_in + place.width for place in places.values()}
        self.values_per_token = sum(ends.values())  # sent and returned
        for name, place in places.items():
            a_mrD = torch.empty(len(ids), rank, place.dim_in)
            for slot, global_id in enumerate(ids):
                bound = 1 / math.sqrt(place.dim_in)  # kaiming_uniform_ with a = sqrt(5), as in LoRA and peft
                a_mrD[slot].uniform_(-bound, bound, generator=generator(seed, name, "A", global_id))
            self.register_parameter(f"{name}_A", nn.Parameter(a_mrD))
            self.register_parameter(f"{name}_B", nn.Parameter(torch.zeros(len(ids), place.dim_out, rank)))

    def tensors(self) -> dict[str, Tensor]:
        """``{place}.A`` and ``{place}.B`` of these experts, the parameters themselves."""
        return {f"{p}.{m}": getattr(self, f"{p}_{m}") for p in self.places for m in ("A", "B")}

    def by_linear(self, tensors: Tensors) -> Tensors:
        """``tensors`` of the places as those of the linears: A [m, R, D] and B [m, O, R] of all outputs O.

        The pairs of gate and up stand side by side on the linear that both are: ranks 2r, and B is 0 where the pair of
        one meets the outputs of the other.
        """
        if all(name == place.linear for name, place in self.places.items()):
            return tensors
        found: dict[str, Tensor] = {}
        for linear in self.linears:
            on_it = {name: place for name, place in self.places.items() if place.linear == linear}
            found[f"{linear}.A"] = torch.cat([tensors[f"{name}.A"] for name in on_it], dim=1)
            found[f"{linear}.B"] = torch.cat(
                [
                    F.pad(tensors[f"{name}.B"], (0, 0, place.offset, place.width - place.offset - place.dim_out))
                    for name, place in on_it.items()
                ],
                dim=2,
            )
        return found

    def stacks_products(self, x_TD: Tensor, base: FFNForm) -> bool:
        """Whether ``compute`` takes the form of ``ase_dist.ops.stacked``."""
        return (
            modes.stacks_products(x_TD)
            and not base.trains_between
            and is_frozen_linear(base.fc1, x_TD)
            and is_frozen_linear(base.fc2, x_TD)
            and all(p.dtype == x_TD.dtype for p in (base.fc1.weight, base.fc2.weight, *self.tensors().values()))
        )

    def stacks_router(self, x_tTD: Tensor, base: FFNForm, *, num_routed: int, k: int) -> bool:
        """Whether ``compute`` wants the rank activations of fc1's pairs from the routers' product."""
        is_grouped = self.groups_tokens(x_tTD, num_routed=num_routed, k=k)
        return "fc1" in self.linears and not is_grouped and self.stacks_products(x_tTD, base)

    def forget_stacks(self) -> None:
        """Copy the base's weights again at the next call."""
        for stack in self._stacks:
            stack.forget()

    def compute(
        self, tokens: RoutedTokens, base: FFNForm | None, act: Activation, *, routed: Tensors, shared: Tensors | None
    ) -> Tensor:
        """The output [T, D] where the tensors of all experts, ``routed`` and ``shared`` by linear, are on this rank."""
        assert base is not None, "LoRA experts act on a base"
        x_TD, gates_TN = tokens.x_TD, tokens.gates_TN
        if self.groups_tokens(x_TD, num_routed=len(next(iter(routed.values()))), k=tokens.k):
            return self._compute_grouped(tokens, base, act, routed=routed, shared=shared)
        if tokens.fc1_ranks_TR is not None or self.stacks_products(x_TD, base):  # the former came by ``stacks_router``
            weights = (base.fc1.weight, base.fc2.weight)
            keep = self.keeps_stacks and not torch.compiler.is_compiling() and all(map(can_tell_changes, weights))
            low_rank = {name: (tensor, None if shared is None else shared[name]) for name, tensor in routed.items()}
            y_TD = stacked.stacked_ffn(
                x_TD,
                stacked.Linear(base.fc1.weight, base.fc1.bias),
                stacked.Linear(base.fc2.weight, base.fc2.bias),
                u1_TR=tokens.fc1_ranks_TR,
                b1=low_rank.get("fc1.B"),
                a2=low_rank.get("fc2.A"),
                b2=low_rank.get("fc2.B"),
                gates_TN=gates_TN,
                activation=act,
                stacks=self._stacks if keep else None,
            )
            if "bypass" not in self.linears:
                return y_TD
            pairs = _concatenated_pairs(routed, shared, ("bypass",))
            return add_lowrank(y_TD, x_TD, *pairs["bypass"], gates=gates_TN)
        pairs = _concatenated_pairs(routed, shared, self.linears)
        if is_frozen_linear(base.fc1, x_TD) and is_frozen_linear(base.fc2, x_TD) and not base.trains_between:
            fc1, fc2 = (
                AdaptedLinear(fc.weight, fc.bias, *pairs.get(name, (None, None)))
                for name, fc in (("fc1", base.fc1), ("fc2", base.fc2))
            )
            y_TD = gated_ffn(x_TD, fc1, fc2, gates_TN=gates_TN, activation=act)
        else:
            h = _adapted_linear(x_TD, base.fc1, pairs.get("fc1"), gates_TN)
            h, again = (act(h), None) if base.trains_between else (h, act)
            y_TD = _adapted_linear(h, base.fc2, pairs.get("fc2"), gates_TN, activation=again)
        if "bypass" in pairs:
            y_TD = add_lowrank(y_TD, x_TD, *pairs["bypass"], gates=gates_TN)
        return y_TD

    def compute_exchanged(
        self,
        tokens: RoutedTokens,
        base: FFNForm | None,
        act: Activation,
        *,
        shared: Tensors | None,
        exchange: TokenExchange,
    ) -> Tensor:
        """The output [T, D] where tokens go to the ranks of their experts and come back, once for each adapted linear.

        ``exchange`` carries them; meanwhile this rank computes the base and the experts that it has itself.
        """
        assert base is not None, "LoRA experts act on a base"
        x_TD, own = tokens.x_TD, self.by_linear(self.tensors())
        shared = None if shared is None else self.by_linear(shared)
        local: dict[str, list[Pair]] = {}
        remote: dict[str, list[Pair]] = {}
        slots, ranks = exchange.local_gates_Tm.shape[1], len(exchange.send)
        visited = min(exchange.num_routed, slots * min(ranks, tokens.k + 1))  # a token meets all experts of a rank
        if self.groups_tokens(x_TD, num_routed=visited, k=tokens.k):
            local = _grouped_pairs(own, exchange.local_gates_Tm, exchange.local_groups())
            remote = _grouped_pairs(own, exchange.remote_gates_Mm, exchange.remote_groups())
            if shared is not None:
                for place, pair in _dense_pairs(shared, None, tokens.gates_TN[:, exchange.num_routed :]).items():
                    local[place] += pair
        else:
            gates = torch.cat([exchange.local_gates_Tm, tokens.gates_TN[:, exchange.num_routed :]], dim=1)
            local = _dense_pairs(own, shared, gates)
            remote = _dense_pairs(own, None, exchange.remote_gates_Mm)

        def linear(x: Tensor, place: str, weight: Tensor | None, bias: Tensor | None, act: Activation | None) -> Tensor:
            return exchanged_linear(x, weight, bias, local[place], remote[place], exchange, activation=act)

        return _ffn(x_TD, base, act, self.linears, linear)

    def form_cost(self, *, num_routed: int, k: int, device_type: str) -> FormCost:
        """What computing ``num_routed`` experts for all tokens costs, and the ``k`` of each token only."""
        # not by a parameter's shape, which ZeRO-3 leaves empty outside of the forward pass
        rank = -(-self._rank * len(self.places) // len(self.linears))  # gate and up are two pairs on one linear
        return FormCost(routed=num_routed, active=k, rank=rank, device_type=device_type)

    def groups_tokens(self, x_TD: Tensor, *, num_routed: int, k: int) -> bool:
        """Whether tokens are sorted by expert: where that costs less, and where plain operations are not asked for."""
        if self.form_cost(num_routed=num_routed, k=k, device_type=x_TD.device.type).cheaper() == "dense":
            return False
        is_autocast = autocast_dtype(x_TD.device.type) is not None
        return may_use_custom_autograd(x_TD) or (is_autocast and not is_exporting() and not modes.is_transforming())

    def _compute_grouped(
        self, tokens: RoutedTokens, base: FFNForm, act: Activation, *, routed: Tensors, shared: Tensors | None
    ) -> Tensor:
        """``compute`` with the pairs of a token's own routed experts only; shared experts act on all tokens anyway."""
        x_TD, n = tokens.x_TD, len(next(iter(routed.values())))
        gates_Tn, gates_TS = tokens.gates_TN[:, :n], tokens.gates_TN[:, n:]
        pairs = _grouped_pairs(routed, gates_Tn, group_pairs(tokens.active_TN[:, :n], pairs=tokens.k * x_TD.shape[0]))
        if shared is not None:
            for place, pair in _dense_pairs(shared, None, gates_TS).items():
                pairs[place] += pair

        def linear(x: Tensor, place: str, weight: Tensor | None, bias: Tensor | None, act: Activation | None) -> Tensor:
            return paired_linear(x, weight, bias, pairs[place], activation=act)

        return _ffn(x_TD, base, act, self.linears, linear)


def _ffn(
    x_TD: Tensor,
    base: FFNForm,
    act: Activation,
    places: Sequence[str],
    paired: Callable[[Tensor, str, Tensor | None, Tensor | None, Activation | None], Tensor],
) -> Tensor:
    """fc2(act(fc1(x))) with ``paired(x, place, weight, bias, act)`` for act(x) W^T + bias and the pairs of a place.

    A linear that is no plain frozen one is called, and the pairs alone are added.
    """

    def linear(x: Tensor, place: str, module: Linear, activation: Activation | None) -> Tensor:
        if activation is not None and base.trains_between:
            x, activation = activation(x), None
        if place in places and is_frozen_linear(module, x):
            return paired(x, place, module.weight, module.bias, activation)
        x = x if activation is None else activation(x)
        y: Tensor = module(x)
        return y + paired(x, place, None, None, None) if place in places else y

    y_TD = linear(linear(x_TD, "fc1", base.fc1, None), "fc2", base.fc2, act)
    return y_TD + paired(x_TD, "bypass", None, None, None) if "bypass" in places else y_TD


def _grouped_pairs(experts: Tensors, gates_Tn: Tensor, groups: Groups) -> dict[str, list[Pair]]:
    """By place the pair of each of a token's experts."""
    gates_K = take_pairs(gates_Tn, groups)
    places = dict.fromkeys(name.split(".")[0] for name in experts)
    return {p: [GroupedPair(experts[f"{p}.A"], experts[f"{p}.B"], gates_K, groups)] for p in places}


def _dense_pairs(routed: Tensors, shared: Tensors | None, gates_TN: Tensor) -> dict[str, list[Pair]]:
    """By place the pairs of all experts as one."""
    places = dict.fromkeys(name.split(".")[0] for name in routed)
    return {p: [DensePair(a, b, gates_TN)] for p, (a, b) in _concatenated_pairs(routed, shared, places).items()}


def _adapted_linear(
    x: Tensor,
    linear: Linear,
    pair: tuple[Tensor, Tensor] | None,
    gates: Tensor,
    *,
    activation: Activation | None = None,
) -> Tensor:
    """linear(act(x)) plus the gated pair; fused where ``linear`` is a plain ``nn.Linear``."""
    if pair is not None and is_plain_linear(linear):
        return lowrank_linear(x, linear.weight, linear.bias, *pair, gates=gates, activation=activation)
    x = x if activation is None else activation(x)
    y: Tensor = linear(x)
    return y if pair is None else add_lowrank(y, x, *pair, gates=gates)


def _concatenated_pairs(
    routed: Tensors, shared: Tensors | None, places: Iterable[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs of all experts, routed first, side by side: per place A [N r, D] and B [O, N r]."""

    def all_of(name: str) -> Tensor:
        return routed[name] if shared is None else torch.cat([routed[name], shared[name]])

    return {p: (all_of(f"{p}.A").flatten(0, 1), all_of(f"{p}.B").transpose(0, 1).flatten(1)) for p in places}


class FFNExperts(nn.Module):
    """Feed-forward experts D -> H -> D, stacked: fc1 [m, H, D], [m, H], fc2 [m, D, H], [m, D].

    y = the gated sum of a token's active experts, as in M3ViT and Mod-Squad. Upcycled from the FFN that they replace:
    expert i takes H of its hidden units, drawn by the expert's id, with fc2 scaled so that it estimates that FFN
    without bias; with the FFN's own H each starts as a copy of it. Of a gated FFN the experts are gated too: a unit is
    a row of gate and one of up, and fc1 [m, 2H, D] has both halves in the order that the FFN has.
    """

    def __init__(self, ids: Sequence[int], fc1: Linear, fc2: nn.Linear, *, hidden: int, seed: int) -> None:
        super().__init__()
        width, device = fc2.in_features, fc1.weight.device
        halves = fc1.out_features // width
        self.values_per_token = fc1.in_features + fc2.out_features  # sent and returned
        units = [torch.arange(width, device=device) for _ in ids]
        if hidden < width:
            orders = (torch.randperm(width, generator=generator(seed, "hidden", i)) for i in ids)
            units = [order[:hidden].sort().values.to(device) for order in orders]

        def stack(parts: Iterable[Tensor], *shape: int) -> nn.Parameter:
            tensors = list(parts)
            return nn.Parameter(torch.stack(tensors) if tensors else torch.empty(0, *shape))

        with torch.no_grad():
            bias1, bias2 = (
                torch.zeros(fc.out_features, device=device) if fc.bias is None else fc.bias for fc in (fc1, fc2)
            )
            rows = [torch.cat([u + half * width for half in range(halves)]) for u in units]
            weight1 = fc1.weight
            self.fc1_weight = stack((weight1[r] for r in rows), halves * hidden, fc1.in_features)
            self.fc2_weight = stack((fc2.weight[:, u] * (width / hidden) for u in units), fc2.out_features, hidden)
            self.fc1_bias = stack((bias1[r] for r in rows), halves * hidden)
            self.fc2_bias = stack((bias2 for _ in units), fc2.out_features)

    def tensors(self) -> dict[str, Tensor]:
        """``fc1.weight``, ``fc1.bias``, ``fc2.weight``, ``fc2.bias`` of these experts, the parameters themselves."""
        return {f"{p}.{m}": getattr(self, f"{p}_{m}") for p in ("fc1", "fc2") for m in ("weight", "bias")}

    def by_linear(self, tensors: Tensors) -> Tensors:
        """``tensors``: nothing else is on the base's linears."""
        return tensors

    def compute(
        self, tokens: RoutedTokens, base: FFNForm | None, act: Activation, *, routed: Tensors, shared: Tensors | None
    ) -> Tensor:
        """The output [T, D] where the tensors of all ``routed`` and ``shared`` experts are on this rank.

        Routed experts see the rows that chose them, sorted by expert, in two grouped products: dropless, without
        padding, and with shapes that depend on T and k alone, so that nothing is read back from the device. A program
        that is exported takes one expert after the other instead: ONNX has no grouped products.
        """
        x_TD, n, k = tokens.x_TD, len(routed["fc1.weight"]), tokens.k
        gates_Tn, active_Tn = tokens.gates_TN[:, :n], tokens.active_TN[:, :n]
        if not k:
            y_TD = torch.zeros_like(x_TD)
        elif modes.is_transforming():  # every expert on every token, with a gate of 0 where it is inactive
            y_TD = _wide_ffn(x_TD, gates_Tn, routed, act)
        elif is_exporting():
            y_TD = _one_after_the_other(x_TD, gates_Tn, active_Tn, routed, act)
        else:
            y_TD = _grouped_ffn(x_TD, gates_Tn, group_pairs(active_Tn, pairs=k * x_TD.shape[0]), routed, act)
        return y_TD if shared is None else y_TD + _wide_ffn(x_TD, tokens.gates_TN[:, n:], shared, act)

    def compute_exchanged(
        self,
        tokens: RoutedTokens,
        base: FFNForm | None,
        act: Activation,
        *,
        shared: Tensors | None,
        exchange: TokenExchange,
    ) -> Tensor:
        """The output [T, D] where tokens go to the ranks of their experts and come back, by ``exchange``."""
        own, x_TD = self.tensors(), tokens.x_TD
        rows_MD = SendRows.apply(x_TD, exchange)
        y_TD = _grouped_ffn(x_TD, exchange.local_gates_Tm, exchange.local_groups(), own, act)
        if shared is not None:
            y_TD = y_TD + _wide_ffn(x_TD, tokens.gates_TN[:, exchange.num_routed :], shared, act)
        y_MD = _grouped_ffn(rows_MD, exchange.remote_gates_Mm, exchange.remote_groups(), own, act)
        return y_TD + ReturnRows.apply(y_MD, exchange)


def _wide_ffn(x_TD: Tensor, gates_Tn: Tensor, experts: Tensors, act: Activation) -> Tensor:
    """Gated sum of experts that see every token, as one wide FFN with the gates on its hidden units."""
    h_TM = F.linear(x_TD, experts["fc1.weight"].flatten(0, 1), experts["fc1.bias"].flatten())
    gated_TM = (act(h_TM.unflatten(-1, (gates_Tn.shape[-1], -1))) * gates_Tn.unsqueeze(-1)).flatten(-2).to(x_TD.dtype)
    weight_DM = experts["fc2.weight"].transpose(0, 1).flatten(1)
    return F.linear(gated_TM, weight_DM) + gates_Tn.to(x_TD.dtype) @ experts["fc2.bias"]


def _grouped_ffn(x_TD: Tensor, gates_Tn: Tensor, groups: Groups, experts: Tensors, act: Activation) -> Tensor:
    """The gated sum, per row of x, of its experts in ``groups``: [T, D]. Gates act on the hidden units."""
    h_KH = gathered_product(x_TD, experts["fc1.weight"].mT, groups) + per_pair(experts["fc1.bias"], groups)
    gated_KH = (act(h_KH) * take_pairs(gates_Tn, groups).unsqueeze(-1)).to(x_TD.dtype)
    y_TD = combined_product(gated_KH, experts["fc2.weight"].mT, groups)
    return y_TD + gates_Tn.to(x_TD.dtype) @ experts["fc2.bias"]


def _one_after_the_other(
    x_TD: Tensor, gates_Tn: Tensor, active_Tn: Tensor, experts: Tensors, act: Activation
) -> Tensor:
    """The gated sum in plain operations, each expert on the tokens that it is active for, however many."""
    y_TD = torch.zeros_like(x_TD)
    for i, (fc1, bias1, fc2, bias2) in enumerate(zip(*experts.values(), strict=True)):
        idx_K = active_Tn[:, i].nonzero().squeeze(1)
        y_KD = F.linear(act(F.linear(x_TD[idx_K], fc1, bias1)), fc2, bias2)
        y_TD = y_TD.index_add(0, idx_K, (y_KD * gates_Tn[idx_K, i].unsqueeze(-1)).to(x_TD.dtype))
    return y_TD
