"""Benchmarks over several processes of this machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from _timing import prepare


def on_ranks(count: int, measure: Callable[..., Any], *arguments: Any) -> Any:
    """What ``measure(*arguments)`` gives on the first of ``count`` gloo ranks of one thread each, through JSON.

    ``measure`` is a function at the top of a module. Ends this process where a rank fails.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that are started
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ranks = [
            context.Process(target=_enter, args=(rank, count, Path(folder), measure, arguments))
            for rank in range(count)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(f"error: exit codes of the ranks: {[process.exitcode for process in ranks]}")
        return json.loads((Path(folder) / "result.json").read_text())


def _enter(rank: int, count: int, folder: Path, measure: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    prepare(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    result = measure(*arguments)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()
