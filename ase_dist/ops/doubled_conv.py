"""A 3x3 convolution of an image enlarged twofold, without the enlarged image.

Bilinear doubling and the taps of a convolution are linear, and one acts on the grid, the other on the channels:

    conv(double(x)) = sum over taps i, j of  V_i (W_ij x) U_j^T

W_ij [O, D] is the matrix of a tap, applied to the small image; V_i [2h, h] and U_j [2w, w] double an axis and shift it
by the tap, zeros beyond the border. That is a quarter of the multiplications and no [B, D, 2h, 2w] kept for the
backward pass: a PUP head takes little more than a third of the time on a CPU. U and V are banded; they are applied in
blocks of ``BLOCK`` cells, dense within.

Letters: B images, D and O channels in and out, h w the small grid, R = B * h rows of cells, T = B * h * w cells.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ase_dist.ops.modes import differentiable_gradients, may_use_custom_autograd, wants_second_order
from ase_dist.ops.products import linear, outer

MIN_CHANNELS = 64  # channels in and out from which the small products pay
BLOCK = 8  # cells of an axis in a dense block; more means more zeros multiplied, fewer means smaller products


def doubled_conv(x_BDhw: Tensor, conv: nn.Conv2d) -> Tensor:
    """``conv`` (3x3, padding 1) of the bilinearly doubled ``x``, [B, O, 2h, 2w]; by the taps where that is faster."""
    if _by_taps(x_BDhw, conv):
        return DoubledConv.apply(x_BDhw, conv.weight, conv.bias)  # type: ignore[no-any-return]
    return conv(double(x_BDhw))  # type: ignore[no-any-return]


def double(x_BChw: Tensor) -> Tensor:
    """Twice the height and width, bilinearly."""
    if x_BChw.device.type == "cpu" or torch.compiler.is_compiling() or not may_use_custom_autograd(x_BChw):
        return _interpolate(x_BChw)
    return Doubled.apply(x_BChw)  # type: ignore[no-any-return]


def _interpolate(x_BChw: Tensor) -> Tensor:
    return F.interpolate(x_BChw, scale_factor=2, mode="bilinear", align_corners=False)


class Doubled(torch.autograd.Function):
    """``apply(x [B, C, h, w]) -> [B, C, 2h, 2w]``, bilinearly; its gradient is summed in float32 and in one order.

    torch's own adds with atomics: 16 additions a cell, rounded to bf16 each where the gradient is bf16, in another
    order in every run (2.14). Here it is a depthwise convolution of the gradient, without atomics.
    """

    @staticmethod
    def forward(ctx: Any, x_BChw: Tensor) -> Tensor:
        """torch's own."""
        ctx.save_for_backward(x_BChw)
        return _interpolate(x_BChw)

    @staticmethod
    def backward(ctx: Any, grad_BCHW: Tensor) -> Tensor | None:
        """The transposed doubling."""
        if wants_second_order():
            return differentiable_gradients(_interpolate, ctx.saved_tensors, ctx.needs_input_grad, grad_BCHW)[0]
        return transposed_doubling(grad_BCHW)


def transposed_doubling(large_BCHW: Tensor) -> Tensor:
    """The transpose of ``double``, [B, C, H / 2, W / 2]: sums of 4 x 4 cells, in float32 or better, rounded once.

    Along an axis cell i gives 3/4 to the large cells 2i and 2i + 1 and 1/4 to 2i - 1 and 2i + 2; at a border, where
    there is none, that quarter stays with its own, which is what the repeated border of ``large`` adds.
    """
    channels, like = large_BCHW.shape[1], large_BCHW
    # a fake tensor must not be what the next call finds
    make = _doubling_weights if type(large_BCHW) is Tensor else _doubling_weights.__wrapped__
    weight_C144 = make(channels, like.dtype, like.device)
    return F.conv2d(F.pad(large_BCHW, (1, 1, 1, 1), mode="replicate"), weight_C144, stride=2, groups=channels)


@lru_cache
def _doubling_weights(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same for each channel, [C, 1, 4, 4]: products of 1/4, 3/4, 3/4, 1/4, exact in 16 bits too."""
    taps_4 = 1 - (torch.arange(4, device=device) - 1.5).abs() / 2
    return torch.outer(taps_4, taps_4).to(dtype).expand(channels, 1, 4, 4).contiguous()


def _by_taps(x_BDhw: Tensor, conv: nn.Conv2d) -> bool:
    """On a CPU in float32, outside of tracing; on accelerators the one large convolution is left as it is."""
    return (
        type(x_BDhw) is Tensor  # not a fake one
        and x_BDhw.device.type == "cpu"
        and x_BDhw.dtype == conv.weight.dtype == torch.float32
        and min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS
        and may_use_custom_autograd(x_BDhw)
        and not torch.compiler.is_compiling()
    )


class DoubledConv(torch.autograd.Function):
    """``apply(x [B, D, h, w], weight [O, D, 3, 3], bias [O]) -> [B, O, 2h, 2w]``, channels last in memory."""

    @staticmethod
    def forward(ctx: Any, x_BDhw: Tensor, weight_OD33: Tensor, bias_O: Tensor) -> Tensor:
        """One row of taps after the other: channels, then the width, then the height, which sums the rows up."""
        ctx.save_for_backward(x_BDhw, weight_OD33, bias_O)
        (B, _, h, w), O = x_BDhw.shape, len(weight_OD33)
        x_TD = _cells(x_BDhw)
        wide_RwO = x_TD.new_empty(B * h, 2 * w, O)
        y_BhwO = bias_O.expand(B, 2 * h, 2 * w, O).contiguous()
        for i in range(3):
            taps_RwO = linear(x_TD, _row_of_taps(weight_OD33, i)).view(B * h, 3 * w, O)
            for block in _across(w, x_TD.dtype):
                wide_RwO[:, block.large] = _product(block.matrix, taps_RwO[:, block.small])
            rows = wide_RwO.view(B, h, 2 * w * O)
            for block in _down(h, x_TD.dtype)[i]:
                matrix = block.matrix.expand(B, -1, -1)
                y_BhwO.view(B, 2 * h, -1)[:, block.large].baddbmm_(matrix, rows[:, block.small])
        return y_BhwO.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad_BOhw: Tensor) -> tuple[Tensor | None, ...]:
        """The transposed products in the opposite order."""
        x_BDhw, weight_OD33, bias_O = ctx.saved_tensors
        if wants_second_order():
            inputs = (x_BDhw, weight_OD33, bias_O)
            return tuple(differentiable_gradients(_plain, inputs, ctx.needs_input_grad, grad_BOhw))
        (B, D, h, w), O = x_BDhw.shape, len(weight_OD33)
        x_TD = _cells(x_BDhw)
        grad_BhwO = grad_BOhw.permute(0, 2, 3, 1).contiguous()
        wide_BhwO = x_TD.new_empty(B, h, 2 * w * O)
        taps_RwO = x_TD.new_empty(B * h, 3 * w, O)
        grad_x_TD, grad_weight_OD33 = torch.zeros_like(x_TD), torch.empty_like(weight_OD33)
        for i in range(3):
            for block in _down_transposed(h, x_TD.dtype)[i]:
                wide_BhwO[:, block.small] = _product(block.matrix, grad_BhwO.view(B, 2 * h, -1)[:, block.large])
            columns = wide_BhwO.view(B * h, 2 * w, O)
            for block in _across_transposed(w, x_TD.dtype):
                taps_RwO[:, block.small] = _product(block.matrix, columns[:, block.large])
            taps_T3O = taps_RwO.view(B * h * w, 3 * O)
            grad_x_TD += linear(taps_T3O, _row_of_taps(weight_OD33, i).T)
            grad_weight_OD33[:, :, i] = outer(taps_T3O, x_TD).view(3, O, D).permute(1, 2, 0)
        return grad_x_TD.view(B, h, w, D).permute(0, 3, 1, 2), grad_weight_OD33, grad_BhwO.sum((0, 1, 2))


def _plain(x_BDhw: Tensor, weight_OD33: Tensor, bias_O: Tensor) -> Tensor:
    return F.conv2d(double(x_BDhw), weight_OD33, bias_O, padding=1)


def _cells(x_BDhw: Tensor) -> Tensor:
    """The image as rows [T, D]; a view where channels come last in memory."""
    return x_BDhw.permute(0, 2, 3, 1).flatten(0, 2)


def _row_of_taps(weight_OD33: Tensor, i: int) -> Tensor:
    """The three matrices of the taps in row i of the kernel, one upon the other: [3 O, D]."""
    return weight_OD33[:, :, i].permute(2, 0, 1).flatten(0, 1)


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(matrix.expand(len(x), -1, -1), x)


# ---------------------------------------------------------------------------------------------------------------------
# The matrices that double and shift, in blocks of their band


class _Block(NamedTuple):
    """``matrix`` takes the cells ``small`` to their share of the cells ``large``, or back."""

    large: slice
    small: slice
    matrix: Tensor


@lru_cache
def _shifted_doubling(n: int, dtype: torch.dtype) -> Tensor:
    """[3, 2n, n]: row m of matrix i has the weights of the small cells in large cell m + i - 1."""
    doubled = F.interpolate(torch.eye(n, dtype=dtype)[None], scale_factor=2, mode="linear", align_corners=False)[0].T
    padded = F.pad(doubled, (0, 0, 1, 1))
    return torch.stack([padded[i : i + 2 * n] for i in range(3)])


def _edges(n: int) -> list[tuple[int, int]]:
    count = max(1, round(n / BLOCK))
    marks = [n * i // count for i in range(count + 1)]
    return list(pairwise(marks))


@lru_cache
def _down(n: int, dtype: torch.dtype) -> list[list[_Block]]:
    """For each tap the blocks [large, small]; a large cell needs its own small cell and that on either side."""
    return [
        [
            _Block(slice(2 * a, 2 * b), slice(low, high), matrix[2 * a : 2 * b, low:high].contiguous())
            for a, b in _edges(n)
            for low, high in [(max(0, a - 1), min(n, b + 1))]
        ]
        for matrix in _shifted_doubling(n, dtype)
    ]


@lru_cache
def _down_transposed(n: int, dtype: torch.dtype) -> list[list[_Block]]:
    """For each tap the blocks [small, large]; a small cell is in its own two large cells and the two on either side."""
    return [
        [
            _Block(slice(low, high), slice(a, b), matrix[low:high, a:b].T.contiguous())
            for a, b in _edges(n)
            for low, high in [(max(0, 2 * a - 2), min(2 * n, 2 * b + 2))]
        ]
        for matrix in _shifted_doubling(n, dtype)
    ]


@lru_cache
def _across(n: int, dtype: torch.dtype) -> list[_Block]:
    """``_down`` of the three taps side by side: small cells come as (cell, tap)."""
    return [
        _Block(blocks[0].large, _threefold(blocks[0].small), torch.stack([b.matrix for b in blocks], -1).flatten(1))
        for blocks in zip(*_down(n, dtype), strict=True)
    ]


@lru_cache
def _across_transposed(n: int, dtype: torch.dtype) -> list[_Block]:
    """``_down_transposed`` of the three taps one upon the other: small cells go as (cell, tap)."""
    return [
        _Block(blocks[0].large, _threefold(blocks[0].small), torch.stack([b.matrix for b in blocks], 1).flatten(0, 1))
        for blocks in zip(*_down_transposed(n, dtype), strict=True)
    ]


def _threefold(cells: slice) -> slice:
    return slice(3 * cells.start, 3 * cells.stop)
