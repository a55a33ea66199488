"""Banks of experts as stacked tensors: LoRA pairs, and full feed-forward experts as in M3ViT and Mod-Squad.

Letters: n experts of this bank, r rank, D input width, O output width, H hidden width of a feed-forward expert.
An expert is initialised from its *global* id, so that the same experts result however they are sharded. Parameter
names avoid the word "expert", by which DeepSpeed's checkpoints would mistake them for its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ase_dist.ops import products
from ase_dist.ops.lowrank import Activation
from ase_dist.seeding import generator

Shape = tuple[int, int]  # (input width, output width) of an adapted linear


class LoRAExperts(nn.Module):
    """For each adapted place a pair A [n, r, D], B [n, O, r]; A Kaiming-uniform, B zero (LoRA, arXiv 2106.09685)."""

    def __init__(self, ids: Sequence[int], places: Mapping[str, Shape], *, rank: int, seed: int) -> None:
        super().__init__()
        self.places = tuple(places)
        self.values_per_token = sum(
            dim_in + dim_out for dim_in, dim_out in places.values()
        )  # of a token there and back
        for place, (dim_in, dim_out) in places.items():
            a_nrD = torch.empty(len(ids), rank, dim_in)
            for slot, global_id in enumerate(ids):
                bound = 1 / math.sqrt(dim_in)  # kaiming_uniform_ with a = sqrt(5), as in LoRA and peft
                a_nrD[slot].uniform_(-bound, bound, generator=generator(seed, place, "A", global_id))
            self.register_parameter(f"{place}_A", nn.Parameter(a_nrD))
            self.register_parameter(f"{place}_B", nn.Parameter(torch.zeros(len(ids), dim_out, rank)))

    def tensors(self) -> dict[str, Tensor]:
        """``{place}.A`` and ``{place}.B`` of this bank, the parameters themselves."""
        return {f"{p}.{m}": getattr(self, f"{p}_{m}") for p in self.places for m in ("A", "B")}


class FFNExperts(nn.Module):
    """Feed-forward experts D -> H -> D, stacked: fc1 [n, H, D], [n, H], fc2 [n, D, H], [n, D].

    Upcycled from the base they replace: expert i takes H of its hidden units, drawn by the expert's id, with fc2
    scaled so that it estimates the base without bias; with the base's own H each starts as a copy of it.
    """

    def __init__(self, ids: Sequence[int], fc1: nn.Linear, fc2: nn.Linear, *, hidden: int, seed: int) -> None:
        super().__init__()
        width = fc1.out_features
        self.values_per_token = fc1.in_features + fc2.out_features  # of a token there and back
        units = [_draw(width, hidden, seed=seed, global_id=i, device=fc1.weight.device) for i in ids]
        with torch.no_grad():
            self.fc1_weight = _stack((fc1.weight[u] for u in units), (hidden, fc1.in_features))
            self.fc2_weight = _stack((fc2.weight[:, u] * (width / hidden) for u in units), (fc2.out_features, hidden))
            self.fc1_bias = _stack((_bias(fc1)[u] for u in units), (hidden,))
            self.fc2_bias = _stack((_bias(fc2) for _ in units), (fc2.out_features,))

    def tensors(self) -> dict[str, Tensor]:
        """``fc1.weight``, ``fc1.bias``, ``fc2.weight``, ``fc2.bias`` of this bank, the parameters themselves."""
        return {f"{p}.{m}": getattr(self, f"{p}_{m}") for p in ("fc1", "fc2") for m in ("weight", "bias")}


def lora_pairs(tensors: Mapping[str, Tensor], places: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """The stacked pairs as concatenated ones: per place A [n r, D] and B [O, n r]."""
    return {p: (tensors[f"{p}.A"].flatten(0, 1), tensors[f"{p}.B"].transpose(0, 1).flatten(1)) for p in places}


def apply_all(x_TD: Tensor, gates_Tn: Tensor, bank: Mapping[str, Tensor], act: Activation) -> Tensor:
    """Gated sum of feed-forward experts that see every token, as one wide FFN with the gates on its hidden units."""
    h_TM = F.linear(x_TD, bank["fc1.weight"].flatten(0, 1), bank["fc1.bias"].flatten())
    gated_TM = (act(h_TM).unflatten(-1, (gates_Tn.shape[-1], -1)) * gates_Tn.unsqueeze(-1)).flatten(-2).to(x_TD.dtype)
    weight_DM = bank["fc2.weight"].transpose(0, 1).flatten(1)
    return F.linear(gated_TM, weight_DM) + gates_Tn.to(x_TD.dtype) @ bank["fc2.bias"]


def apply_routed(
    x_TD: Tensor, gates_Tn: Tensor, active_Tn: Tensor, k: int, bank: Mapping[str, Tensor], act: Activation
) -> Tensor:
    """Gated sum of each token's k active feed-forward experts: rows sorted by expert, two grouped products.

    Dropless and without padding; shapes depend on T and k alone, so nothing is read back from the device. A program
    that is exported takes one expert after the other instead: ONNX has no grouped products.
    """
    if products.is_exporting():
        return apply_in_turn(x_TD, gates_Tn, active_Tn, bank, act)
    idx_Tk = active_Tn.to(torch.uint8).topk(k, dim=-1).indices
    order_M = idx_Tk.flatten().argsort(stable=True)
    expert_M, token_M = idx_Tk.flatten()[order_M], order_M // k
    y_MD = grouped_ffn(x_TD[token_M], expert_M, bank, act)
    gate_M = gates_Tn[token_M, expert_M]
    weighted_MD = (y_MD * gate_M.unsqueeze(-1)).to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, token_M, weighted_MD)


def apply_in_turn(
    x_TD: Tensor, gates_Tn: Tensor, active_Tn: Tensor, bank: Mapping[str, Tensor], act: Activation
) -> Tensor:
    """``apply_routed`` in plain operations, each expert on the tokens that it is active for, however many."""
    y_TD = torch.zeros_like(x_TD)
    for i, (fc1, bias1, fc2, bias2) in enumerate(zip(*bank.values(), strict=True)):
        idx_M = active_Tn[:, i].nonzero().squeeze(1)
        y_MD = F.linear(act(F.linear(x_TD[idx_M], fc1, bias1)), fc2, bias2)
        y_TD = y_TD.index_add(0, idx_M, (y_MD * gates_Tn[idx_M, i].unsqueeze(-1)).to(x_TD.dtype))
    return y_TD


def grouped_ffn(x_MD: Tensor, expert_M: Tensor, bank: Mapping[str, Tensor], act: Activation) -> Tensor:
    """Row m through expert ``expert_M[m]`` (ascending) of the bank: [M, D]."""
    one_hot_Mn = F.one_hot(expert_M, bank["fc1.weight"].shape[0])
    ends_n = one_hot_Mn.sum(dim=0).cumsum(dim=0).to(torch.int32)
    select_Mn = one_hot_Mn.to(x_MD.dtype)  # biases as a product: its backward is one too, not a scattered sum
    h_MH = grouped_linear(x_MD, bank["fc1.weight"], ends_n) + select_Mn @ bank["fc1.bias"]
    return grouped_linear(act(h_MH), bank["fc2.weight"], ends_n) + select_Mn @ bank["fc2.bias"]


def grouped_linear(x_MD: Tensor, weight_nOD: Tensor, ends_n: Tensor) -> Tensor:
    """x W_e^T where the rows ends[e-1] .. ends[e] belong to expert e; ``ends_n`` is int32 on the rows' device."""
    return _GroupedLinear.apply(x_MD, weight_nOD, ends_n)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_nOD: Tensor, ends_n: Tensor) -> Tensor:
        ctx.save_for_backward(x_MD, weight_nOD, ends_n)
        return _grouped_product(x_MD, weight_nOD.transpose(1, 2), ends_n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_MD, weight_nOD, ends_n = ctx.saved_tensors
        grad_MO = grad_MO.contiguous()
        grad_x_MD = _grouped_product(grad_MO, weight_nOD, ends_n)
        grad_weight_nOD = _grouped_outer(grad_MO, x_MD, ends_n)
        return grad_x_MD, grad_weight_nOD, None


def _grouped_product(x_MK: Tensor, weight_nKO: Tensor, ends_n: Tensor) -> Tensor:
    """Rows of group e times weight e. Widths that torch's kernel refuses are padded with zeros, which is exact."""
    if not _has_kernel(x_MK):
        return torch.einsum("mn,mk,nko->mo", _membership(x_MK, ends_n), x_MK, weight_nKO)
    K, O = weight_nKO.shape[1:]
    x_MK = F.pad(x_MK, (0, _padding(K, x_MK)))
    weight_nOK = F.pad(weight_nKO.transpose(1, 2), (0, _padding(K, x_MK), 0, _padding(O, x_MK)))
    return F.grouped_mm(x_MK, weight_nOK.transpose(1, 2), offs=ends_n)[:, :O]


def _grouped_outer(y_MO: Tensor, x_MK: Tensor, ends_n: Tensor) -> Tensor:
    """y^T x over the rows of each group: [n, O, K], zero for a group without rows."""
    if not _has_kernel(x_MK):
        return torch.einsum("mn,mo,mk->nok", _membership(x_MK, ends_n), y_MO, x_MK)
    O, K = y_MO.shape[1], x_MK.shape[1]
    y_MO, x_MK = F.pad(y_MO, (0, _padding(O, y_MO))), F.pad(x_MK, (0, _padding(K, x_MK)))
    return F.grouped_mm(y_MO.T, x_MK, offs=ends_n)[:, :O, :K]


def _has_kernel(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _padding(width: int, like: Tensor) -> int:
    return -width % (16 // like.element_size())  # rows must begin on 16 bytes


def _membership(x_MK: Tensor, ends_n: Tensor) -> Tensor:
    rows_M1 = torch.arange(x_MK.shape[0], device=x_MK.device).unsqueeze(1)
    starts_n = F.pad(ends_n[:-1], (1, 0))
    return ((rows_M1 >= starts_n) & (rows_M1 < ends_n)).to(x_MK.dtype)


def _draw(width: int, hidden: int, *, seed: int, global_id: int, device: torch.device) -> Tensor:
    if hidden == width:
        return torch.arange(width, device=device)
    order = torch.randperm(width, generator=generator(seed, "hidden", global_id))
    return order[:hidden].sort().values.to(device)


def _stack(parts: Iterable[Tensor], shape: tuple[int, ...]) -> nn.Parameter:
    tensors = list(parts)
    return nn.Parameter(torch.stack(tensors) if tensors else torch.empty(0, *shape))


def _bias(linear: nn.Linear) -> Tensor:
    return linear.bias if linear.bias is not None else torch.zeros(linear.out_features, device=linear.weight.device)
