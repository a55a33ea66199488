"""The start of a process: ranks that do not come, half a launcher, and locks that a killed compilation has left."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch.distributed as dist
from torch.utils import cpp_extension

from ase_dist.commands import train as command
from ase_dist.errors import ExitCode, RunError, UserError
from ase_dist.training.process import runtime
from ase_dist.training.process.folder_lock import FolderLock
from ase_dist.training.process.runtime import join
from tests.conftest import LAUNCHER
from tests.training.conftest import start_world

# ---------------------------------------------------------------------------------------------------------------------
# Ranks that do not come


def alone(rank, folder):
    """Both processes are told of a world of two, but they wait for each other at different places."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_PORT": str(runtime.free_port())})
    errors, sys.stderr = sys.stderr, (folder / f"said_by_{rank}").open("w")
    began = time.monotonic()
    code = command.main([f"output={folder / 'run'}", "guard.timeout=3"])
    sys.stderr.close()
    sys.stderr = errors
    return [code, (folder / f"said_by_{rank}").read_text(), time.monotonic() - began]


@pytest.fixture(scope="module")
def lonely(tmp_path_factory):
    """Two worlds of one process each: rank 0 waits for rank 1, rank 1 for rank 0."""
    folder = tmp_path_factory.mktemp("alone")
    started = [start_world(worker, folder / worker.__name__) for worker in (rank_0_alone, rank_1_alone)]
    return [finish().results[0] for finish in started]


def rank_0_alone(rank, folder):
    return alone(0, folder)


def rank_1_alone(rank, folder):
    return alone(1, folder)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_a_rank_that_never_joins_ends_with_a_sentence(lonely, rank):
    code, said, seconds = lonely[rank]
    assert code == ExitCode.SILENT and seconds < 30
    assert re.fullmatch(
        rf"error: rank {rank} of 2 could not join the others at 127\.0\.0\.1:\d+ within 3 s \(.+\); "
        r"a rank that ended before it joined says why in its own output\n",
        said.splitlines(keepends=True)[-1],
    )
    assert "Traceback" not in said


def port_is_taken(rank, folder):
    """Rank 0 is to open the meeting point where another program listens already."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ["MASTER_PORT"] = str(other.getsockname()[1])
        began, said = time.monotonic(), []
        for enter in (lambda: runtime.start(timeout=100, threads=1), lambda: join(device="cpu").__enter__()):
            try:
                enter()
            except UserError as error:
                said.append(str(error))
        return [said, time.monotonic() - began]


@pytest.mark.multi_gpu
def test_a_port_in_use_is_told_at_once(tmp_path):
    ((said, seconds),) = start_world(port_is_taken, tmp_path)().results
    assert len(said) == 2 and seconds < 30
    for sentence in said:
        assert re.search(r"rank 0: port \d+, at which the ranks are to meet, is in use on", sentence)
        assert "\n" not in sentence and "--master_port" in sentence


def refused(rank, folder, port):
    """The disk is full for rank 0, before there is a group."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})

    def full(lock):
        assert rank == 0
        raise RunError("run.lock: cannot be locked (No space left on device)", exit_code=ExitCode.NOT_SAVED)

    with (
        mock.patch.object(FolderLock, "take", full),
        (folder / "said").open("w") as said,
        contextlib.redirect_stderr(said),
    ):
        code = command.main([f"output={folder.parent / 'run'}", "guard.timeout=60"])
    return [code, (folder / "said").read_text().splitlines()[-1]]


def refused_rank_0(rank, folder):
    return refused(0, folder, (folder.parent / "port").read_text())


def refused_rank_1(rank, folder):
    return refused(1, folder, (folder.parent / "port").read_text())


@pytest.mark.multi_gpu
def test_what_stops_rank_0_before_it_joins_ends_all_ranks_with_its_sentence(tmp_path):
    (tmp_path / "port").write_text(str(runtime.free_port()))
    worlds = [start_world(worker, tmp_path / worker.__name__) for worker in (refused_rank_0, refused_rank_1)]
    said = "error: rank 0: run.lock: cannot be locked (No space left on device)"
    assert [world().results for world in worlds] == [[[ExitCode.NOT_SAVED, said]]] * 2


def listener_is_silent(rank, folder):
    """Another program takes the connection of rank 1 and says nothing."""
    runtime.JOIN_GRACE = 2
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ["MASTER_PORT"] = str(other.getsockname()[1])
        sys.stderr = (folder / "said").open("w")
        runtime.start(timeout=2, threads=1)


@pytest.mark.multi_gpu
def test_a_silent_listener_ends_with_a_sentence(tmp_path):
    began = time.monotonic()
    assert start_world(listener_is_silent, tmp_path, seconds=50)().codes == [ExitCode.SILENT]
    assert re.fullmatch(
        r"error: rank 1 of 2 could not join the others at 127\.0\.0\.1:\d+ within 2 s \(.+\); a rank that ended .+\n",
        (tmp_path / "said").read_text(),
    )
    assert time.monotonic() - began < 50


def half_launched(rank, folder):
    for name in LAUNCHER:
        os.environ.pop(name, None)
    os.environ["RANK"] = "1"
    try:
        runtime.start(timeout=5, threads=1)
    except ValueError as error:
        return str(error)


@pytest.mark.single_gpu
def test_half_a_launcher_is_refused(tmp_path):
    (said,) = start_world(half_launched, tmp_path)().results
    assert "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing, though RANK" in said


# ---------------------------------------------------------------------------------------------------------------------
# A command without an engine


def unlaunched(rank, folder):
    for name in LAUNCHER:
        os.environ.pop(name, None)
    with join(device="cpu") as world:
        return [world.rank, world.size, world.local_size, str(world.device), world.is_first, dist.is_initialized()]


@pytest.mark.single_gpu
@pytest.mark.parametrize("end", ["raise KeyboardInterrupt", "sys.exit(2)", "pass"])
def test_a_process_leaves_its_group_of_one_in_the_end(end):
    """NCCL would end the output with a warning, behind the one sentence."""
    program = (
        "import atexit, sys; import torch.distributed as dist\n"
        "atexit.register(lambda: print(dist.is_initialized()))\n"  # after what is registered later
        f"from ase_dist.training.process import runtime; runtime.start(timeout=60, threads=1); {end}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_alone_there_is_no_group(tmp_path):
    assert start_world(unlaunched, tmp_path)().results == [[0, 1, 1, "cpu", True, False]]


# ---------------------------------------------------------------------------------------------------------------------
# Locks of compilations

LOCK_AND_DIE = """
import os, sys
from torch.utils import cpp_extension
from torch.utils._filelock import FileLock
with FileLock(sys.argv[1]):
    os.kill(os.getpid(), 9)
"""


@pytest.fixture(params=["the variable's folder", "the default folder"])
def lock(request, tmp_path, monkeypatch):
    """Where torch's lock for the op cpu_adam lies."""
    if request.param == "the default folder":
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path))
        path = tmp_path / "py312_cpu" / "cpu_adam" / "lock"
    else:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        path = tmp_path / "cpu_adam" / "lock"
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.single_gpu
def test_a_lock_file_that_blocks_is_named(lock, monkeypatch):
    monkeypatch.setattr(cpp_extension, "FileBaton", object, raising=False)  # as in a torch that waits for the file
    assert not runtime.build_locks()
    lock.touch()
    os.utime(lock, (time.time() - 1200,) * 2)
    (said,) = runtime.build_locks()
    assert said.startswith(f"{lock} has been there for 20 min: a start that needs cpu_adam waits until it is gone")


@pytest.mark.single_gpu
@pytest.mark.skipif(hasattr(cpp_extension, "FileBaton"), reason="this torch waits for the file to go")
def test_a_lock_that_dies_with_its_holder_is_not_mentioned(lock):
    from torch.utils._filelock import FileLock

    killed = subprocess.run([sys.executable, "-c", LOCK_AND_DIE, lock], capture_output=True, check=False)
    assert killed.returncode == -9 and lock.exists()
    with FileLock(str(lock), timeout=0.5):  # would raise where a dead process still held it
        assert not runtime.build_locks()
