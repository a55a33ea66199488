# mypy: ignore-errors
"""The Triton kernels of ``ase_dist.ops.kernels``, which says what they compute."""

import triton
import triton.language as tl


@triton.jit
def activation_kernel(h_ptr, grad_ptr, act_ptr, out_ptr, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """A program for each BLOCK of elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == 0:  # h P(X <= h)
        share = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        act = h * share
        slope = share + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif KIND == 1:  # its approximation by tanh(c (h + 0.044715 h^3)), tanh(y) = 2 sigmoid(2 y) - 1
        inner = 0.7978845608028654 * (h + 0.044715 * h * h * h)
        tanh = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
        act = 0.5 * h * (1.0 + tanh)
        slope_of_inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * h * h)
        slope = 0.5 * (1.0 + tanh) + 0.5 * h * (1.0 - tanh * tanh) * slope_of_inner
    elif KIND == 2:
        act = tl.where(h > 0.0, h, 0.0)
        slope = tl.where(h > 0.0, 1.0, 0.0)
    else:
        share = tl.sigmoid(h)
        act = h * share
        slope = share * (1.0 + h * (1.0 - share))
    tl.store(act_ptr + at, act, mask=inside)
    tl.store(out_ptr + at, grad * slope, mask=inside)


@triton.jit
def gate_kernel(
    grad_v_ptr,
    u_ptr,
    gates_ptr,
    grad_u_ptr,
    v_ptr,
    grad_gates_ptr,
    T,
    grad_v_stride,
    u_stride,
    N: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program for each ROWS of tokens."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    expert = tl.arange(0, EXPERTS)[None, :, None]
    rank = tl.arange(0, WIDTH)[None, None, :]
    is_gate = (row < T) & (expert < N)
    inside = is_gate & (rank < RANK)
    column = expert * RANK + rank
    grad_v = tl.load(grad_v_ptr + row * grad_v_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * u_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gates_ptr + row * N + expert, mask=is_gate, other=0.0).to(tl.float32)
    tl.store(grad_u_ptr + row * (N * RANK) + column, grad_v * gate, mask=inside)
    tl.store(v_ptr + row * (N * RANK) + column, u * gate, mask=inside)
    grad_gate = tl.sum(grad_v * u, axis=2, keep_dims=True)
    tl.store(grad_gates_ptr + row * N + expert, grad_gate, mask=is_gate)


@triton.jit
def route_kernel(
    logits_ptr,
    gates_ptr,
    active_ptr,
    probs_ptr,
    T,
    row_stride,
    stride,
    N: tl.constexpr,
    ROUTED: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program for each ROWS of tokens."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    expert = tl.arange(0, WIDTH)[None, :]
    inside = (row < T) & (expert < N)
    z = tl.load(logits_ptr + row * row_stride + expert * stride, mask=inside, other=float("-inf"))
    # below every logit that can be chosen, -inf included, is what has been chosen; NaN counts as largest
    left = tl.where(z != z, float("inf"), tl.maximum(z, -3.0e38))  # noqa: PLR0124
    left = tl.where(expert < ROUTED, left, float("-inf"))
    active = (expert >= ROUTED) & (row >= 0)
    for _ in range(K):
        best = tl.argmax(left, axis=1)[:, None]
        active = active | (expert == best)
        left = tl.where(expert == best, float("-inf"), left)
    active = active & inside
    powers = tl.exp(z - tl.max(z, axis=1)[:, None])
    at = row * N + expert
    tl.store(probs_ptr + at, powers / tl.sum(powers, axis=1)[:, None], mask=inside)
    kept = tl.where(active, z, float("-inf"))
    powers = tl.where(active, tl.exp(kept - tl.max(kept, axis=1)[:, None]), 0.0)
    tl.store(gates_ptr + at, powers / tl.sum(powers, axis=1)[:, None], mask=inside)
    tl.store(active_ptr + at, active.to(tl.uint8), mask=inside)
