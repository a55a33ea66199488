"""Products of rows with the weight of the group that they belong to, without a loop over the groups.

Letters: M rows sorted by group, n groups, D input width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ase_dist.ops.modes import differentiable_gradients, wants_second_order


def grouped_linear(x_MD: Tensor, weight_nOD: Tensor, ends_n: Tensor) -> Tensor:
    """x W_e^T where the rows ends[e-1] .. ends[e] belong to group e; ``ends_n`` is int32 on the rows' device."""
    return _GroupedLinear.apply(x_MD, weight_nOD, ends_n)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_nOD: Tensor, ends_n: Tensor) -> Tensor:
        ctx.save_for_backward(x_MD, weight_nOD, ends_n)
        return _product(x_MD, weight_nOD.transpose(1, 2), ends_n)

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_MD, weight_nOD, ends_n = ctx.saved_tensors
        if wants_second_order():

            def plain(x_MD: Tensor, weight_nOD: Tensor) -> Tensor:
                return torch.einsum("mn,md,nod->mo", _membership(x_MD, ends_n), x_MD, weight_nOD)

            needed = ctx.needs_input_grad[:2]
            grad_x, grad_weight = differentiable_gradients(plain, (x_MD, weight_nOD), needed, grad_MO)
            return grad_x, grad_weight, None
        grad_MO = grad_MO.contiguous()
        return _product(grad_MO, weight_nOD, ends_n), _outer(grad_MO, x_MD, ends_n), None


def _product(x_MK: Tensor, weight_nKO: Tensor, ends_n: Tensor) -> Tensor:
    """Rows of group e times weight e. Widths that torch's kernel refuses are padded with zeros, which is exact."""
    if not _has_kernel(x_MK):
        return torch.einsum("mn,mk,nko->mo", _membership(x_MK, ends_n), x_MK, weight_nKO)
    K, O = weight_nKO.shape[1:]
    x_MK = F.pad(x_MK, (0, _padding(K, x_MK)))
    weight_nOK = F.pad(weight_nKO.transpose(1, 2), (0, _padding(K, x_MK), 0, _padding(O, x_MK)))
    return F.grouped_mm(x_MK, weight_nOK.transpose(1, 2), offs=ends_n)[:, :O]


def _outer(y_MO: Tensor, x_MK: Tensor, ends_n: Tensor) -> Tensor:
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
    """One-hot [M, n]: the group of each row."""
    rows_M1 = torch.arange(x_MK.shape[0], device=x_MK.device).unsqueeze(1)
    starts_n = F.pad(ends_n[:-1], (1, 0))
    return ((rows_M1 >= starts_n) & (rows_M1 < ends_n)).to(x_MK.dtype)
