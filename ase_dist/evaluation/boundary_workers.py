"""Counting images over processes: spawned workers, results in order, at most a few images waiting."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ase_dist.errors import UserError
from ase_dist.evaluation.boundary_counts import Floats, Protocol, count_image
from ase_dist.workers import begin_worker

LOGGER = logging.getLogger("ase_dist")
Image = tuple[int, NDArray[Any], list[NDArray[Any]]]

FEW_IMAGES = 32  # not worth starting processes for (2 s), unless a number of workers is asked for


class ImageCounter:
    """Counts images as they are pushed, in ``workers`` other processes (0 or 1: in this one); a context manager.

    ``push`` and ``drain`` give the counts of images in the order in which they were pushed, whatever the number of
    processes. At most two images per worker wait at any time: then ``push`` waits for the oldest. Workers are spawned,
    not forked: a process that has torch loaded holds locks and threads that a fork would break. Where one of them is
    killed (by the system, for want of memory) this process counts what they left and all the rest.
    """

    def __init__(self, protocol: Protocol, *, workers: int) -> None:
        self.protocol, self.workers = protocol, workers
        self._waiting: deque[tuple[Image, Future[Floats]]] = deque()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> ImageCounter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def push(self, image: Image) -> list[Floats]:
        """Count one image; the counts that are ready and due, possibly none. UserError as ``count_image``."""
        if self.workers > 1 and self._submit(image):
            return [self._take()] if len(self._waiting) > 2 * self.workers else []
        return [*self.drain(), count_image(*image, self.protocol)]

    def drain(self) -> Iterator[Floats]:
        """The counts of what still waits."""
        while self._waiting:
            yield self._take()

    def close(self) -> None:
        """Drop what still waits and end the processes."""
        while self._waiting:
            self._waiting.popleft()[1].cancel()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _submit(self, image: Image) -> bool:
        """Give the image to the other processes; False where they have died."""
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, mp_context=spawn, initializer=begin_worker)
        try:
            self._waiting.append((image, self._pool.submit(count_image, *image, self.protocol)))
        except BrokenProcessPool:
            self._go_on_alone()
            return False
        return True

    def _take(self) -> Floats:
        image, future = self._waiting.popleft()
        try:
            return future.result()
        except BrokenProcessPool:
            self._go_on_alone()
            return count_image(*image, self.protocol)

    def _go_on_alone(self) -> None:
        if self.workers > 1:
            LOGGER.warning(
                "a process that counts boundaries was killed, perhaps for want of memory; counting goes on "
                "in this one, more slowly"
            )
            # until Python 3.11.5 (gh-94777) the pool waits for ever for the dead to read what it has for them
            if self._pool is not None and sys.version_info < (3, 11, 5):
                self._pool._call_queue._reader.close()  # type: ignore[attr-defined]
        self.workers = 1


def pair_images(predictions: Iterable[ArrayLike], ground_truths: Iterable[Iterable[ArrayLike]]) -> Iterator[Image]:
    """(index, prediction, annotators' maps) of each image; UserError where one of the two ends before the other."""
    left, right = iter(predictions), iter(ground_truths)
    for index in itertools.count():
        prediction, truths = next(left, None), next(right, None)
        if prediction is None and truths is None:
            return
        if prediction is None or truths is None:
            more, fewer = ("ground truths", "predictions") if prediction is None else ("predictions", "ground truths")
            raise UserError(f"{fewer}: got {index}, but more {more}; wanted one of each per image")
        yield index, np.asarray(prediction), [np.asarray(truth) for truth in truths]


def count_images(images: Iterator[Image], protocol: Protocol, *, workers: int | None) -> Iterator[Floats]:
    """Counts of each image in the order of the images; they are read no further ahead than ``ImageCounter`` says."""
    head = list(itertools.islice(images, FEW_IMAGES)) if workers is None else []
    if workers is None:
        workers = 1 if len(head) < FEW_IMAGES else default_workers()
    with ImageCounter(protocol, workers=workers) as counter:
        for image in itertools.chain(head, images):
            yield from counter.push(image)
        yield from counter.drain()


def default_workers(*, processes: int = 1) -> int:
    """Cores that this process may use, shared among ``processes`` like it; 0 where it may start none."""
    if multiprocessing.current_process().daemon:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // processes)
