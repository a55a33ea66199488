"""The one module through which every collective goes. Without a process group each is the identity of one rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as traceable


def is_distributed() -> bool:
    """Whether a default process group exists."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Ranks in the default group; 1 where there is none."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """This process's rank in the default group; 0 where there is none."""
    return dist.get_rank() if is_distributed() else 0


NCCL_MARGIN = 60.0  # seconds


def limit_all_groups(seconds: float) -> None:
    """Set the time limit of every group that exists, whoever made it: DeepSpeed gives its own none, so torch's hold.

    NCCL aborts the process at its limit, without a word of which rank is missing; so its limit is ``NCCL_MARGIN``
    longer, and the watchdog, which says that, comes first.
    """
    # torch 2.14 made this public; the old name still works there and warns
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in list(dist.distributed_c10d._world.pg_map):
        is_nccl = "nccl" in dist.get_backend(group)
        set_timeout(timedelta(seconds=seconds + (NCCL_MARGIN if is_nccl else 0)), group)


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of ``value`` over all ranks, as a new tensor; no gradient flows through it."""
    if world_size() > 1 and torch.compiler.is_compiling():
        return traceable.all_reduce(value.detach(), "sum", dist.group.WORLD)  # type: ignore[arg-type]
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def gather_objects(value: object) -> list[object]:
    """Every rank's ``value`` in order of rank (small things: names, hashes, sentences)."""
    if world_size() == 1:
        return [value]
    gathered: list[object] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def any_rank(flag: bool, device: torch.device | str) -> bool:
    """Whether ``flag`` is set on any rank; of several ranks each waits for its device."""
    if world_size() == 1:
        return flag
    return bool(all_reduce_sum(torch.full((), float(flag), device=device)).item() > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Among the ranks of a group, as expert parallelism needs them


# torch 2.14 renamed both; the old names still work there and warn
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_traceable_all_gather = getattr(traceable, "all_gather_single_autograd", None) or traceable.all_gather_tensor_autograd


class Traffic:
    """Bytes that this rank has put on the wire by collectives of groups, by name of the collective."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """The sum over the collectives."""
        return sum(self.bytes.values())


_listeners: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what the collectives below send from this rank while the context is open; self-sends do not count."""
    traffic = Traffic()
    _listeners.append(traffic)
    try:
        yield traffic
    finally:
        _listeners.remove(traffic)


def _count(name: str, count: int, like: Tensor) -> None:
    for traffic in _listeners:
        traffic.bytes[name] += count * like.element_size()


class Pending:
    """A tensor that a collective is still filling; ``wait`` gives it."""

    def __init__(self, tensor: Tensor, work: dist.Work | None) -> None:
        self._tensor, self._work = tensor, work

    def wait(self) -> Tensor:
        """The tensor, once it is there for this device's current stream."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._tensor


def all_ranks() -> dist.ProcessGroup | None:
    """The group of all ranks; None for a process alone."""
    return dist.group.WORLD if is_distributed() else None


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in ``group``; 1 for None, which here means this process alone."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's place in ``group``; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def all_gather_rows(rows: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """The equally shaped ``rows`` [m, ...] of a group's ranks one after another: [m * size, ...], no gradient."""
    return start_all_gather_rows(rows, group=group).wait()


def all_gather_rows_in_graph(rows: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """``all_gather_rows`` as an operator of a graph that is being compiled; its gradient is reduced and scattered."""
    return _traceable_all_gather(rows, 0, group)


def start_all_gather_rows(rows: Tensor, *, group: dist.ProcessGroup | None) -> Pending:
    """``all_gather_rows`` under way."""
    size = group_size(group)
    if size == 1:
        return Pending(rows, None)
    gathered = rows.new_empty(size * rows.shape[0], *rows.shape[1:])
    work = _all_gather(gathered, rows.contiguous(), group=group, async_op=True)
    _count("all_gather", rows.numel() * (size - 1), rows)
    return Pending(gathered, work)


def reduce_scatter_rows(rows: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's block of the sum over the group of ``rows`` [m * size, ...]: [m, ...]."""
    size = group_size(group)
    if size == 1:
        return rows
    own = rows.new_empty(rows.shape[0] // size, *rows.shape[1:])
    _reduce_scatter(own, rows.contiguous(), group=group)
    _count("reduce_scatter", rows.numel() // size * (size - 1), rows)
    return own


def start_all_to_all_rows(
    rows: Tensor, *, send: list[int], receive: list[int], group: dist.ProcessGroup | None
) -> Pending:
    """Send ``send[p]`` consecutive rows [M, ...] to rank p and get ``receive[p]`` from it; zeros are fine."""
    if group is None:
        return Pending(rows, None)
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    work = dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group, async_op=True)
    away = sum(send) - send[group_rank(group)]
    _count("all_to_all", away * rows.shape[1:].numel(), rows)
    return Pending(received, work)
