"""Experts travel: each rank gathers all routed experts, computes as at size 1, and gets its gradients reduced back.

LoRA experts are far smaller than the tokens that visit them. One flat buffer per layer goes each way, and the next
layer's experts are fetched while this one computes.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ase_dist import collectives
from ase_dist.collectives import Pending
from ase_dist.moe.dispatch.base import FeedForward, Routed, full_ffn, joined, lora_ffn
from ase_dist.moe.experts import FFNExperts, LoRAExperts
from ase_dist.moe.sharding import Shard
from ase_dist.ops.lowrank import Activation

Bank = LoRAExperts | FFNExperts


class Prefetcher:
    """Fetches the experts of the layer that came next in the last pass while the present one computes.

    It learns the order by itself and holds one fetch at a time. A fetch never outlives its pass over the weights: it is
    dropped when another layer comes and when a backward pass begins; the first layer of a pass is never fetched ahead,
    nor is anything inside a backward pass, where activations are recomputed.
    """

    def __init__(self) -> None:
        self._layers = 0
        self._successor: dict[int, GatherDispatch] = {}
        self._present: GatherDispatch | None = None
        self._fetched: tuple[GatherDispatch, Pending] | None = None

    def register(self) -> int:
        """The position of a new layer among those of this group."""
        self._layers += 1
        return self._layers - 1

    def take(self, layer: GatherDispatch) -> Tensor:
        """The gathered buffer of ``layer``; its successor's is then under way."""
        if self._fetched is not None and self._fetched[0] is layer:
            pending, self._fetched = self._fetched[1], None
        else:
            self.drop()
            pending = layer.start()
        flat = pending.wait()
        if not _in_backward():
            self._look_ahead(layer)
        return flat

    def drop(self) -> None:
        """Forget what was fetched and not taken: the weights may change before it is."""
        if self._fetched is not None:
            self._fetched[1].wait()
            self._fetched = None

    def _look_ahead(self, layer: GatherDispatch) -> None:
        if self._present is not None:
            self._successor[id(self._present)] = layer
        self._present = layer
        following = self._successor.get(id(layer))
        if following is not None and following.position > layer.position:
            self._fetched = (following, following.start())


_PREFETCHERS: WeakKeyDictionary[dist.ProcessGroup, Prefetcher] = WeakKeyDictionary()


def prefetcher_of(group: dist.ProcessGroup) -> Prefetcher:
    """The one prefetcher that all layers of a group share."""
    return _PREFETCHERS.setdefault(group, Prefetcher())


class GatherDispatch:
    """``Dispatch`` by gathering the experts of ``bank`` over ``group``."""

    def __init__(self, bank: Bank, *, group: dist.ProcessGroup, shard: Shard) -> None:
        self._bank, self._group, self._shard = bank, group, shard
        self._prefetcher = prefetcher_of(group)
        self.position = self._prefetcher.register()

    def lora(self, tokens: Routed, base: FeedForward, routed: LoRAExperts, shared: LoRAExperts | None) -> Tensor:
        """See ``Dispatch.lora``."""
        return lora_ffn(tokens, base, joined(self._full(), shared), routed.places)

    def ffn(self, tokens: Routed, act: Activation, routed: FFNExperts, shared: FFNExperts | None) -> Tensor:
        """See ``Dispatch.ffn``."""
        return full_ffn(tokens, act, self._full(), None if shared is None else shared.tensors())

    def start(self) -> Pending:
        """Begin to gather this layer's flat buffer: [size, values per rank]."""
        flat = torch.cat([tensor.detach().flatten() for tensor in self._bank.tensors().values()])
        return collectives.start_all_gather_rows(flat.unsqueeze(0), group=self._group)

    def _full(self) -> dict[str, Tensor]:
        """All routed experts' tensors in global order, without padding."""
        own = self._bank.tensors()
        full = _Gather.apply(self._prefetcher.take(self), self._group, self._prefetcher, *own.values())
        return {name: tensor[: self._shard.routed] for name, tensor in zip(own, full, strict=True)}


class _Gather(torch.autograd.Function):
    """From the gathered buffer to tensors [size * slots, ...]; backward reduce-scatters their gradients."""

    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, group: dist.ProcessGroup, prefetcher: Prefetcher, *own: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.prefetcher, ctx.shapes = group, prefetcher, [tensor.shape for tensor in own]
        parts = flat.split([tensor.numel() for tensor in own], dim=1)
        return tuple(part.reshape(-1, *tensor.shape[1:]) for part, tensor in zip(parts, own, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.prefetcher.drop()
        size = collectives.group_size(ctx.group)
        flat = torch.cat([grad.reshape(size, -1) for grad in grads], dim=1)
        own = collectives.reduce_scatter_rows(flat, group=ctx.group).flatten()
        parts = own.split([shape.numel() for shape in ctx.shapes])
        return None, None, None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


def _in_backward() -> bool:
    """Whether autograd is running, as it does when activations are recomputed."""
    return torch._C._current_graph_task_id() != -1
