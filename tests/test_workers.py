"""The pool of worker processes: results, order, how far it reads ahead, errors, deaths, signals and ends."""

import functools
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import psutil
import pytest

from ase_dist import workers
from ase_dist.cores import share_of_cores, usable_cores
from ase_dist.data.packed import jobs
from ase_dist.errors import ExitCode, RunError, UserError
from ase_dist.scenes import make
from ase_dist.workers import WorkerDiedError, WorkerPool, run_calls

pytestmark = pytest.mark.single_gpu


def is_running(pid):
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_ends(pids, seconds=30):
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_running, pids))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_or_all_the_same(workers):
    calls = [(number, 2) for number in range(20)]
    expected = [number**2 for number in range(20)]
    assert list(run_calls(pow, calls, workers=workers)) == expected
    assert sorted(run_calls(pow, calls, workers=workers, in_order=False)) == expected


def test_in_order_is_not_as_they_are_ready():
    calls = [(1.0,), (0.0,), (0.0,)]
    with WorkerPool(2) as pool:
        list(pool.map(time.sleep, [(0.0,), (0.0,)]))  # both have started
        began = time.monotonic()
        ready = pool.map(time.sleep, calls, in_order=False)
        next(ready)
        assert time.monotonic() - began < 0.9
        list(ready)
        began = time.monotonic()
        next(pool.map(time.sleep, calls))
        assert time.monotonic() - began > 0.9


def test_calls_are_read_two_ahead_of_each_worker():
    read = []

    def calls():
        for number in range(100):
            read.append(number)
            yield (number,)

    results = run_calls(abs, calls(), workers=2)
    assert next(results) == 0 and len(read) <= 4
    assert next(results) == 1 and len(read) <= 5
    results.close()


def test_large_arguments_and_results():
    blob = os.urandom(20_000_000)
    with WorkerPool(2) as pool:
        futures = [pool.submit(bytes, blob) for _ in range(4)]
        assert all(future.result() == blob for future in futures)


def test_what_a_worker_raises_is_raised_here_with_where(tmp_path):
    with WorkerPool(2) as pool:
        with pytest.raises(FileNotFoundError) as raised:
            pool.submit(os.listdir, str(tmp_path / "absent")).result()
        assert raised.value.errno == 2 and "Traceback" in str(raised.value.__cause__)
        with pytest.raises(UserError, match=r"^a sentence$"):
            pool.submit(raise_user_error, "a sentence").result()
        with pytest.raises(RuntimeError, match="UnpicklableError: 3"):
            pool.submit(raise_unpicklable).result()
        assert pool.submit(abs, -1).result() == 1  # and it goes on


def raise_user_error(text):
    raise UserError(text)


def raise_unpicklable():
    class UnpicklableError(Exception):
        pass

    raise UnpicklableError(3)


def test_a_dead_worker_is_one_sentence():
    said = r"^a worker process ended early \(exit code 3\), perhaps because memory ran out$"
    with WorkerPool(2) as pool, pytest.raises(WorkerDiedError, match=said):
        pool.submit(os._exit, 3).result()
    with WorkerPool(1) as pool:
        pool.submit(abs, 1).result()
        waiting = pool.submit(time.sleep, 60)
        for process in pool.processes:
            process.kill()
        with pytest.raises(WorkerDiedError, match="exit code"):
            waiting.result(timeout=30)


def test_a_worker_that_hangs_is_one_sentence_and_does_not_hold_up_the_end():
    said = r"^a worker process gave no answer for 0\.5 s, perhaps because a file system hangs$"
    with WorkerPool(2, patience=0.5) as pool:
        began = time.monotonic()
        with pytest.raises(WorkerDiedError, match=said):
            pool.submit(time.sleep, 60).result(timeout=30)
        assert time.monotonic() - began < 10
    assert all(process.poll() is not None for process in pool.processes)


@pytest.mark.parametrize(
    ("end", "patience", "said"), [(os._exit, 60, r"\(exit code 5\)"), (time.sleep, 0.5, "gave no answer for 0.5 s")]
)
def test_packing_and_rendering_end_with_a_sentence_where_a_worker_does(end, patience, said, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", patience)
    monkeypatch.setattr(make, "make_scene", functools.partial(end_with, end))
    monkeypatch.setattr(jobs, "do_job", functools.partial(end_with, end))
    sentence = rf"^cannot make the generated scenes in .*: a worker process .*{said}"
    with pytest.raises(RunError, match=sentence) as raised:
        make.ensure_scenes(tmp_path, train=8, val=8, size=32, seed=0, workers=2)
    assert raised.value.exit_code is ExitCode.IO_ERROR and not [*tmp_path.glob("scenes*")]
    job = mock.Mock(names=["a"] * 100, data_set=None, data="pascal_context")
    monkeypatch.setattr(jobs, "run_calls", lambda function, calls, **how: run_calls(function, [(1,), (2,)], **how))
    with pytest.raises(RunError, match=rf"^a worker process .*{said}.*; the same command goes on") as raised:
        jobs.run_jobs([(job, None)] * 2, 2, doing="packing", did="packed", where="here")
    assert raised.value.exit_code is ExitCode.IO_ERROR


def end_with(end, *arguments):
    end(5)


def test_closing_is_quick_and_leaves_no_process():
    pool = WorkerPool(2)
    list(pool.map(abs, [(1,)] * 4))
    futures = [pool.submit(time.sleep, 60) for _ in range(5)]
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 5
    assert all(process.poll() is not None for process in pool.processes)
    assert all(future.done() for future in futures)
    pool.close()  # again is nothing


def test_leaving_early_ends_the_workers():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    results = run_calls(abs, ((i,) for i in range(1000)), workers=2)
    next(results)
    assert {child.pid for child in psutil.Process().children()} - before
    results.close()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


PARENT = """
import os, sys, time
from ase_dist.workers import WorkerPool

pool = WorkerPool(2)
list(pool.map(time.sleep, [(0.1,)] * 4))
print(*(process.pid for process in pool.processes), flush=True)
sys.stdin.readline()
print(sum(pool.map(abs, [(1,)] * 6)), flush=True)
busy = [pool.submit(time.sleep, 600) for _ in range(2)]
time.sleep(600)
"""


def test_workers_ignore_signals_and_end_with_their_parent_even_while_busy(tmp_path):
    """No main guard either: a worker does not run the script."""
    script = tmp_path / "script.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        workers = parent.stdout.readline().split()
        for pid in workers:
            for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(int(pid), name)
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.stdout.readline().strip() == "6" and len(workers) == 2
        time.sleep(0.3)  # both are busy
    finally:
        parent.kill()
        parent.wait()
    assert wait_for_ends(workers)


def test_a_program_that_does_not_close_its_pool_ends(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from ase_dist.workers import WorkerPool\npool = WorkerPool(2)\n"
        "print(list(pool.map(abs, [(-1,), (2,)])), flush=True)\nraise SystemExit(7)\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "[1, 2]\n", "")


def test_a_module_in_the_current_folder_is_not_taken_for_another(tmp_path):
    (tmp_path / "fractions.py").write_text("raise SystemExit('the wrong one')")
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(
        "import fractions\nfrom ase_dist.workers import run_calls\n"
        "print(list(run_calls(fractions.Fraction, [(1, 2)] * 2, workers=2)))\n"
    )
    command = [sys.executable, str(script)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == "[Fraction(1, 2), Fraction(1, 2)]\n", ended.stderr


def test_a_worker_loads_no_torch():
    with WorkerPool(1) as pool:
        assert pool.submit(eval, "'torch' in __import__('sys').modules").result() is False


def test_cores_are_shared_among_processes():
    assert share_of_cores(1) == usable_cores() >= share_of_cores(2) >= share_of_cores(10**6) == 1
