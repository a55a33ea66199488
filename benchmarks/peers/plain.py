"""The sides that need no library: ours, the floor, plain LoRA, and two other ways to apply the same experts.

Letters: T tokens of all tasks, D width, O output width, N experts, r rank, A active experts of a token,
K = T * A.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from peers.common import TASKS, Case, Side, fill
from torch import Tensor, nn
from torch.nn import functional as F

from ase_dist.moe import MoEFFN
from ase_dist.moe.experts import RoutedTokens

Tensors = Mapping[str, Tensor]
Adapt = Callable[[Tensor, nn.Module, Tensor, Tensor], Tensor]


def frozen(case: Case) -> Side:
    """The FFN alone: the floor."""
    return Side(case.base, lambda x: (case.base(x), None))


class PlainLoRA(nn.Module):
    """One LoRA pair per linear, as peft writes it, without its dropout and casts."""

    def __init__(self, base: nn.Module, *, rank: int) -> None:
        super().__init__()
        self.base = base
        width, hidden = base.fc1.in_features, base.fc1.out_features
        pairs = ((width, rank), (rank, hidden), (hidden, rank), (rank, width))
        dtype, device = base.fc1.weight.dtype, base.fc1.weight.device
        linears = (nn.Linear(*shape, bias=False, dtype=dtype, device=device) for shape in pairs)
        self.a1, self.b1, self.a2, self.b2 = linears

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        h = self.base.act(self.base.fc1(x) + self.b1(self.a1(x)))
        return self.base.fc2(h) + self.b2(self.a2(h))


def ours(case: Case) -> Side:
    """``MoEFFN``, its routers, gates and router loss included."""
    N, k, S, r = case.experts
    gating = "ase" if S else "topk"
    layer = MoEFFN(case.base, num_experts=N, k=k, num_shared=S, rank=r, num_tasks=TASKS, gating=gating, seed=0)
    for experts in (layer.routed, layer.shared):
        if experts is not None:
            fill(experts)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        result = layer(x)
        return result.output, result.aux_loss

    return Side(layer, forward)


def index_loop(case: Case) -> Side:
    """Ours with its experts in a loop (``by_loop``)."""
    side = ours(case)
    apply_experts(side.module, by_loop)
    return side


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to apply the experts: the same function as ours, with our routers, gates and statistics


def apply_experts(model: nn.Module, adapt: Callable[[RoutedTokens, int], Adapt]) -> None:
    """From now on the layers with LoRA experts in ``model`` apply them as ``adapt(tokens, shared experts)`` does."""
    for module in model.modules():
        if isinstance(module, MoEFFN):
            module.routed.compute = partial(_compute, adapt)


def _compute(
    adapt: Callable[[RoutedTokens, int], Adapt],
    tokens: RoutedTokens,
    base: nn.Module,
    act: Callable[[Tensor], Tensor],
    *,
    routed: Tensors,
    shared: Tensors | None,
) -> Tensor:
    """``LoRAExperts.compute`` with each linear adapted by ``adapt``."""
    stacks = routed if shared is None else {name: torch.cat([t, shared[name]]) for name, t in routed.items()}
    linear = adapt(tokens, 0 if shared is None else len(shared["fc1.A"]))
    h = act(linear(tokens.x_TD, base.fc1, stacks["fc1.A"], stacks["fc1.B"]))
    return linear(h, base.fc2, stacks["fc2.A"], stacks["fc2.B"])


def by_loop(tokens: RoutedTokens, num_shared: int) -> Adapt:
    """Rows sorted by expert, then one expert after the other: its pair on its rows, gated sums by ``index_add``."""
    visits = _visits(tokens, num_shared)

    def linear(x_TD: Tensor, module: nn.Module, a_NrD: Tensor, b_NOr: Tensor) -> Tensor:
        y_TO: Tensor = module(x_TD)
        for expert, (a_rD, b_Or, rows) in enumerate(zip(a_NrD, b_NOr, visits, strict=True)):
            gate_M1 = tokens.gates_TN[rows, expert].unsqueeze(-1)
            delta = F.linear(F.linear(x_TD[rows], a_rD), b_Or) * gate_M1
            y_TO = y_TO.index_add_(0, rows, delta.to(y_TO.dtype))
        return y_TO

    return linear


def by_sorted_products(tokens: RoutedTokens, num_shared: int) -> Adapt:
    """A copy of a token for each of its experts, sorted by expert, in grouped products; gated sums by ``index_add``."""
    N, active = tokens.gates_TN.shape[1], tokens.k + num_shared
    idx_TA = tokens.active_TN.to(torch.uint8).topk(active, dim=-1).indices
    order_K = idx_TA.flatten().argsort(stable=True)
    expert_K, token_K = idx_TA.flatten()[order_K], order_K // active
    ends_N = F.one_hot(expert_K, N).sum(dim=0).cumsum(dim=0).to(torch.int32)
    gate_K1 = tokens.gates_TN[token_K, expert_K].unsqueeze(-1)

    def linear(x_TD: Tensor, module: nn.Module, a_NrD: Tensor, b_NOr: Tensor) -> Tensor:
        u_Kr = _grouped_linear(x_TD[token_K], a_NrD, ends_N) * gate_K1
        delta_KO = _grouped_linear(u_Kr.to(x_TD.dtype), b_NOr, ends_N)
        return module(x_TD).index_add_(0, token_K, delta_KO)

    return linear


def _visits(tokens: RoutedTokens, num_shared: int) -> list[Tensor]:
    """The tokens of each expert, from one sort; on meta tensors, which hold no choice, evenly many."""
    T, N = tokens.active_TN.shape
    if tokens.active_TN.is_meta:
        routed = N - num_shared
        counts = [T * tokens.k // routed] * routed + [T] * num_shared
        return [tokens.active_TN.new_empty(count, dtype=torch.int64) for count in counts]
    expert_M, token_M = tokens.active_TN.T.nonzero().unbind(dim=1)
    return list(token_M.split(torch.bincount(expert_M, minlength=N).tolist()))


def _grouped_linear(x_KD: Tensor, weight_NOD: Tensor, ends_N: Tensor) -> Tensor:
    """torch's product of sorted rows with the weight of their group; widths padded to the 16 bytes that it wants."""
    O, D = weight_NOD.shape[1:]
    unit = 16 // x_KD.element_size()
    padded_NOD = F.pad(weight_NOD, (0, -D % unit, 0, -O % unit))
    return F.grouped_mm(F.pad(x_KD, (0, -D % unit)), padded_NOD.transpose(1, 2), offs=ends_N)[:, :O]
