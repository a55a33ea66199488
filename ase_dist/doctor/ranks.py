"""Two real ranks on this machine add up a tensor: do they meet, is the sum right, how long does it take."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta

from ase_dist.errors import RunError

VALUES = 1 << 20  # of the tensor: 4 MiB
REPEATS = 5
COMMAND = (
    "import sys; sys.path[:] = sys.argv[4:]; from ase_dist.doctor.ranks import rank; "
    "rank(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))"
)


def add_up(backend: str, *, timeout: float) -> str:
    """What was measured, in words. Raises RunError where a rank fails, or has not ended after ``timeout`` seconds."""
    from ase_dist.training.process.runtime import free_port

    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(number), backend, str(timeout), *sys.path],
            env={**environment, "RANK": str(number), "LOCAL_RANK": str(number), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    deadline, said = time.monotonic() + 0.9 * timeout, ""
    try:
        for number, process in enumerate(ranks):
            told, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            if process.returncode:
                last = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
                raise RunError(f"rank {number}: {last}")
            said = said or told.strip().splitlines()[-1]
    except subprocess.TimeoutExpired:
        raise RunError(f"rank {number} had not ended after {0.9 * timeout:.0f} s") from None
    finally:
        for process in ranks:
            process.kill()
    return said


def rank(number: int, backend: str, timeout: float) -> None:
    """One of the two: join, add up, compare with the known sum, print the times."""
    import torch
    import torch.distributed as dist

    from ase_dist import collectives

    device = torch.device("cuda", number) if backend == "nccl" else torch.device("cpu")
    began = time.perf_counter()
    dist.init_process_group(backend, rank=number, world_size=2, timeout=timedelta(seconds=0.8 * timeout))
    x = torch.arange(VALUES, dtype=torch.float32, device=device) % 1000 + number
    wanted = 2 * (torch.arange(VALUES, dtype=torch.float32, device=device) % 1000) + 1
    seconds = []
    joined = time.perf_counter() - began
    for _ in range(REPEATS):
        began = time.perf_counter()
        if not torch.equal(collectives.all_reduce_sum(x), wanted):
            raise SystemExit("the sum over two ranks is wrong")
        seconds.append(time.perf_counter() - began)
    dist.destroy_process_group()
    best = min(seconds)
    sys.stdout.write(
        f"met in {joined:.1f} s, 4 MiB added up in {best * 1e3:.1f} ms ({4 * VALUES / best / 1e9:.1f} GB/s)\n"
    )
