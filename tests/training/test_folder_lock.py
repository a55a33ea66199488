"""One writer per folder: who is refused, who is passed over, and what a dead holder leaves."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from ase_dist.commands import train as command
from ase_dist.errors import ExitCode, UserError
from ase_dist.training.process import folder_lock
from ase_dist.training.process.folder_lock import FolderLock
from tests.training.tiny_runs import ROOT

pytestmark = pytest.mark.single_gpu
# Takes the lock argv[1], forks a child that outlives it, says so, and waits.
HOLDER = """
import os, sys, time
from pathlib import Path
from ase_dist.training.process.folder_lock import FolderLock
path = Path(sys.argv[1])
with FolderLock(path, folder=path.parent, doing="training", other="output=FOLDER") as lock:
    lock.take()
    if os.fork() == 0:
        os.closerange(0, 3)
        time.sleep(10)
        os._exit(0)
    print("taken", flush=True)
    sys.stdin.read()
"""


def lock_in(folder):
    return FolderLock(folder / "run.lock", folder=folder, doing="training", other="output=FOLDER")


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run.lock"], cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_start_is_one_sentence_until_the_first_has_died(holder, tmp_path, capsys):
    """Its child lives on, and must not hold the lock."""
    assert command.main([f"output={tmp_path}"]) == ExitCode.USAGE
    sentence = capsys.readouterr().err
    started = json.loads((tmp_path / "run.lock").read_text())
    assert sentence.count("\n") == 1 and f"{str(tmp_path)!r} is in use: process {holder.pid} on " in sentence
    assert f" has been training there since {started['since']}; " in sentence and started["host"] in sentence
    assert {path.name for path in tmp_path.iterdir()} == {"run.lock"}, "the second start wrote into the folder"
    holder.kill()
    holder.wait()
    with lock_in(tmp_path) as lock:
        lock.take()
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert not [*tmp_path.iterdir()]


def test_a_lock_that_is_released_is_free(holder, tmp_path):
    holder.communicate("")
    assert not [*tmp_path.iterdir()]
    for _ in range(2):
        with lock_in(tmp_path) as lock:
            lock.take()
    with lock_in(tmp_path):
        pass  # never taken
    assert not [*tmp_path.iterdir()]


def named_elsewhere(folder):
    elsewhere = {"host": "node7", "boot": "another", "pid": 1, "since": "2026-01-31 12:00:00"}
    (folder / "run.lock").write_text(json.dumps(elsewhere))


@pytest.mark.parametrize("flock", ["free", "held", "unknown"])
@pytest.mark.parametrize("is_alive", [True, False])
def test_another_host_counts_as_alive_while_it_renews_the_file(tmp_path, monkeypatch, is_alive, flock):
    """Whatever ``flock`` says: it may not reach the other host, or be held by a host that has died."""
    monkeypatch.setattr(folder_lock, "PATIENCE", 1.5)
    monkeypatch.setattr(folder_lock, "_try_flock", lambda _: {"free": True, "held": False, "unknown": None}[flock])
    named_elsewhere(tmp_path)
    beat = threading.Timer(0.7, os.utime, [tmp_path / "run.lock"])
    if is_alive:
        beat.start()
    with lock_in(tmp_path) as lock:
        if is_alive:
            with pytest.raises(UserError, match="process 1 on node7 has been training there since 2026-01-31"):
                lock.take()
            assert "node7" in (tmp_path / "run.lock").read_text()
        else:
            lock.take()
            assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    beat.join() if is_alive else None


def test_the_holder_renews_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT", 0.05)
    with lock_in(tmp_path) as lock:
        lock.take()
        before = (tmp_path / "run.lock").stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / "run.lock").stat().st_mtime_ns > before


def test_a_file_that_its_holder_removes_meanwhile_locks_nothing(tmp_path, monkeypatch):
    """The second start has opened it just before; a third one would lock the next file of that name."""
    try_flock, removed = folder_lock._try_flock, []

    def remove_first(descriptor):
        if not removed:
            removed.append((tmp_path / "run.lock").unlink())
        return try_flock(descriptor)

    monkeypatch.setattr(folder_lock, "_try_flock", remove_first)
    with lock_in(tmp_path) as lock:
        lock.take()
        with pytest.raises(UserError, match="is in use"):
            lock_in(tmp_path).take()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b"{}", b'{"host": 1}', b"[" * 5000])
def test_a_lock_file_that_names_nobody_is_of_nobody(tmp_path, content):
    (tmp_path / "run.lock").write_bytes(content)
    with lock_in(tmp_path) as lock:
        lock.take()


def test_what_cannot_be_a_lock_file_is_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "run.lock")
    with pytest.raises(UserError, match=r"run\.lock: got a named pipe"):
        lock_in(tmp_path).take()
    with pytest.raises(UserError, match=r"run\.lock: cannot be locked"):
        lock_in(tmp_path / "none").take()
