"""What a program costs on an accelerator that is not here: its operators counted on meta tensors, which hold no data.

Every operator that is dispatched counts as one kernel, with the bytes that it reads and writes and its FLOPs. The least
time of a kernel on an accelerator is

    max(FLOPs / peak of its type, bytes / bandwidth),       the roofline (Williams, Waterman, Patterson, CACM 2009)

and that of a program the sum. Deterministic: nothing runs. It knows no cache, no overlap and no launch time; kernels
are counted too, since launched one by one from Python they are a bound of their own.

- An operand's bytes are its elements, each once; along a broadcast axis only what is there. In place: read and written.
- Indexed reads and writes touch the rows that are indexed only.
- FLOPs are torch's formulas for products, convolutions and attention, and what an operator of an extension has
  declared by ``torch.utils.flop_counter.register_flop_formula``; its bytes are those of its arguments and results.
- ``F.scaled_dot_product_attention`` is one fused kernel forward and one backward (``FusedAttention``).
- What is on the host (an optimiser's step counter) and what only makes a view are no kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from _parts import PartTracker
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ase_dist.planning.flops import operator_flops

VIEWS = {  # and what allocates
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "diagonal",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "flatten",
    "is_same_size",
    "lift_fresh",
    "narrow",
    "new_empty",
    "new_empty_strided",
    "permute",
    "reshape",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unflatten",
    "unfold",
    "unsqueeze",
    "view",
    "view_as_real",
}
READS_ROWS = frozenset({"index", "index_select", "gather", "embedding"})
WRITES_ROWS = frozenset({"index_add_", "index_put_", "_index_put_impl_", "scatter_", "scatter_add_", "index_copy_"})
OVERWRITES = frozenset({"copy_", "fill_", "zero_"})  # in place, without reading what was there


@dataclass(frozen=True)
class Accelerator:
    """Peaks of a data sheet: dense FLOP/s by type of the operands (tf32: float32 tensors), bytes/s of its memory."""

    name: str
    bfloat16: float
    tf32: float
    float32: float
    bandwidth: float
    source: str

    def sustained(self, *, compute: float, memory: float) -> Accelerator:
        """The same with fractions of the peaks, as long kernels reach them."""
        return Accelerator(
            self.name,
            self.bfloat16 * compute,
            self.tf32 * compute,
            self.float32 * compute,
            self.bandwidth * memory,
            self.source,
        )

    def seconds(self, kernel: Kernel, *, tf32: bool) -> float:
        """The least time of ``kernel``; products of float32 in TF32 where ``tf32``."""
        peak = self.bfloat16 if kernel.dtype in (torch.bfloat16, torch.float16) else self.tf32 if tf32 else self.float32
        return max(kernel.flops / peak, kernel.bytes / self.bandwidth)


T, G = 1e12, 1e9
ACCELERATORS = {
    "a100_sxm": Accelerator("NVIDIA A100 80GB SXM", 312 * T, 156 * T, 19.5 * T, 2039 * G, "NVIDIA A100 datasheet"),
    "h100_sxm": Accelerator("NVIDIA H100 SXM", 989.4 * T, 494.7 * T, 67 * T, 3350 * G, "NVIDIA H100 datasheet"),
    "h100_pcie": Accelerator("NVIDIA H100 PCIe", 756 * T, 378 * T, 51 * T, 2000 * G, "NVIDIA H100 datasheet"),
    "h200_sxm": Accelerator("NVIDIA H200 SXM", 989.4 * T, 494.7 * T, 67 * T, 4800 * G, "NVIDIA H200 datasheet"),
    "l40s": Accelerator("NVIDIA L40S", 362 * T, 183 * T, 91.6 * T, 864 * G, "NVIDIA L40S datasheet"),
    "rtx_4090": Accelerator("NVIDIA RTX 4090", 165.2 * T, 82.6 * T, 82.6 * T, 1008 * G, "NVIDIA Ada whitepaper"),
    "mi300x": Accelerator("AMD MI300X", 1307.4 * T, 653.7 * T, 163.4 * T, 5300 * G, "AMD MI300X data sheet"),
}


class Kernel(NamedTuple):
    """One operator: its name, the part of the program that it works for, and what it costs."""

    operator: str
    part: str
    bytes: float
    flops: float
    dtype: torch.dtype


class KernelCount(TorchDispatchMode):
    """``kernels`` of everything on meta tensors inside, in order; ``parts`` says which part each works for."""

    def __init__(self, parts: PartTracker | None = None) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self._parts = parts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        is_wide = func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32
        run = _grouped_mm_of_any_type if is_wide else func
        out = run(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        operands, results = _tensors((args, kwargs)), _tensors(out)
        touched = [*operands, *results]
        if name.rstrip("_") in VIEWS or name in VIEWS or not any(t.is_meta and t.numel() for t in touched):
            return out
        part = "all" if self._parts is None else self._parts.current()
        flops = operator_flops(func, args, kwargs, out)
        size = _bytes_moved(name, func, args, operands, results)
        self.kernels.append(Kernel(name, part, size, flops, (results or operands)[0].dtype))
        return out


def _bytes_moved(name: str, func: Any, args: Any, operands: list[Tensor], results: list[Tensor]) -> float:
    if name in READS_ROWS:
        return sum(map(size_of, operands[1:])) + 2 * sum(map(size_of, results))
    if name in WRITES_ROWS:  # where a number is written there is no source, and as many values as indices
        indices = [t for t in operands[1:] if t.dtype in (torch.int64, torch.int32)]
        sources = [t for t in operands[1:] if t.dtype not in (torch.int64, torch.int32)]
        rows = sum(map(size_of, sources)) or sum(t.numel() for t in indices) * operands[0].element_size()
        return sum(map(size_of, indices)) + 3 * rows
    written = _written_in_place(func, args)
    read = operands if name not in OVERWRITES else operands[len(written) :]
    return sum(map(size_of, read)) + sum(map(size_of, written or results))


def _written_in_place(func: Any, args: Any) -> list[Tensor]:
    """Every tensor of the arguments that the operator's schema says it writes; of lists all."""
    written = []
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += _tensors(value)
    return written


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size_of(tensor: Tensor) -> int:
    """Bytes of the elements of ``tensor``, those of a broadcast axis once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride or not length else 1
    return elements * tensor.element_size()


def _grouped_mm_of_any_type(a: Tensor, b: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """The shape of a grouped product, which torch (2.14) knows in 16 bits only."""
    shape = (a.shape[0], b.shape[2]) if b.dim() == 3 else (offs.shape[0], a.shape[0], b.shape[1])
    return a.new_empty(shape)


class FusedAttention(TorchFunctionMode):
    """While open, attention is one operator, as on a GPU: flash for 16 bits, the memory-efficient one for float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v, *rest = args
        mask = rest[0] if rest else kwargs.get("attn_mask")
        assert mask is None and not kwargs.get("is_causal"), "no attention here has a mask"
        scale, aten = kwargs.get("scale"), torch.ops.aten
        if q.dtype == torch.float32:
            return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[0]
        return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]


@contextmanager
def counting(parts: PartTracker | None = None, *, fuse_attention: bool = True) -> Iterator[KernelCount]:
    """Count what is dispatched while the context is open."""
    with KernelCount(parts) as count:
        if fuse_attention:
            with FusedAttention():
                yield count
        else:
            yield count


@dataclass(frozen=True)
class Cost:
    """Kernels counted, with their bytes, FLOPs and least seconds."""

    kernels: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0


def total(kernels: Iterable[Kernel], accelerator: Accelerator, *, tf32: bool) -> Cost:
    """The cost of all ``kernels`` one after the other."""
    kernels = list(kernels)
    return Cost(
        len(kernels),
        sum(kernel.bytes for kernel in kernels),
        sum(kernel.flops for kernel in kernels),
        sum(accelerator.seconds(kernel, tf32=tf32) for kernel in kernels),
    )


def by(
    key: Callable[[Kernel], str], kernels: Iterable[Kernel], accelerator: Accelerator, *, tf32: bool
) -> dict[str, Cost]:
    """The cost of the kernels with the same ``key``, the dearest first."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(key(kernel), []).append(kernel)
    costs = {name: total(group, accelerator, tf32=tf32) for name, group in groups.items()}
    return dict(sorted(costs.items(), key=lambda item: -item[1].seconds))
