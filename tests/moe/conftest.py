"""A small FFN, layers with trained-looking experts, and the per-token reference of the paper's equations."""

import itertools

import pytest
import torch
from torch import nn

from ase_dist.moe import MoEFFN, global_state, load_global_state


class FFN(nn.Module):
    """fc1, act, fc2 as in timm's Mlp."""

    def __init__(self, dim: int = 12, hidden: int = 20, *, bias: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.3, generator=generator)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def randomise(layer: MoEFFN, *, seed: int = 1, std: float = 0.3) -> None:
    """Give every trained tensor of a layer random values, the same ones on any topology."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * std
             for name, tensor in sorted(global_state(layer).items())}  # fmt: skip
    load_global_state(layer, state)


def reference_gates(logits, *, gating, k, num_shared):
    """Gates of ONE token, straight from the paper's equations."""
    n = len(logits) - num_shared
    z, shared = list(logits[:n]), list(logits[n:])
    best = sorted(range(n), key=lambda i: -z[i])[:k]
    gates = [torch.zeros_like(logits[0])] * len(logits)
    if gating in ("ase", "renormalised"):  # Eq. 8-9; the two are the same function
        total = sum(z[i].exp() for i in best) + sum(s.exp() for s in shared)
        for i in [*best, *range(n, len(logits))]:
            gates[i] = logits[i].exp() / total
    elif gating == "naive":  # Eq. 5
        for i in best:
            gates[i] = z[i].exp() / sum(v.exp() for v in z)
        for i in range(n, len(logits)):
            gates[i] = torch.ones_like(logits[0])
    elif gating == "separate":
        for ids in (best, range(n, len(logits))):
            for i in ids:
                gates[i] = logits[i].exp() / sum(logits[j].exp() for j in ids)
    else:  # Eq. 1-3; dense keeps all
        for i in best if gating == "topk" else range(len(logits)):
            gates[i] = logits[i].exp() / sum(v.exp() for v in logits)
    return gates


def reference_layer(x, base, state, *, gating, k, num_shared, scale=1.0):
    """The layer of Eq. 10 for x [tasks, T, D], one token and one expert at a time."""
    out = []
    for t, token in itertools.product(range(x.shape[0]), range(x.shape[1])):
        v = x[t, token]
        gates = reference_gates(state["router"][t] @ v, gating=gating, k=k, num_shared=num_shared)

        def delta(place, u, gates=gates):
            if f"{place}.A" not in state:
                return 0
            pairs = zip(gates, state[f"{place}.A"], state[f"{place}.B"], strict=True)
            return sum(g * scale * (B @ (A @ u)) for g, A, B in pairs)

        if "fc1.weight" in state:
            experts = zip(state["fc1.weight"], state["fc1.bias"], state["fc2.weight"], state["fc2.bias"], strict=True)
            out.append(
                sum(g * (w2 @ base.act(w1 @ v + b1) + b2) for g, (w1, b1, w2, b2) in zip(gates, experts, strict=True))
            )
            continue
        h = base.act(base.fc1(v) + delta("fc1", v))
        out.append(base.fc2(h) + delta("fc2", h) + delta("bypass", v))
    return torch.stack(out).view_as(x)


@pytest.fixture
def ffn():
    return FFN()
