"""Running the jobs of packing in this process or in several, and logging the progress."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ase_dist.cores import usable_cores
from ase_dist.data.cache import track_progress
from ase_dist.data.packed.shard import Findings, ShardJob, check, pack
from ase_dist.data.readers import reader_of
from ase_dist.errors import ExitCode, RunError, UserError
from ase_dist.workers import WorkerDiedError, run_calls

FEW = 64  # images that are not worth starting processes for


def run_jobs(
    jobs: Sequence[tuple[ShardJob, str | None]], workers: int | None, *, doing: str, did: str, where: str
) -> list[Findings]:
    """The findings of (job, fingerprint) in the order of the jobs; without a fingerprint a job is checked only.

    ``workers`` None: a process for each core. Raises RunError where one of the processes is killed or stuck.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers: got {workers}, wanted at least 1")
    if not jobs:
        return []
    images = sum(len(job.names) for job, _ in jobs)
    workers = min(workers or usable_cores(), len(jobs))
    if (
        images <= FEW or reader_of(jobs[0][0].data_set or jobs[0][0].data).__module__ == "__main__"
    ):  # which other processes could not import
        workers = 1
    calls = ((number, job, fingerprint) for number, (job, fingerprint) in enumerate(jobs))
    found: dict[int, Findings] = {}

    def counts() -> Iterator[int]:
        try:
            for number, findings in run_calls(do_job, calls, workers=workers, in_order=False):
                found[number] = findings
                yield findings.images
        except WorkerDiedError as error:
            raise RunError(
                f"{error}; the same command goes on, try it with fewer --workers", exit_code=ExitCode.IO_ERROR
            ) from None

    track_progress(counts(), images, doing=doing, did=did, things="images", where=where)
    return [found[number] for number in range(len(jobs))]


def do_job(number: int, job: ShardJob, fingerprint: str | None) -> tuple[int, Findings]:
    """``number`` and the findings of a job."""
    return number, check(job) if fingerprint is None else pack(job, fingerprint)
