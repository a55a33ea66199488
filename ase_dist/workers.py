"""The pool of worker processes for everything that is computed outside this process. Imports no torch.

A worker is a fresh Python started by ``subprocess``, not by ``multiprocessing``: it forks no process that holds threads
or a CUDA context, and it may be asked for by a daemon and by a script without a main guard. It computes on one thread.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from ase_dist.stopping import STOPPING

PATIENCE = 1800.0  # seconds for one call, after which its worker counts as stuck and is killed
END_GRACE = 5.0  # seconds that a killed worker gets to end
AHEAD = 2  # calls in flight for each worker: one that it computes, and one that waits for it
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# The parent's sys.path first: "-c" alone would look for modules in the current folder before anywhere else.
COMMAND = "import sys; sys.path[:] = sys.argv[2:]; from ase_dist.workers import serve; serve(int(sys.argv[1]))"


class WorkerDiedError(RuntimeError):
    """A worker ended before it gave its result, or was ended because it gave none."""


class WorkerPool:
    """Up to ``workers`` processes that call functions; a context manager.

    1. ``submit`` sends a call to the next free worker; workers are started as calls arrive.
    2. What a call returns or raises is in its future; WorkerDiedError where the worker was killed meanwhile, and where
       it has not answered within ``patience`` seconds, as on a network file system that hangs.
    3. ``close`` drops what waits and kills the workers. They also end by themselves as soon as this process does.

    Workers ignore the signals of ``STOPPING``: this process answers them and ends its workers. Functions, arguments and
    results are pickled; functions must be importable by name, and not from ``__main__``.
    """

    def __init__(self, workers: int, *, patience: float | None = None) -> None:
        self.workers, self.patience = workers, PATIENCE if patience is None else patience
        self.processes: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="ase-worker")  # one for each process
        self._of_thread = threading.local()
        self._lock = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """The future of ``function(*args)``, computed by a worker."""
        return self._threads.submit(self._call, pickle.dumps((function, args), pickle.HIGHEST_PROTOCOL))

    def map(
        self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], *, in_order: bool = True
    ) -> Iterator[Any]:
        """``function(*call)`` for each of ``calls``, in their order or as they are ready.

        ``calls`` are read no further ahead than two for each worker. Raises what a call raises, and WorkerDiedError.
        """
        waiting: deque[Future[Any]] = deque()

        def take() -> Any:
            if in_order:
                return waiting.popleft().result()
            ready = next(iter(wait(waiting, return_when=FIRST_COMPLETED).done))
            waiting.remove(ready)
            return ready.result()

        for call in calls:
            waiting.append(self.submit(function, *call))
            if len(waiting) >= AHEAD * self.workers:
                yield take()
        while waiting:
            yield take()

    def close(self) -> None:
        """Drop the calls that wait and end the workers at once, busy ones included."""
        with self._lock:
            self._is_closed = True
            for process in self.processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel keeps one that waits for a file system
                process.wait(timeout=END_GRACE)
            assert process.stdin is not None
            process.stdin.close()

    def _call(self, message: bytes) -> Any:
        """Send one call to the worker of this thread and wait for its answer."""
        if not hasattr(self._of_thread, "worker"):
            self._of_thread.worker = self._start()
        process, connection = self._of_thread.worker
        try:
            connection.send_bytes(message)
            if not connection.poll(self.patience):
                process.kill()  # its end may have to wait for the file system, so nothing here waits for it
                raise WorkerDiedError(
                    f"a worker process gave no answer for {self.patience:g} s, perhaps because a file system hangs"
                )
            answer = connection.recv_bytes()
        except (EOFError, OSError):
            code = process.wait()
            raise WorkerDiedError(
                f"a worker process ended early (exit code {code}), perhaps because memory ran out"
            ) from None
        returned, raised, trace = pickle.loads(answer)
        if raised is not None:
            raise raised from _RemoteTraceback(trace)
        return returned

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            if self._is_closed:
                raise WorkerDiedError("the pool was closed")
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(theirs.fileno()), *sys.path],
                stdin=subprocess.PIPE,  # never written to: it ends when this process does
                pass_fds=(theirs.fileno(),),
                env={**os.environ, **ONE_THREAD},
                start_new_session=True,  # Ctrl-C reaches this process alone
            )
            self.processes.append(process)
        return process, Connection(ours.detach())


class _RemoteTraceback(Exception):  # noqa: N818
    """Where a worker raised what is raised here: the cause of it, as text."""

    def __init__(self, trace: str) -> None:
        super().__init__(f"\n{trace}")


def run_calls(
    function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], *, workers: int, in_order: bool = True
) -> Iterator[Any]:
    """As ``WorkerPool.map``, with a pool of its own; with one worker or none, in this process and in order."""
    if workers <= 1:
        for call in calls:
            yield function(*call)
        return
    with WorkerPool(workers) as pool:
        yield from pool.map(function, calls, in_order=in_order)


def ignore_signals() -> None:
    """The signals of ``STOPPING`` are the parent's to answer, not a worker's."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def serve(descriptor: int) -> None:
    """The life of a worker: calls from the socket ``descriptor``, answers to it, until the parent closes or dies."""
    ignore_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection = Connection(descriptor)
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        try:
            function, args = pickle.loads(message)
            answer = pickle.dumps((function(*args), None, ""), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            answer = pickle.dumps((None, _portable(error), traceback.format_exc()))
        connection.send_bytes(answer)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """``error`` if it survives pickling, else its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
