"""Products of rows with the weight of a group, one row in as many groups as it needs, without a copy per group.

Three operations, each the derivative of the other two, so that gradients of any order are right:

    gathered_product   out[i] = x[row[i]] W[group[i]]               x [T, D], W [n, D, O]  ->  [K, O]
    combined_product   y[t]   = sum over row[i] = t of v[i] W[..]   v [K, R], W [n, R, O]  ->  [T, O]
    gathered_outer     G[e]   = sum over group[i] = e of v[i] x[row[i]]^T                  ->  [n, R, D]

Shapes follow from the arguments alone and nothing is read back from the device; no sum is made by atomic additions, so
a step gives the same bits every time. On a CPU a group is a small product in the cache. On CUDA wide bf16 products are
torch's ``grouped_mm``, which is fast from sm90 on, and all others Triton's (``grouped_triton``), which gather inside.
Elsewhere groups are taken in turn, for which their ends are read once.

Letters: T rows, K pairs of a row and a group sorted by group, n groups, D input width, O output width, R width of v.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from ase_dist.ops import products
from ase_dist.ops.operator import Operator

NARROW = 64  # Triton's product beats a copy of the rows and torch's up to about this width of a weight


class Groups(NamedTuple):
    """Pairs of a row and a group, ascending by group, then by row.

    ``row_K`` and ``group_K`` are the pairs; ``ends_n`` int32 the end of each group among them. ``slot_K`` are the pairs
    in the order of the rows: those of row t begin at ``offset_T[t]`` there. A row has a group at most once.
    """

    row_K: Tensor
    group_K: Tensor
    ends_n: Tensor
    slot_K: Tensor
    offset_T: Tensor

    @property
    def num_rows(self) -> int:
        """T."""
        return self.offset_T.shape[0]


def group_pairs(mask_Tn: Tensor, *, pairs: int) -> Groups:
    """The pairs that ``mask_Tn`` [T, n] has; ``pairs`` is how many, known without asking the device."""
    group_K, row_K = torch.nonzero_static(mask_Tn.T, size=pairs).T.contiguous().unbind(dim=0)
    ends_n = mask_Tn.sum(dim=0).cumsum(dim=0).to(torch.int32)
    count_T = mask_Tn.sum(dim=1)
    return Groups(row_K, group_K, ends_n, row_K.argsort(stable=True), count_T.cumsum(dim=0) - count_T)


def gathered_product(x_TD: Tensor, weight_nDO: Tensor, groups: Groups) -> Tensor:
    """Each pair's row times the weight of its group: [K, O]."""
    return _GatheredProduct.apply(x_TD, weight_nDO, *groups)


def combined_product(v_KR: Tensor, weight_nRO: Tensor, groups: Groups) -> Tensor:
    """Each pair's v times the weight of its group, added up per row: [T, O]."""
    return _CombinedProduct.apply(v_KR, weight_nRO, *groups)


def gathered_outer(v_KR: Tensor, x_TD: Tensor, groups: Groups) -> Tensor:
    """v^T x over the pairs of each group: [n, R, D], zero for a group without pairs."""
    return _GatheredOuter.apply(v_KR, x_TD, *groups)


def take_pairs(values: Tensor, groups: Groups) -> Tensor:
    """The values [K, ...] of a dense [T, n, ...] at the pairs. As no pair is twice, gradients are copied, not added."""
    return _TakeDistinct.apply(values.flatten(0, 1), groups.row_K * values.shape[1] + groups.group_K)


def per_pair(bias_nO: Tensor, groups: Groups) -> Tensor:
    """The bias of each pair's group: [K, O], as a product, so that its gradient is a sum by groups."""
    pairs = groups.row_K.shape[0]
    row_K, slot_K, offset_K = (torch.arange(pairs, device=bias_nO.device) for _ in range(3))  # a compiler wants three
    alone = Groups(row_K, groups.group_K, groups.ends_n, slot_K, offset_K)
    return gathered_product(bias_nO.new_ones(pairs, 1), bias_nO.unsqueeze(1), alone)


# ---------------------------------------------------------------------------------------------------------------------
# Without a gradient, for hand-written autograd


def product(x_TD: Tensor, weight_nDO: Tensor, groups: Groups) -> Tensor:
    """``gathered_product`` without a gradient."""
    return _product(x_TD, groups.row_K, weight_nDO, groups)


def outer(v_KR: Tensor, x_TD: Tensor, groups: Groups) -> Tensor:
    """``gathered_outer`` without a gradient."""
    return _outer(v_KR, x_TD, groups.row_K, groups)


def add_product(y_TO: Tensor, v_KR: Tensor, weight_nRO: Tensor, groups: Groups) -> Tensor:
    """``combined_product`` added to y in place, without a gradient."""
    if y_TO.device.type == "cpu" and y_TO.is_contiguous():
        add_grouped_product_(y_TO, v_KR, groups.row_K, weight_nRO, groups.ends_n)
        return y_TO
    return add_rows(y_TO, _product(v_KR, None, weight_nRO, groups), groups)


def add_rows(y_TO: Tensor, rows_KO: Tensor, groups: Groups) -> Tensor:
    """The values of each row's pairs added up and to y, in place, without a gradient."""
    add_rows_(y_TO, rows_KO, groups.row_K, groups.slot_K, groups.offset_T)
    return y_TO


def _product(x: Tensor, row_K: Tensor | None, weight_nDO: Tensor, groups: Groups) -> Tensor:
    x, row_K = _gathered(x, row_K, weight_nDO.shape[1:])
    out: Tensor = grouped_product(x, row_K, weight_nDO, groups.ends_n)
    return out


def _outer(v_KR: Tensor, x: Tensor, row_K: Tensor | None, groups: Groups) -> Tensor:
    x, row_K = _gathered(x, row_K, (v_KR.shape[1], x.shape[1]))
    out: Tensor = grouped_outer(v_KR, x, row_K, groups.ends_n)
    return out


def _gathered(x: Tensor, row_K: Tensor | None, widths: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """The rows gathered here where the product is wide on an accelerator: its kernel reads them in order."""
    if row_K is None or x.device.type == "cpu" or min(widths) <= NARROW:
        return x, row_K
    return x.index_select(0, row_K), None


class _GatheredProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_nDO: Tensor, *groups: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_nDO, *groups)
        return product(x_TD, weight_nDO, Groups(*groups))

    @staticmethod
    def backward(ctx: Any, grad_KO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_nDO, *rest = ctx.saved_tensors
        groups = Groups(*rest)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x = combined_product(grad_KO, weight_nDO.transpose(1, 2), groups) if needs_x else None
        grad_weight = gathered_outer(grad_KO, x_TD, groups).transpose(1, 2) if needs_weight else None
        return grad_x, grad_weight, *([None] * len(groups))


class _CombinedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v_KR: Tensor, weight_nRO: Tensor, *groups: Tensor) -> Tensor:
        ctx.save_for_backward(v_KR, weight_nRO, *groups)
        found = Groups(*groups)
        return add_product(v_KR.new_zeros(found.num_rows, weight_nRO.shape[2]), v_KR, weight_nRO, found)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        v_KR, weight_nRO, *rest = ctx.saved_tensors
        groups = Groups(*rest)
        needs_v, needs_weight = ctx.needs_input_grad[:2]
        grad_v = gathered_product(grad_TO, weight_nRO.transpose(1, 2), groups) if needs_v else None
        grad_weight = gathered_outer(v_KR, grad_TO, groups) if needs_weight else None
        return grad_v, grad_weight, *([None] * len(groups))


class _GatheredOuter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v_KR: Tensor, x_TD: Tensor, *groups: Tensor) -> Tensor:
        ctx.save_for_backward(v_KR, x_TD, *groups)
        return outer(v_KR, x_TD, Groups(*groups))

    @staticmethod
    def backward(ctx: Any, grad_nRD: Tensor) -> tuple[Tensor | None, ...]:
        v_KR, x_TD, *rest = ctx.saved_tensors
        groups = Groups(*rest)
        needs_v, needs_x = ctx.needs_input_grad[:2]
        grad_v = gathered_product(x_TD, grad_nRD.transpose(1, 2), groups) if needs_v else None
        grad_x = combined_product(v_KR, grad_nRD, groups) if needs_x else None
        return grad_v, grad_x, *([None] * len(groups))


class _TakeDistinct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_M: Tensor, index_K: Tensor) -> Tensor:
        ctx.save_for_backward(index_K)
        ctx.shape = values_M.shape
        return values_M.index_select(0, index_K)

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor, None]:
        return grad_K.new_zeros(ctx.shape).index_copy(0, ctx.saved_tensors[0], grad_K), None


# ---------------------------------------------------------------------------------------------------------------------
# The operators, which a tracer sees whole


@Operator
def grouped_product(x: Tensor, row: Tensor | None, weight: Tensor, ends: Tensor) -> Tensor:
    """x[row[i]] W[group of i]: [K, O]; without ``row`` the rows of x are the pairs."""
    pairs, (_, K, O) = (x if row is None else row).shape[0], weight.shape
    if pairs and row is None and _has_fast_grouped_mm(x):
        by_row = weight.stride(-1) == 1
        weight = _aligned(weight, K, O) if by_row else _aligned(weight.mT, O, K).mT
        return F.grouped_mm(_aligned(x, K), weight, offs=ends)[:, :O].contiguous()
    if pairs and _has_triton(x):
        from ase_dist.ops import grouped_triton

        return grouped_triton.product(x, row, weight, ends)
    out = x.new_empty(pairs, O)
    for group, pairs_of in _spans(ends, pairs):
        rows = x[pairs_of] if row is None else x.index_select(0, row[pairs_of])
        out[pairs_of] = products.linear(rows, weight[group].T)
    return out


@grouped_product.register_fake
def _(x: Tensor, row: Tensor | None, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty((x if row is None else row).shape[0], weight.shape[2])


@Operator
def grouped_outer(v: Tensor, x: Tensor, row: Tensor | None, ends: Tensor) -> Tensor:
    """v^T x[row] over the pairs of each group: [n, R, D]; without ``row`` the rows of x are the pairs."""
    pairs, R, D = v.shape[0], v.shape[1], x.shape[1]
    if pairs and row is None and _has_fast_grouped_mm(x):
        return F.grouped_mm(_aligned(v, R).T, _aligned(x, D), offs=ends)[:, :R, :D].contiguous()
    if pairs and _has_triton(x):
        from ase_dist.ops import grouped_triton

        return grouped_triton.outer(v, x, row, ends)
    out = x.new_zeros(ends.shape[0], R, D)
    for group, pairs_of in _spans(ends, pairs):
        rows = x[pairs_of] if row is None else x.index_select(0, row[pairs_of])
        out[group] = products.outer(v[pairs_of], rows)
    return out


@grouped_outer.register_fake
def _(v: Tensor, x: Tensor, row: Tensor | None, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], v.shape[1], x.shape[1])


@partial(Operator, mutates=("y",))
def add_grouped_product_(y: Tensor, v: Tensor, row: Tensor, weight: Tensor, ends: Tensor) -> None:
    """y[row[i]] += v[i] W[group of i] on a CPU, where a group's part of y is in the cache and no rows collide."""
    for group, pairs_of in _spans(ends, v.shape[0]):
        y.index_add_(0, row[pairs_of], products.linear(v[pairs_of], weight[group].T))


@add_grouped_product_.register_fake
def _(y: Tensor, v: Tensor, row: Tensor, weight: Tensor, ends: Tensor) -> None:
    return None


@partial(Operator, mutates=("y",))
def add_rows_(y: Tensor, rows: Tensor, row: Tensor, slot: Tensor, offset: Tensor) -> None:
    """y[row[i]] += rows[i]: y[t] += the sum of rows[slot[offset[t] : offset[t + 1]]], in this order."""
    if not rows.shape[0]:
        return
    if y.device.type == "cpu":
        y.index_add_(0, row, rows)
    elif _has_triton(y):
        from ase_dist.ops import grouped_triton

        grouped_triton.add_rows(y, rows, slot, offset)
    else:
        y.add_(F.embedding_bag(slot, rows, offset, mode="sum"))


@add_rows_.register_fake
def _(y: Tensor, rows: Tensor, row: Tensor, slot: Tensor, offset: Tensor) -> None:
    return None


def _has_fast_grouped_mm(x: Tensor) -> bool:
    """Whether torch's grouped product is one kernel here; elsewhere it reads the ends back and loops (2.14)."""
    return x.is_cuda and x.dtype is torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] >= 9


def _has_triton(x: Tensor) -> bool:
    return x.is_cuda and x.dtype is not torch.float64 and find_spec("triton") is not None


def _aligned(x: Tensor, *widths: int) -> Tensor:
    """x as torch's kernel takes it: rows that begin on 16 bytes, zeros behind the last dimensions ``widths``.

    x itself where widths, strides and address fit, which those of weights in ZeRO's flat buffers may not.
    """
    unit = 16 // x.element_size()
    padding = [-width % unit for width in widths]
    fits = x.stride(-1) == 1 and x.stride(-2) % unit == 0 and x.stride(-2) >= x.shape[-1] and x.data_ptr() % 16 == 0
    if fits and not any(padding):
        return x
    return F.pad(x, [end for width in reversed(padding) for end in (0, width)])


def _spans(ends_n: Tensor, pairs: int) -> Iterator[tuple[int, slice]]:
    """The groups that have pairs, and which; where the ends are on an accelerator they are read once for a tensor."""
    if not pairs:
        return
    ends = _READ_ENDS.get(ends_n)
    if ends is None:
        ends = ends_n.tolist()
        if ends_n.device.type != "cpu":
            _READ_ENDS[ends_n] = ends
    start = 0
    for group, end in enumerate(ends):
        if end > start:
            yield group, slice(start, end)
        start = end


_READ_ENDS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


# torch's registry, from which any counter takes them


@register_flop_formula(torch.ops.ase_dist.grouped_product)
def _product_flops(x: Any, row: Any, weight: Any, ends: Any, **_: Any) -> int:
    return 2 * (x[0] if row is None else row[0]) * weight[1] * weight[2]


@register_flop_formula(torch.ops.ase_dist.grouped_outer)
def _outer_flops(v: Any, x: Any, row: Any, ends: Any, **_: Any) -> int:
    return 2 * v[0] * v[1] * x[1]


@register_flop_formula(torch.ops.ase_dist.add_grouped_product_)
def _add_product_flops(y: Any, v: Any, row: Any, weight: Any, ends: Any, **_: Any) -> int:
    return 2 * v[0] * weight[1] * weight[2]
