"""Batches prepared ahead of the loop: one in a background thread, or several in loader processes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import logging
import os
import resource
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pickle import UnpicklingError
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ase_dist.data.sampler import Draw
from ase_dist.errors import ExitCode, RunError, UserError, describe, exit_code_of
from ase_dist.files import wait_until
from ase_dist.workers import ignore_signals

LOGGER = logging.getLogger("ase_dist")
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
    sentence, bugs with their traceback. Where a process is killed, or cannot share memory any more, ``failure`` says so
    and the thread goes on with the same batches, so that the loop can save and end. Batches for a ``device`` other than
    the CPU are page-locked; for a CPU no accelerator is touched, even where there is one.
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
        self.failure: UserError | RunError | None = None
        self._loader: DataLoader[Any] | None = None
        self._draws = _Draws()
        self._at_exit = functools.partial(_close_if_alive, weakref.ref(self))

    def __iter__(self) -> Generator[BatchT, None, None]:
        plan = iter(self._plan())
        return self._from_processes(plan) if self._workers and self.failure is None else self._from_thread(plan)

    def close(self) -> None:
        """End the loader processes; a further iteration would start new ones."""
        loader, self._loader = self._loader, None
        atexit.unregister(self._at_exit)
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()  # torch 2.14 has no public way while an iteration refers to it

    def _from_thread(self, plan: Iterator[Draws]) -> Generator[BatchT, None, None]:
        # a new thread starts on device 0, where pinning would open another context
        begin = functools.partial(torch.accelerator.set_device_index, self._device) if self._pins else None
        pool = ThreadPoolExecutor(1, thread_name_prefix="ase-data", initializer=begin)
        try:
            waiting: Future[BatchT] | None = None
            for draws in plan:
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

    def _from_processes(self, plan: Iterator[Draws]) -> Generator[BatchT, None, None]:
        rest, self._draws.plan = itertools.tee(plan)  # the rest: without the draws whose batches the loop has
        try:
            for batch in self._start_processes():
                if isinstance(batch, _Failure):
                    raise batch.error()
                next(rest)
                yield batch
            return
        except _LoaderProcessError as error:
            if error.is_at_start:
                raise error.told from None
            self.failure = error.told
        LOGGER.warning("%s; the main process reads the rest itself", self.failure)
        self.close()
        yield from self._from_thread(rest)

    def _start_processes(self) -> Iterator[Any]:
        """What the processes make, batches and failures, in order; they are started, or go on where they live.

        Raises _LoaderProcessError where one of them cannot go on.
        """
        fresh = self._loader is None
        if self._loader is None:
            self._loader = DataLoader(
                _Fetched(self._fetch),
                batch_size=None,
                sampler=self._draws,
                num_workers=self._workers,
                collate_fn=_unchanged,
                pin_memory=self._pins,
                multiprocessing_context="spawn",
                worker_init_fn=_begin_worker,
                persistent_workers=True,
                generator=torch.Generator(),  # else the loader would draw from the global one, which a resume compares
            )
        with _unchanged_child_handler():
            batches: Any = iter(self._loader)
        if fresh:
            # The processes ignore SIGTERM, with which multiprocessing ends what is left at exit before waiting for it.
            # Registered after them, this runs before that.
            atexit.register(self._at_exit)
        taken = 0
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
                told = _why_lost(error, batches._workers)
                if told is None:
                    raise
                raise _LoaderProcessError(told, is_at_start=isinstance(told, UserError) and not taken) from error
            if isinstance(batch, _NoSharedMemory):
                sentence = (
                    f"data.workers: a loader process cannot share memory ({batch.reason}); give the container a larger "
                    "/dev/shm (docker --shm-size=1g, in Kubernetes a volume in memory), or set data.workers=0"
                )
                raise _LoaderProcessError(UserError(sentence), is_at_start=not taken)
            taken += 1
            yield batch


def _why_lost(error: Exception, processes: Sequence[BaseProcess]) -> UserError | RunError | None:
    """What to tell of an ``error`` of torch's loader; None where it is not of the processes themselves.

    A process that is killed while it hands over a batch shows as a broken connection of one kind or another.
    """
    if "Too many open files" in str(error):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return UserError(
            f"data.workers: too many open files, this process may open {most}; allow more with ulimit -n 1024, or set "
            "data.workers=0"
        )
    if not wait_until(lambda: any(not process.is_alive() for process in processes), patience=1):
        return None
    code = next(process.exitcode for process in processes if not process.is_alive())
    return RunError(
        f"data.workers: a loader process has died (exit code {code}), perhaps because memory ran out; start again, "
        "with fewer data.workers where it was memory",
        exit_code=ExitCode.IO_ERROR,
    )


@contextlib.contextmanager
def _unchanged_child_handler() -> Iterator[None]:
    """Take back the handler of SIGCHLD that torch's loader sets.

    It raises an error in whatever the main thread is doing when a loader process dies, in the middle of a collective or
    of a save. Without it the next batch raises it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


class _LoaderProcessError(Exception):
    """A loader process cannot go on. ``is_at_start``: no batch has come, so it is a matter of the machine."""

    def __init__(self, told: UserError | RunError, *, is_at_start: bool) -> None:
        super().__init__(str(told))
        self.told, self.is_at_start = told, is_at_start


@dataclass(frozen=True)
class _Failure:
    """An error of one sentence in a loader process; if it were raised there, torch would wrap it in a traceback."""

    sentence: str
    exit_code: ExitCode

    def error(self) -> UserError | RunError:
        """The error that was raised in the loader process, or one of the same exit code."""
        if self.exit_code is ExitCode.USAGE:
            return UserError(self.sentence)
        return RunError(self.sentence, exit_code=self.exit_code)


@dataclass(frozen=True)
class _NoSharedMemory:
    """A batch that could not be sent, and why."""

    reason: str


class _Shared:
    """A batch whose tensors lie in shared memory; it arrives as the batch itself.

    Torch would move them there in a thread that only prints its errors, and the loop would wait for ever.
    """

    def __init__(self, batch: Any) -> None:
        self._kind, self._state = type(batch), batch.__reduce_ex__(4)[2]
        _share(self._state)

    def __reduce__(self) -> Any:
        return _rebuilt, (self._kind, self._state)


def _rebuilt(kind: type[Any], state: Any) -> Any:
    """As pickle builds an object from its state."""
    batch: Any = object.__new__(kind)
    if hasattr(batch, "__setstate__"):
        batch.__setstate__(state)
    else:
        batch.__dict__.update(state)
    return batch


def _share(state: Any) -> None:
    if isinstance(state, torch.Tensor):
        state.share_memory_()
    elif isinstance(state, (Mapping, list, tuple)):
        for part in state.values() if isinstance(state, Mapping) else state:
            _share(part)


class _Fetched(Dataset[Any]):
    def __init__(self, fetch: Callable[[Draws], Any]) -> None:
        self._fetch = fetch

    def __getitem__(self, draws: Draws) -> Any:
        try:
            batch = self._fetch(draws)
        except Exception as error:
            if exit_code_of(error) is ExitCode.FAILED:  # a bug, whose traceback torch brings along
                raise
            return _Failure(describe(error), exit_code_of(error))
        try:
            return _Shared(batch)
        except (RuntimeError, OSError) as error:  # torch's own, which has no number
            return _NoSharedMemory(describe(error))


class _Draws:
    """The sampler of the processes: the plan of the present iteration."""

    plan: Iterator[Draws]

    def __iter__(self) -> Iterator[Draws]:
        return self.plan


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
