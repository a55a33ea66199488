"""Scalars for TensorBoard, CSV and W&B, which DeepSpeed's monitor writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ase_dist.training.record.appending import RecordError, recording

Event = tuple[str, float, int]  # name, value, step


class Scalars:
    """Writes to the ``monitor`` of DeepSpeed's engine, on rank 0 only; ``failure`` is the first error of that.

    The engine writes scalars of its own in the middle of a step (0.19.8), which an error of the disk must not break:
    so the monitor's own method is replaced, and writes nothing after a failure. ``folder`` is named in the error.
    """

    def __init__(self, monitor: Any, *, folder: Path) -> None:
        self.folder = folder
        self.failure: RecordError | None = None
        self._write = monitor.write_events if monitor.enabled else None
        if monitor.enabled:
            monitor.write_events = self.write

    def write(self, events: list[Event]) -> None:
        """Write ``events`` where the settings or DeepSpeed's JSON ask for it."""
        if self._write is None or self.failure is not None:
            return
        try:
            with recording(self.folder):
                self._write(events)
        except RecordError as error:
            self.failure = error


@contextmanager
def writer_errors_told_once() -> Iterator[None]:
    """Keep TensorBoard's thread from printing the traceback of a full disk: the next write raises the error too."""
    previous = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        is_writer = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(arguments.exc_value, OSError)):
            previous(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = previous
