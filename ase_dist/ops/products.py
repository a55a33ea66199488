"""Matrix products without a gradient, for hand-written autograd, by the library that is fast on the device.

On a CPU torch (2.14) gives float32 products to MKL, which leaves AVX-512 unused on other makers' processors: oneDNN,
which torch has for convolutions and bf16 anyway, takes less than half the time there. Results differ by rounding.

Letters: T rows, D input width, O output width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_ONEDNN_FLOPS = 8e6  # of a product that is worth oneDNN's fixed cost of some 15 microseconds
CHUNK_VALUES = 3 * 2**19, 6 * 2**20  # in a chunk of rows: shorter ones cost more time, longer ones memory
MIN_CHUNKS = 4  # as far as the bounds allow
_HALF = (torch.bfloat16, torch.float16)


def linear(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias, [T, O]; any of them may be a transposed view."""
    if _by_onednn(x_TD, weight_OD):
        operands = dense(x_TD), dense(weight_OD)
        return torch.ops.mkldnn._linear_pointwise(*operands, bias_O, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(x_TD, weight_OD, bias_O)


def add_linear(y_TO: Tensor, x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """y + x W^T, in place of y."""
    if not _by_onednn(x_TD, weight_OD):
        return y_TO.addmm_(x_TD, weight_OD.T)
    for rows in row_chunks(y_TO):
        y_TO[rows].add_(linear(x_TD[rows], weight_OD))  # faster than a product that reads y
    return y_TO


def dense(x_TD: Tensor) -> Tensor:
    """x, or a copy where neither it nor its transpose lies in memory without gaps: oneDNN has slow kernels for those.

    Such are gradients of sums, expanded from one number (strides 0), and slices of wider tensors.
    """
    if x_TD.device.type != "cpu" or x_TD.is_contiguous() or x_TD.T.is_contiguous():
        return x_TD
    return x_TD.contiguous()


def outer(y_TO: Tensor, x_TD: Tensor) -> Tensor:
    """y^T x, [O, D]: a weight's gradient. Fast where O is the smaller."""
    return linear(y_TO.T, x_TD.T)


def mm_float32(x_TD: Tensor, weight_DO: Tensor) -> Tensor:
    """x W of 16-bit operands with a float32 result, nothing rounded between; of others in their own type."""
    if x_TD.dtype not in _HALF:
        return x_TD @ weight_DO
    if _has_wide_output(x_TD):
        return torch.mm(x_TD, weight_DO, out_dtype=torch.float32)  # type: ignore[call-overload]
    return x_TD.float() @ weight_DO.float()


def bmm_float32(x_tTD: Tensor, weight_tDO: Tensor) -> Tensor:
    """``mm_float32`` for each of t."""
    if x_tTD.dtype not in _HALF:
        return torch.bmm(x_tTD, weight_tDO)
    if _has_wide_output(x_tTD):
        return torch.bmm(x_tTD, weight_tDO, out_dtype=torch.float32)  # type: ignore[call-overload]
    return torch.bmm(x_tTD.float(), weight_tDO.float())


def _has_wide_output(x: Tensor) -> bool:
    """torch (2.14) has ``out_dtype`` for CUDA alone; the meta device knows its shapes."""
    return x.device.type == "meta" or (x.device.type == "cuda" and torch.version.hip is None)


def row_chunks(x_TD: Tensor, *, width: int | None = None) -> list[slice]:
    """The rows of x on a CPU in equal chunks, so that a tensor [chunk, ``width``] has ``CHUNK_VALUES``.

    ``width`` None is x's own. On other devices all rows are one chunk. bf16 has as many rows in a chunk as float32: by
    bytes a small batch would be one chunk, and the peak half as high again as the frozen network's.
    """
    rows, own_width = x_TD.shape
    if x_TD.device.type != "cpu" or not rows:
        return [slice(0, rows)]
    total = rows * (own_width if width is None else width)
    count = -(-total // min(max(total // MIN_CHUNKS, CHUNK_VALUES[0]), CHUNK_VALUES[1]))
    size = -(-rows // max(1, min(count, rows)))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _by_onednn(x_TD: Tensor, weight_OD: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # inductor takes oneDNN for constant weights only
        and x_TD.device.type == "cpu"
        and x_TD.dtype == weight_OD.dtype == torch.float32
        and 2.0 * x_TD.shape[0] * weight_OD.numel() >= MIN_ONEDNN_FLOPS
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )
