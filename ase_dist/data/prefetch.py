"""Batches prepared ahead of the loop: one in a background thread, or several in loader processes."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ase_dist.data.sampler import Draw
from ase_dist.errors import ExitCode, RunError, UserError, describe, exit_code_of
from ase_dist.workers import ignore_signals

Draws = list[Draw]
CPU = torch.device("cpu")
LAST = -1000  # of what multiprocessing does at the end of a process


class Pinnable(Protocol):
    """A batch that can copy itself into page-locked memory."""

    def pin_memory(self) -> Any:
        """A page-locked copy of the same type."""


BatchT = TypeVar("BatchT", bound=Pinnable)


class Prefetcher(Generic[BatchT]):
    """Iterates ``fetch(draws)`` over ``plan`` in order, a little ahead of the loop; each iteration starts anew.

    ``workers`` 0: a thread prepares the next batch while the loop uses this one. More: that many processes, spawned
    (forking a process with threads or a CUDA context is not safe, and a signal to the whole job would kill a fork
    server and with it the workers). User and file errors in ``fetch`` are raised again in the loop with the same
    sentence, bugs with their traceback. Batches for a ``device`` other than the CPU are page-locked; for a CPU no
    accelerator is touched, even where there is one.
    """

    def __init__(
        self,
        fetch: Callable[[Draws], BatchT],
        *,
        plan: Callable[[], Iterable[Draws]],
        workers: int,
        device: torch.device = CPU,
    ) -> None:
        self._fetch = fetch
        self._plan = plan
        self._workers = workers
        self._device, self._pins = device, device.type != "cpu"
        self._loader: DataLoader[Any] | None = None
        self._at_exit = functools.partial(_close_if_alive, weakref.ref(self))

    def __iter__(self) -> Generator[BatchT, None, None]:
        return self._from_processes() if self._workers else self._from_thread()

    def close(self) -> None:
        """End the loader processes; a further iteration would start new ones."""
        loader, self._loader = self._loader, None
        atexit.unregister(self._at_exit)
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()  # torch 2.14 has no public way while an iteration refers to it

    def _from_thread(self) -> Generator[BatchT, None, None]:
        # a new thread starts on device 0, where pinning would open another context
        begin = functools.partial(torch.accelerator.set_device_index, self._device) if self._pins else None
        pool = ThreadPoolExecutor(1, thread_name_prefix="ase-data", initializer=begin)
        try:
            waiting: Future[BatchT] | None = None
            for draws in self._plan():
                following = pool.submit(self._fetch_pinned, draws)
                if waiting is not None:
                    yield waiting.result()
                waiting = following
            if waiting is not None:
                yield waiting.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _fetch_pinned(self, draws: Draws) -> BatchT:
        batch = self._fetch(draws)
        return batch.pin_memory() if self._pins else batch

    def _from_processes(self) -> Generator[BatchT, None, None]:
        fresh = self._loader is None
        if self._loader is None:
            self._loader = DataLoader(
                _Fetched(self._fetch),
                batch_size=None,
                sampler=_Plan(self._plan),
                num_workers=self._workers,
                collate_fn=_unchanged,
                pin_memory=self._pins,
                multiprocessing_context="spawn",
                worker_init_fn=_begin_worker,
                persistent_workers=True,
                generator=torch.Generator(),  # else the loader would draw from the global one, which a resume compares
            )
        batches = iter(self._loader)
        if fresh:
            # The processes ignore SIGTERM, with which multiprocessing ends what is left at exit before waiting for it.
            # Registered after them, this runs before that.
            atexit.register(self._at_exit)
        for batch in batches:
            if isinstance(batch, _Failure):
                is_mistake = batch.exit_code is ExitCode.USAGE
                raise UserError(batch.sentence) if is_mistake else RunError(batch.sentence, exit_code=batch.exit_code)
            yield batch


@dataclass(frozen=True)
class _Failure:
    """An error of one sentence in a loader process; if it were raised there, torch would wrap it in a traceback."""

    sentence: str
    exit_code: ExitCode


class _Fetched(Dataset[Any]):
    def __init__(self, fetch: Callable[[Draws], Any]) -> None:
        self._fetch = fetch

    def __getitem__(self, draws: Draws) -> Any:
        try:
            return self._fetch(draws)
        except Exception as error:
            if exit_code_of(error) is ExitCode.FAILED:  # a bug, whose traceback torch brings along
                raise
            return _Failure(describe(error), exit_code_of(error))


class _Plan:
    def __init__(self, plan: Callable[[], Iterable[Draws]]) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[Draws]:
        return iter(self._plan())


def _close_if_alive(prefetcher: weakref.ref[Prefetcher[Any]]) -> None:
    alive = prefetcher()
    if alive is not None:
        alive.close()


def _unchanged(batch: Any) -> Any:
    return batch


def _begin_worker(_worker: int) -> None:
    def end_at_once() -> None:
        """End without the interpreter's clean-up: a batch that is being sent meanwhile would abort it (torch 2.14)."""
        if sys.exc_info()[0] is None:
            os._exit(0)

    ignore_signals()
    Finalize(None, end_at_once, exitpriority=LAST)
