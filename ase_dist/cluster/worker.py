"""A worker's container: an ssh server until the container is stopped, and then time for the ranks to save."""

from __future__ import annotations

import contextlib
import logging
import platform
import signal
import subprocess
from pathlib import Path
from types import FrameType

import psutil

from ase_dist.cluster.facts import devices
from ase_dist.cluster.hostfile import Node
from ase_dist.cluster.peers import register
from ase_dist.cluster.ssh import SERVER

RANK = "LOCAL_RANK"  # the variable that deepspeed and torchrun give to ranks and have not themselves
LOGGER = logging.getLogger("ase_dist")


def serve(config: Path, notes: Path | None, *, slots: int | None, grace: float) -> int:
    """Serve ssh until SIGTERM or SIGINT; then ranks are asked to stop and get ``grace`` seconds to save. Exit code.

    ``notes`` is the folder in which this worker says that it is there; None where the hostfile comes from elsewhere.
    They are no children of the server's group, so that the container's signal does not reach them by itself.
    """
    server = subprocess.Popen([SERVER, "-D", "-e", "-f", str(config)])
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        end_ranks(grace=grace)
        server.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    note = register(notes, Node(platform.node(), slots or max(1, devices()))) if notes else None
    LOGGER.info("%s serves ssh and waits for the launcher", platform.node())
    try:
        code = server.wait()
    finally:
        if note is not None:
            note.unlink(missing_ok=True)
    return 0 if stopped else code


def end_ranks(*, grace: float) -> int:
    """Send SIGTERM to every process of this container that a launcher made a rank, and wait; how many there were.

    Not to what a rank has started itself, such as loader processes: it ends those when it has saved.
    """
    found = [process for process in psutil.process_iter() if _is_rank(process)]
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(found, timeout=grace)
    if alive:
        LOGGER.warning("%d of %d ranks did not end within %g s", len(alive), len(found), grace)
    return len(found)


def _is_rank(process: psutil.Process) -> bool:
    try:
        parent = process.parent()
        return RANK in process.environ() and (parent is None or RANK not in parent.environ())
    except psutil.Error:
        return False
