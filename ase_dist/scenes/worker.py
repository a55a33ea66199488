"""Rendering into files, in this process or in subprocesses of ``python -m ase_dist.scenes.worker``.

A worker takes its job as JSON from its standard input and writes a line on its standard output for each scene: the
scene's number, or ``error`` and a sentence. It stops by itself when nobody reads those lines any more.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import ase_dist
from ase_dist.scenes.layout import scene_id, write_scene
from ase_dist.scenes.render import render_scene


def render_here(folder: Path, *, seed: int, size: int, numbers: Sequence[int], workers: int = 1) -> Iterator[int]:
    """Render and write the scenes ``numbers`` in this process, giving each number when its files are there."""
    for number in numbers:
        write_scene(folder, scene_id(seed, number), render_scene(seed=seed, index=number, size=size))
        yield number


def render_in_workers(folder: Path, *, seed: int, size: int, numbers: Sequence[int], workers: int) -> Iterator[int]:
    """The same by ``workers`` subprocesses, in no order; the first error of one ends them all and is raised."""
    reading, writing = os.pipe()
    processes = []
    with os.fdopen(reading, encoding="utf-8") as lines:
        try:
            try:
                for start in range(workers):
                    job = {"folder": str(folder), "seed": seed, "size": size, "numbers": list(numbers[start::workers])}
                    processes.append(_start(json.dumps(job), writing))
            finally:
                os.close(writing)  # so that the lines end with the last worker
            done = 0
            for line in lines:
                yield _read(line)
                done += 1
            if done < len(numbers):
                codes = [process.wait() for process in processes]
                raise OSError(errno.ECHILD, f"a rendering process ended early (exit codes {codes})")
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()


def _start(job: str, output: int) -> subprocess.Popen[bytes]:
    package = str(Path(ase_dist.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ase_dist.scenes.worker"]
    # A session of its own: Ctrl-C reaches the parent alone, which then ends its workers.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, env=environment, start_new_session=True)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as handle:  # a worker that died is reported by its absence
        handle.write(job.encode())  # not on the command line, whose length is limited
    return process


def _read(line: str) -> int:
    if line.startswith("error "):
        code, _, sentence = line.removeprefix("error ").strip().partition(" ")
        raise OSError(int(code), sentence)
    return int(line)


def main() -> int:
    """Run one job from standard input; exit code 0, or 1 after an ``error`` line."""
    job = json.loads(sys.stdin.read())
    folder, seed, size = Path(job["folder"]), job["seed"], job["size"]
    try:
        for number in render_here(folder, seed=seed, size=size, numbers=job["numbers"]):
            _write(f"{number}\n")
    except BrokenPipeError:
        return 1
    except OSError as error:
        _write(f"error {error.errno or 0} {error.strerror or error}\n")
        return 1
    return 0


def _write(line: str) -> None:
    """One system call a line, so that the lines of several workers on one pipe do not mix."""
    os.write(sys.stdout.fileno(), line.encode())


if __name__ == "__main__":
    sys.exit(main())
