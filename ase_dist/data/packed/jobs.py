"""Doing the jobs of packing in this process or in several, with word of how far they are."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from ase_dist.data.cache import cores, track_progress
from ase_dist.data.packed.shard import Findings, Job, check, pack
from ase_dist.errors import UserError
from ase_dist.workers import begin_worker

FEW = 64  # images that are not worth starting processes for


def run_jobs(
    jobs: Sequence[tuple[Job, str | None]], workers: int | None, *, doing: str, did: str, where: str
) -> list[Findings]:
    """Do the jobs, in this process or in several, and tell how far they are; in the order of the jobs."""
    images = sum(len(job.names) for job, _ in jobs)
    if workers is not None and workers < 1:
        raise UserError(f"--workers: got {workers}, wanted at least 1")
    workers = min(workers or cores(), len(jobs)) if images > FEW else 1
    found: dict[int, Findings] = {}

    def finished() -> Iterator[int]:
        for number, findings in _results(jobs, workers):
            found[number] = findings
            yield findings.images

    if jobs:
        track_progress(finished(), images, doing=doing, did=did, things="images", where=where)
    return [found[number] for number in sorted(found)]


def _results(jobs: Sequence[tuple[Job, str | None]], workers: int) -> Iterator[tuple[int, Findings]]:
    if workers <= 1:
        yield from ((number, _do(job, stamp)) for number, (job, stamp) in enumerate(jobs))
        return
    spawn = multiprocessing.get_context("spawn")  # forking a process that has torch loaded is not safe
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker) as pool:
        numbers = {pool.submit(_do, job, stamp): number for number, (job, stamp) in enumerate(jobs)}
        try:
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a packing process ended early, perhaps for want of memory; the same command goes on, "
                "try it with fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _do(job: Job, fingerprint: str | None) -> Findings:
    return check(job) if fingerprint is None else pack(job, fingerprint)


def _start_worker() -> None:
    """One thread each, beside what every worker does."""
    begin_worker()
    torch.set_num_threads(1)
