"""Three passes that an accelerator makes in one kernel each, as operators ``ase_dist::...``.

Each has a form in plain operations, which runs on every device without Triton, and a Triton kernel for NVIDIA GPUs. The
operators are for hand-written autograd: they have no gradient of their own. On meta and fake tensors they give shapes.

Letters: T rows, H width, N experts (routed first, the S shared last), r rank, R = N * r.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ase_dist.ops.operator import Operator

try:
    from ase_dist.ops import triton_kernels
except ImportError:  # a build of torch for CPUs comes without Triton
    triton_kernels = None  # type: ignore[assignment]

LOGGER = logging.getLogger(__name__)
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_ELEMENTS = 1024  # of a program of an elementwise kernel


def has_triton(x: Tensor) -> bool:
    """Whether the Triton kernels run on x: on NVIDIA GPUs, in the types that they compute by way of float32."""
    return x.device.type == "cuda" and torch.version.hip is None and x.dtype in _TYPES and _are_right(x.device)


@lru_cache
def _are_right(device: torch.device) -> bool:
    """Whether the kernels compile for this GPU and give there what plain forms give, tried once on small tensors."""
    if triton_kernels is None:
        return False
    generator = torch.Generator().manual_seed(0)
    h, grad, u, gates = (torch.randn(5, n, generator=generator).to(device) for n in (12, 12, 12, 6))
    try:
        found = (
            *_launch_activation(h, grad, "gelu"),
            *_launch_gates(grad, u, gates, torch.float32, torch.float32),
            *_launch_route(gates, 2, 1),
        )
    except Exception as error:  # whatever a compiler that is not there raises
        LOGGER.warning("Triton does not work here (%s: %s); plain operations instead", type(error).__name__, error)
        return False
    wanted = (
        *activation_and_gradient_plain(h, grad, "gelu"),
        *gate_gradients_plain(grad, u, gates, torch.float32, torch.float32),
        *route_jointly_plain(gates, 2, 1),
    )
    are_right = all(torch.allclose(a.float(), b.float(), atol=1e-4) for a, b in zip(found, wanted, strict=True))
    if not are_right:
        LOGGER.warning("the Triton kernels give something else than plain operations here; those instead")
    return are_right


# ---------------------------------------------------------------------------------------------------------------------
# act(h) and the gradient of h


@Operator
def activation_and_gradient(h: Tensor, grad: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """act(h) and the gradient of h for ``grad``, that of act(h), all [T, H]; ``kind`` is one of ``ACTIVATIONS``."""
    if not has_triton(h):
        return activation_and_gradient_plain(h, grad, kind)
    return _launch_activation(h, grad, kind)


def _launch_activation(h: Tensor, grad: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    h, grad = h.contiguous(), grad.contiguous()
    act, grad_h = torch.empty_like(h), torch.empty_like(h)
    grid = (-(-h.numel() // _ELEMENTS),)
    with torch.cuda.device(h.device):
        triton_kernels.activation_kernel[grid](
            h, grad, act, grad_h, h.numel(), KIND=ACTIVATIONS.index(kind), BLOCK=_ELEMENTS
        )
    return act, grad_h


@activation_and_gradient.register_fake
def _(h: Tensor, grad: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(h)


def activation_and_gradient_plain(h: Tensor, grad: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``activation_and_gradient`` in torch's operators, two kernels."""
    forward = {"relu": F.relu, "silu": F.silu}.get(kind)
    act = F.gelu(h, approximate=_APPROXIMATE[kind]) if forward is None else forward(h)
    return act, activation_gradient(h, grad, kind)


def activation_gradient(h: Tensor, grad: Tensor, kind: str) -> Tensor:
    """The gradient of h alone."""
    if kind == "relu":
        return torch.ops.aten.threshold_backward(grad, h, 0)
    if kind == "silu":
        return torch.ops.aten.silu_backward(grad, h)
    return torch.ops.aten.gelu_backward(grad, h, approximate=_APPROXIMATE[kind])


# ---------------------------------------------------------------------------------------------------------------------
# Gates on rank activations, backward


@Operator
def gate_gradients(
    grad_v: Tensor, u: Tensor, gates: Tensor, grad_type: torch.dtype, v_type: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of v = u * repeat(gates, r): the gradient of u and v again [T, R], and the gradient of the gates [T, N].

    ``grad_v`` and u [T, R] may have any row stride; the first result is of ``grad_type``, the second of ``v_type``, the
    third as the gates.
    """
    if not (has_triton(u) and has_triton(grad_v) and has_triton(gates)):
        return gate_gradients_plain(grad_v, u, gates, grad_type, v_type)
    return _launch_gates(grad_v, u, gates, grad_type, v_type)


def _launch_gates(
    grad_v: Tensor, u: Tensor, gates: Tensor, grad_type: torch.dtype, v_type: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    (T, R), N = u.shape, gates.shape[1]
    grad_u, v = u.new_empty(T, R, dtype=grad_type), u.new_empty(T, R, dtype=v_type)
    grad_v, u, gates, grad_gates = _rows_apart(grad_v), _rows_apart(u), gates.contiguous(), torch.empty_like(gates)
    width, experts = _power_of_2(R // N), _power_of_2(N)
    rows = max(1, 2048 // (width * experts))
    with torch.cuda.device(u.device):
        triton_kernels.gate_kernel[(-(-T // rows),)](
            grad_v,
            u,
            gates,
            grad_u,
            v,
            grad_gates,
            T,
            grad_v.stride(0),
            u.stride(0),
            N=N,
            RANK=R // N,
            ROWS=rows,
            EXPERTS=experts,
            WIDTH=width,
        )
    return grad_u, v, grad_gates


@gate_gradients.register_fake
def _(
    grad_v: Tensor, u: Tensor, gates: Tensor, grad_type: torch.dtype, v_type: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return u.new_empty(u.shape, dtype=grad_type), u.new_empty(u.shape, dtype=v_type), torch.empty_like(gates)


def gate_gradients_plain(
    grad_v: Tensor, u: Tensor, gates: Tensor, grad_type: torch.dtype, v_type: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """``gate_gradients`` in torch's operators."""
    groups, gates_TN1 = (gates.shape[1], -1), gates.unsqueeze(-1)
    grad_u = (grad_v.unflatten(1, groups) * gates_TN1).flatten(1).to(grad_type)
    v = (u.unflatten(1, groups) * gates_TN1).flatten(1).to(v_type)
    return grad_u, v, (grad_v.to(gates.dtype) * u).unflatten(1, groups).sum(dim=-1)


def _power_of_2(count: int) -> int:
    """The next one, for the blocks of a kernel."""
    return 1 << (count - 1).bit_length()


def _rows_apart(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Adaptive shared experts, Eq. 8-9


@Operator
def route_jointly(logits: Tensor, k: int, num_shared: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, active experts and probabilities [..., N] as ``ase_dist.moe.gating.joint`` defines them."""
    if not has_triton(logits):
        return route_jointly_plain(logits, k, num_shared)
    return _launch_route(logits, k, num_shared)


def _launch_route(logits: Tensor, k: int, num_shared: int) -> tuple[Tensor, Tensor, Tensor]:
    N = logits.shape[-1]
    rows_TN = logits.reshape(-1, N)
    T, width = rows_TN.shape[0], _power_of_2(N)
    rows = max(1, 1024 // width)
    gates, active, probs = (
        torch.empty(logits.shape, dtype=d, device=logits.device) for d in (logits.dtype, torch.bool, logits.dtype)
    )
    with torch.cuda.device(logits.device):
        triton_kernels.route_kernel[(-(-T // rows),)](
            rows_TN,
            gates,
            active.view(torch.uint8),
            probs,
            T,
            rows_TN.stride(0),
            rows_TN.stride(1),
            N=N,
            ROUTED=N - num_shared,
            K=k,
            ROWS=rows,
            WIDTH=width,
        )
    return gates, active, probs


@route_jointly.register_fake
def _(logits: Tensor, k: int, num_shared: int) -> tuple[Tensor, Tensor, Tensor]:
    def like(dtype: torch.dtype) -> Tensor:
        return logits.new_empty(logits.shape, dtype=dtype)

    return like(logits.dtype), like(torch.bool), like(logits.dtype)


def route_jointly_plain(logits: Tensor, k: int, num_shared: int) -> tuple[Tensor, Tensor, Tensor]:
    """``route_jointly`` in torch's operators."""
    routed = logits.shape[-1] - num_shared
    active = torch.zeros_like(logits, dtype=torch.bool)
    active[..., routed:].fill_(True)
    if k:
        active.scatter_(-1, logits[..., :routed].topk(k, dim=-1, sorted=False).indices, value=True)
    return torch.where(active, logits, -torch.inf).softmax(dim=-1), active, logits.softmax(dim=-1)
