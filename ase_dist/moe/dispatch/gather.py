"""Gather dispatch: each rank gathers all routed experts, computes as at size 1, and gets its gradients reduced back.

LoRA experts are far smaller than the tokens that visit them. One flat buffer per layer goes each way, and the next
layer's experts are fetched while this one computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from ase_dist import collectives
from ase_dist.collectives import Pending
from ase_dist.moe.dispatch.exchange import require_first_order


class Experts(Protocol):
    """A module of stacked experts, see ``ase_dist.moe.experts``."""

    def tensors(self) -> dict[str, Tensor]:
        """Its parameters by name."""


def gather_experts(experts: Experts, *, num_routed: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The tensors of all ranks' routed experts in global order, without padding (collective)."""
    own = experts.tensors()
    if torch.compiler.is_compiling():  # a fetch for the next layer would outlive the graph of this one
        flat = torch.cat([tensor.flatten() for tensor in own.values()]).unsqueeze(0)
        full = _split(collectives.all_gather_rows_in_graph(flat, group=group), [t.shape for t in own.values()])
        return {name: tensor[:num_routed] for name, tensor in zip(own, full, strict=True)}
    prefetcher = _PREFETCHERS.setdefault(group, ExpertPrefetcher())
    full = _Gather.apply(prefetcher.take(experts, group), prefetcher, group, *own.values())
    return {name: tensor[:num_routed] for name, tensor in zip(own, full, strict=True)}


class ExpertPrefetcher:
    """Fetches the experts of the layer that came next in the last pass while the present one computes.

    One for all layers of a group. It learns the order by itself and holds one fetch at a time. A fetch never outlives
    its pass over the weights: it is dropped when another layer comes and when a backward pass begins; the first layer
    of a pass is never fetched ahead, nor is anything inside a backward pass, where activations are recomputed.
    """

    def __init__(self) -> None:
        self._positions: WeakKeyDictionary[Experts, int] = WeakKeyDictionary()  # in the order of their first use
        self._successors: WeakKeyDictionary[Experts, ref[Experts]] = WeakKeyDictionary()
        self._present: ref[Experts] | None = None
        self._fetched: tuple[Experts, Pending] | None = None

    def take(self, experts: Experts, group: dist.ProcessGroup) -> Tensor:
        """The gathered buffer of ``experts``, [ranks, values per rank]; those of the next layer are then under way."""
        if self._fetched is not None and self._fetched[0] is experts:
            pending, self._fetched = self._fetched[1], None
        else:
            self.drop()
            pending = _start_gather(experts, group)
        flat = pending.wait()
        if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
            self._look_ahead(experts, group)
        return flat

    def drop(self) -> None:
        """Forget what was fetched and not taken: the weights may change before it is."""
        if self._fetched is not None:
            self._fetched[1].wait()
            self._fetched = None

    def _look_ahead(self, experts: Experts, group: dist.ProcessGroup) -> None:
        position = self._positions.setdefault(experts, len(self._positions))
        previous = None if self._present is None else self._present()
        if previous is not None:
            self._successors[previous] = ref(experts)
        self._present = ref(experts)
        known = self._successors.get(experts)
        following = None if known is None else known()
        if following is not None and self._positions[following] > position:
            self._fetched = (following, _start_gather(following, group))


def _start_gather(experts: Experts, group: dist.ProcessGroup) -> Pending:
    flat = torch.cat([tensor.detach().flatten() for tensor in experts.tensors().values()])
    return collectives.start_all_gather_rows(flat.unsqueeze(0), group=group)


_PREFETCHERS: WeakKeyDictionary[dist.ProcessGroup, ExpertPrefetcher] = WeakKeyDictionary()


class _Gather(torch.autograd.Function):
    """From the gathered buffer to tensors [ranks * slots, ...]; backward reduce-scatters their gradients."""

    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, prefetcher: ExpertPrefetcher, group: dist.ProcessGroup, *own: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.prefetcher, ctx.group, ctx.shapes = prefetcher, group, [tensor.shape for tensor in own]
        return _split(flat, ctx.shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        require_first_order()
        ctx.prefetcher.drop()
        flat = torch.cat([grad.reshape(collectives.group_size(ctx.group), -1) for grad in grads], dim=1)
        own = collectives.reduce_scatter_rows(flat, group=ctx.group).flatten()
        parts = own.split([shape.numel() for shape in ctx.shapes])
        return None, None, None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


def _split(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """The gathered buffer [ranks, values per rank] as tensors [ranks * slots, ...]."""
    parts: Sequence[Tensor] = flat.split([shape.numel() for shape in shapes], dim=1)
    return tuple(part.reshape(-1, *shape[1:]) for part, shape in zip(parts, shapes, strict=True))
