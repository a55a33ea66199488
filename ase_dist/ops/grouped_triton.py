"""The operators of ``ase_dist.ops.grouped`` as Triton kernels, for CUDA: rows are gathered while they are multiplied.

A program takes some pairs of one group. How many programs a group has only the device knows, so as many are started as
any grouping could need, and each finds its own pairs from the groups' ends. Sums are in float32 and in a fixed order.

Letters: T rows, K pairs of a row and a group sorted by group, n groups, D input width, O output width, R width of v.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 64  # of a program


def product(x: Tensor, row: Tensor | None, weight: Tensor, ends: Tensor) -> Tensor:
    """x[row[i]] W[group of i]: [K, O]; without ``row`` the rows of x are the pairs."""
    n, D, O = weight.shape
    K = x.shape[0] if row is None else row.shape[0]
    out = x.new_empty(K, O)
    block_O, block_D = _block(O, 128 if D <= 64 else 64), _block(D, 64)
    grid = (triton.cdiv(K, PAIRS) + n, triton.cdiv(O, block_O))
    with _on(x):
        _product_kernel[grid](
            x,
            out if row is None else row.contiguous(),
            weight,
            ends,
            out,
            n,
            D,
            O,
            *x.stride(),
            *weight.stride(),
            HAS_ROW=row is not None,
            GROUPS=triton.next_power_of_2(n),
            PAIRS=PAIRS,
            BLOCK_D=block_D,
            BLOCK_O=block_O,
            PRECISION=_precision(),
        )
    return out


def outer(v: Tensor, x: Tensor, row: Tensor | None, ends: Tensor) -> Tensor:
    """v^T x[row] over the pairs of each group: [n, R, D]; without ``row`` the rows of x are the pairs."""
    n, R, D = ends.shape[0], v.shape[1], x.shape[1]
    out = x.new_empty(n, R, D)
    block_R, block_D = _block(R, 64), _block(D, 128 if R <= 64 else 64)
    with _on(x):
        _outer_kernel[n, triton.cdiv(R, block_R), triton.cdiv(D, block_D)](
            v,
            x,
            out if row is None else row.contiguous(),
            ends,
            out,
            R,
            D,
            *v.stride(),
            *x.stride(),
            HAS_ROW=row is not None,
            PAIRS=PAIRS,
            BLOCK_R=block_R,
            BLOCK_D=block_D,
            PRECISION=_precision(),
        )
    return out


def add_rows(y: Tensor, rows: Tensor, slot: Tensor, offset: Tensor) -> None:
    """y[t] += the sum of rows[slot[offset[t] : offset[t + 1]]]."""
    (T, O), K = y.shape, rows.shape[0]
    if not T:
        return
    block_O = min(triton.next_power_of_2(O), 1024)
    with _on(y):
        _add_rows_kernel[T, triton.cdiv(O, block_O)](
            y, rows, slot.contiguous(), offset.contiguous(), T, K, O, *y.stride(), *rows.stride(), BLOCK_O=block_O
        )


def _block(width: int, most: int) -> int:
    """The width of a tile, a power of two from 16, which tensor cores want at least."""
    return int(min(max(triton.next_power_of_2(width), 16), most))


def _precision() -> str:
    """How float32 operands are multiplied: as the products of torch beside these."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device if x.is_cuda else -1)


@triton.jit
def _product_kernel(
    x_ptr,
    row_ptr,
    weight_ptr,
    ends_ptr,
    out_ptr,
    n,
    D,
    O,
    x_row,
    x_column,
    weight_group,
    weight_row,
    weight_column,
    HAS_ROW: tl.constexpr,
    GROUPS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    groups = tl.arange(0, GROUPS)
    ends = tl.load(ends_ptr + groups, mask=groups < n, other=0)
    starts = tl.load(ends_ptr + groups - 1, mask=(groups > 0) & (groups < n), other=0)
    programs = (ends - starts + PAIRS - 1) // PAIRS  # that each group needs
    group = tl.sum((tl.cumsum(programs, 0) <= program).to(tl.int32), 0)
    if group < n:
        before = tl.sum(tl.where(groups < group, programs, 0), 0)
        start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
        pairs = start + (program - before) * PAIRS + tl.arange(0, PAIRS)
        is_pair = pairs < tl.load(ends_ptr + group)
        rows = tl.load(row_ptr + pairs, mask=is_pair, other=0) if HAS_ROW else pairs
        rows = rows.to(tl.int64)
        columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        total = tl.zeros((PAIRS, BLOCK_O), dtype=tl.float32)
        for first in range(0, D, BLOCK_D):
            inner = first + tl.arange(0, BLOCK_D)
            x = tl.load(
                x_ptr + rows[:, None] * x_row + inner[None, :] * x_column,
                mask=is_pair[:, None] & (inner < D)[None, :],
                other=0.0,
            )
            weight = tl.load(
                weight_ptr
                + group.to(tl.int64) * weight_group
                + inner[:, None] * weight_row
                + columns[None, :] * weight_column,
                mask=(inner < D)[:, None] & (columns < O)[None, :],
                other=0.0,
            )
            total = tl.dot(x, weight, total, input_precision=PRECISION)
        tl.store(
            out_ptr + pairs.to(tl.int64)[:, None] * O + columns[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=is_pair[:, None] & (columns < O)[None, :],
        )


@triton.jit
def _outer_kernel(
    v_ptr,
    x_ptr,
    row_ptr,
    ends_ptr,
    out_ptr,
    R,
    D,
    v_row,
    v_column,
    x_row,
    x_column,
    HAS_ROW: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group = tl.program_id(0)
    start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(ends_ptr + group)
    left = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for first in range(start, end, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        is_pair = pairs < end
        rows = tl.load(row_ptr + pairs, mask=is_pair, other=0) if HAS_ROW else pairs
        v = tl.load(
            v_ptr + pairs.to(tl.int64)[None, :] * v_row + left[:, None] * v_column,
            mask=(left < R)[:, None] & is_pair[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + rows.to(tl.int64)[:, None] * x_row + columns[None, :] * x_column,
            mask=is_pair[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        total = tl.dot(v, x, total, input_precision=PRECISION)
    tl.store(
        out_ptr + group.to(tl.int64) * R * D + left[:, None] * D + columns[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(left < R)[:, None] & (columns < D)[None, :],
    )


@triton.jit
def _add_rows_kernel(
    y_ptr, rows_ptr, slot_ptr, offset_ptr, T, K, O, y_row, y_column, rows_row, rows_column, BLOCK_O: tl.constexpr
):
    t = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    first = tl.load(offset_ptr + t)
    end = tl.load(offset_ptr + t + 1, mask=t + 1 < T, other=K)
    place = y_ptr + t.to(tl.int64) * y_row + columns * y_column
    total = tl.load(place, mask=columns < O, other=0.0).to(tl.float32)
    for i in range(first, end):
        slot = tl.load(slot_ptr + i).to(tl.int64)
        total += tl.load(rows_ptr + slot * rows_row + columns * rows_column, mask=columns < O, other=0.0).to(tl.float32)
    tl.store(place, total.to(y_ptr.dtype.element_ty), mask=columns < O)
