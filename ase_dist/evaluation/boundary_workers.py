"""Counting the boundaries of images in other processes: results in order, at most a few images waiting."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ase_dist.cores import usable_cores
from ase_dist.errors import UserError
from ase_dist.evaluation.boundary_counts import Floats, Protocol, count_image
from ase_dist.workers import WorkerDiedError, WorkerPool

LOGGER = logging.getLogger("ase_dist")
Image = tuple[int, NDArray[Any], list[NDArray[Any]]]

FEW_IMAGES = 32  # not worth starting processes for, unless a number of workers is asked for


class ImageCounter:
    """Counts images as they are pushed, in ``workers`` other processes (0 or 1: in this one); a context manager.

    ``push`` and ``drain`` give the counts of images in the order in which they were pushed, for any number of
    processes. At most two images per worker wait at any time: then ``push`` waits for the oldest. Where a worker is
    killed (by the system, when memory runs out) this process counts what the workers left and all the rest.
    """

    def __init__(self, protocol: Protocol, *, workers: int) -> None:
        self.protocol = protocol
        self.pool = WorkerPool(workers) if workers > 1 else None
        self._waiting: deque[tuple[Image, Future[Floats]]] = deque()

    def __enter__(self) -> ImageCounter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def push(self, image: Image) -> list[Floats]:
        """Count one image; the counts that are ready and due, possibly none. UserError as ``count_image``."""
        if self.pool is None:
            return [*self.drain(), count_image(*image, self.protocol)]
        self._waiting.append((image, self.pool.submit(count_image, *image, self.protocol)))
        return [self._take()] if len(self._waiting) > 2 * self.pool.workers else []

    def drain(self) -> Iterator[Floats]:
        """The counts of what still waits."""
        while self._waiting:
            yield self._take()

    def close(self) -> None:
        """Drop what still waits and end the processes."""
        self._waiting.clear()
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    def _take(self) -> Floats:
        image, future = self._waiting.popleft()
        if self.pool is not None:
            try:
                return future.result()
            except WorkerDiedError as error:
                LOGGER.warning("%s; counting boundaries goes on in this one, more slowly", error)
                self.pool.close()
                self.pool = None
        return future.result() if _has_result(future) else count_image(*image, self.protocol)


def _has_result(future: Future[Floats]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


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
        workers = 1 if len(head) < FEW_IMAGES else usable_cores()
    with ImageCounter(protocol, workers=workers) as counter:
        for image in itertools.chain(head, images):
            yield from counter.push(image)
        yield from counter.drain()
