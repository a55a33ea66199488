"""What surrounds a product: autocast, ``torch.export``, second derivatives; and which form of the maths each allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

SHORT = 192  # tokens; see attention


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The type that autocast casts products to at this moment; None where it is off or the device has none (meta)."""
    # a compiler before torch 2.12 cannot look into is_autocast_available, and would break its graph there
    has_autocast = device_type != "meta" and (
        torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    )
    if not has_autocast or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """``torch.autocast`` to ``dtype``, or off for None.

    Where that is the mode already nothing is entered: a program of ``torch.export`` would keep a graph of its own for
    what is inside, and ONNX has none.
    """
    if autocast_dtype(device_type) == dtype:
        return nullcontext()
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)


def is_exporting() -> bool:
    """Whether ``torch.export`` is tracing; before torch 2.12 ``torch.compile`` too, which then has plain operations."""
    return torch.compiler.is_exporting()


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` is recording."""
    return torch._C._get_tracing_state() is not None


def is_transforming() -> bool:
    """Whether ``torch.func`` (``grad``, ``vmap``, ``jvp``) or forward-mode autograd is at work.

    They differentiate and batch plain operations and know nothing of hand-written autograd.
    """
    if torch.compiler.is_compiling():
        return False
    is_forward_mode = torch.autograd.forward_ad._current_level >= 0
    return is_forward_mode or torch._C._are_functorch_transforms_active()


def is_watched(x: Tensor) -> bool:
    """Whether something sees what operators x goes through: autograd, a compiler, a dispatch mode, a subclass."""
    return (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor or is_in_torch_dispatch_mode()
    )


def may_use_custom_autograd(x: Tensor) -> bool:
    """Whether products with x may have hand-written autograd.

    Not under autocast, nor in ``torch.export``, whose programs run elsewhere and must hold plain operations only, with
    no chunk that depends on this batch, nor where something transforms what runs (``is_transforming``).
    """
    return autocast_dtype(x.device.type) is None and not is_exporting() and not is_transforming()


def stacks_products(x: Tensor) -> bool:
    """Whether the base and low-rank products with x are computed as one (``ase_dist.ops.stacked``).

    On accelerators, where a pass over a wide tensor and the number of kernels are dear; the meta device stands for
    one. A CPU gains nothing by it and computes in chunks instead (``ase_dist.ops.lowrank``).
    """
    return x.device.type != "cpu"


def attention(x_XPD: Tensor, *, training: bool) -> AbstractContextManager[object]:
    """Where torch's attention over the P tokens of x is to run: its plain form where that is the faster one to train.

    The backward pass of the fused form in bf16 on a CPU has a price per call (torch 2.14.1): with it attention over 37
    to 161 tokens takes 1.1 to 3.4 times as long, over 192 and more less. In float32 it has none.
    """
    is_dear = x_XPD.device.type == "cpu" and x_XPD.dtype == torch.bfloat16 and x_XPD.shape[1] < SHORT
    if training and is_dear and not torch.compiler.is_compiling():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def wants_second_order() -> bool:
    """Whether a backward pass that is running must itself be differentiable (``create_graph=True``).

    Autograd enables gradients inside such a pass only. A compiler that traces a backward pass is not one.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def differentiable_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad: Tensor | tuple[Tensor, ...],
) -> list[Tensor | None]:
    """The gradients of ``function(*inputs)`` for ``grad``, with a graph of their own; None where not ``needed``.

    Called in a backward pass under ``wants_second_order``: ``function`` computes in plain operations what the forward
    pass did. Each input is replaced by a view of itself, so that an input that was computed from another one (gates
    from x) does not add its own path to that one's gradient.
    """
    with torch.enable_grad():
        views = [tensor if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        result = function(*views)
        outputs, grads = ((result,), (grad,)) if isinstance(result, Tensor) else (result, tuple(grad))
        ends = [(output, each) for output, each in zip(outputs, grads, strict=True) if output.requires_grad]
        wanted = [view for view, need in zip(views, needed, strict=True) if need and view is not None]
        options = {"create_graph": True, "allow_unused": True}
        found = iter(torch.autograd.grad([o for o, _ in ends], wanted, [each for _, each in ends], **options))
    return [next(found) if need and view is not None else None for view, need in zip(views, needed, strict=True)]
