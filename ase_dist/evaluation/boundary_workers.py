"""Counting images over processes: spawned workers, results in order, at most a few images waiting."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ase_dist.evaluation.boundary_counts import Floats, Protocol, count_image

Image = tuple[int, NDArray[Any], list[NDArray[Any]]]

FEW_IMAGES = 32  # not worth starting processes for (2 s), unless a number of workers is asked for


def pair_images(predictions: Iterable[ArrayLike], ground_truths: Iterable[Iterable[ArrayLike]]) -> Iterator[Image]:
    """(index, prediction, annotators' maps) of each image; ValueError where one of the two ends before the other."""
    left, right = iter(predictions), iter(ground_truths)
    for index in itertools.count():
        prediction, truths = next(left, None), next(right, None)
        if prediction is None and truths is None:
            return
        if prediction is None or truths is None:
            more, fewer = ("ground truths", "predictions") if prediction is None else ("predictions", "ground truths")
            raise ValueError(f"{fewer}: got {index}, but more {more}; wanted one of each per image")
        yield index, np.asarray(prediction), [np.asarray(truth) for truth in truths]


def count_images(images: Iterator[Image], protocol: Protocol, *, workers: int | None) -> Iterator[Floats]:
    """Counts of each image in the order of the images, whatever the number of processes."""
    head = list(itertools.islice(images, FEW_IMAGES)) if workers is None else []
    images = itertools.chain(head, images)
    if workers is None:
        workers = 1 if len(head) < FEW_IMAGES else _cores()
    if workers <= 1:
        return (count_image(*image, protocol) for image in images)
    return _count_in_processes(images, protocol, workers)


def _count_in_processes(images: Iterator[Image], protocol: Protocol, workers: int) -> Iterator[Floats]:
    """Spawned, not forked: a process that has torch loaded holds locks and threads that a fork would break.

    At most two images per worker wait at any time, so a generator of predictions is not read ahead into memory.
    """
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future[Floats]] = deque()
        try:
            for image in images:
                waiting.append(pool.submit(count_image, *image, protocol))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
