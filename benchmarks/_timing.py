"""What the benchmarks share: sides that take turns, exact memory, tables, JSON and plots."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ase_dist.files import replacing, write_atomic
from ase_dist.training.process.runtime import keep_freed_memory
from ase_dist.training.record.environment import git_commit

MB = 1e6


class Times(NamedTuple):
    """Of one call: seconds of its forward pass and of all of it, and seconds of the processor, all threads."""

    forward: float
    step: float
    processor: float


def prepare(threads: int) -> None:
    """Every side alike: threads, and freed memory kept, or a CPU benchmark measures page faults."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's start and stop, on stderr
    torch.set_num_threads(threads)
    keep_freed_memory()


def interleaved(sides: Mapping[str, Callable[[], Times]], repeats: int, *, before: int = 0) -> dict[str, list[Times]]:
    """Every side in turn in every repetition, after a repetition that is not counted.

    ``before`` each turn so many calls of the side are not counted either: the allocator's free blocks are then those
    that it left itself, as in a loop of nothing else.
    """
    taken: dict[str, list[Times]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            for _ in range(before):
                side()
            times = side()
            if repeat:
                taken[name].append(times)
    return taken


class Watch:
    """Takes ``Times``: made at the start of a call, told when its forward pass ends."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()
        self._forward = 0.0

    def forward_done(self) -> None:
        """Between forward and backward."""
        self._forward = time.perf_counter() - self._wall

    def stop(self) -> Times:
        """After the call."""
        return Times(self._forward, time.perf_counter() - self._wall, time.process_time() - self._processor)


def median(times: Sequence[Times], field: str) -> float:
    """The median of one of the clocks."""
    return statistics.median(getattr(each, field) for each in times)


def ratio(times: Sequence[Times], others: Sequence[Times], field: str) -> float:
    """The median over repetitions of one side's clock over the other's in the same repetition."""
    pairs = zip(times, others, strict=True)
    return statistics.median(getattr(mine, field) / getattr(theirs, field) for mine, theirs in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class Saved(NamedTuple):
    """Bytes that autograd keeps for the backward pass, each storage once, weights aside."""

    inputs: int
    rest: int


def saved_bytes(forward: Callable[[], object], *, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Saved:
    """Counted while ``forward`` runs; what is the caller's own input is counted apart."""
    kept: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = forward()
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    sizes = {pointer: tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in known}
    del output
    return Saved(
        sum(size for pointer, size in sizes.items() if pointer in own),
        sum(size for pointer, size in sizes.items() if pointer not in own),
    )


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held during ``step`` beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results = profile.profiler.kineto_results
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# ---------------------------------------------------------------------------------------------------------------------
# Output


def machine() -> dict[str, object]:
    """What ran this, and how busy it was with other work, too."""
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__, "load": os.getloadavg()[0]}  # fmt: skip


def write_report(path: Path | None, arguments: Any, **parts: object) -> None:
    """Everything as JSON, where a path is given: what ran, from which commit, when and where, and the figures.

    The tables of docs/ are made of such files in docs/figures/ by docs/figures.py.
    """
    if path is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        report = {"benchmark": Path(sys.argv[0]).name, "commit": git_commit(),
                  "date": datetime.now(timezone.utc).date().isoformat(), "machine": machine(), "arguments": settings,
                  **parts}  # fmt: skip
        write_atomic(path, json.dumps(report, indent=2) + "\n")


@contextmanager
def drawing(path: Path, *, panels: int, height: float = 3.6) -> Any:
    """Axes in rows of up to four, saved to ``path`` at the end."""
    rows = -(-panels // 4)
    columns = -(-panels // rows)
    figure = Figure(figsize=(4.6 * columns, height * rows), layout="constrained")
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in every[panels:]:
        unused.axis("off")
    yield every[:panels]
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=130)
