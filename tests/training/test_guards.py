"""Signals only set a flag, non-finite steps are told and counted, silence ends a process that says where it stood."""

import inspect
import json
import math
import os
import platform
import re
import signal
import threading
import time
from unittest import mock

import pytest
import torch

from ase_dist.collectives import barrier
from ase_dist.errors import ExitCode
from ase_dist.stopping import STOPPING
from ase_dist.training.process import watchdog as watchdog_module
from ase_dist.training.process.finite import FiniteGuard, NonFiniteError, all_finite, vote
from ase_dist.training.process.signals import StopFlag
from ase_dist.training.process.watchdog import Watchdog
from ase_dist.training.record.logs import parse_line
from ase_dist.training.state.checkpoint import CheckpointStore
from tests.training.conftest import META, groups, loads, start_world

NAN = float("nan")

# ---------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.single_gpu
@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_sets_the_flag_and_nothing_else(number):
    with StopFlag() as flag:
        assert not flag.requested
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert flag.requested and flag.received == [number.name] * 2


@pytest.mark.single_gpu
def test_the_previous_handlers_come_back():
    before = {number: signal.getsignal(number) for number in STOPPING}
    with pytest.raises(KeyError), StopFlag():
        assert all(signal.getsignal(number) != before[number] for number in before)
        raise KeyError
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.single_gpu
def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not flag.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.single_gpu
def test_only_the_main_thread_may_handle_signals():
    said = []

    def enter():
        try:
            with StopFlag():
                pass
        except ValueError as error:
            said.append(str(error))

    thread = threading.Thread(target=enter, name="helper")
    thread.start()
    thread.join()
    assert said and "entered in thread 'helper', wanted the main thread" in said[0]


@pytest.mark.single_gpu
def test_a_forked_helper_dies_of_sigterm_and_survives_the_others():
    with StopFlag() as flag:
        if (pid := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert not flag.requested


# ---------------------------------------------------------------------------------------------------------------------
# The vote


@pytest.mark.single_gpu
@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("stop", [True, False])
def test_one_rank_votes_for_itself(finite, stop):
    ballot = vote(torch.tensor(finite), stop=stop)
    assert (ballot.finite, ballot.stop) == (finite, stop)


@pytest.mark.single_gpu
def test_voting_waits_for_nothing_and_the_ballot_is_read_once(monkeypatch):
    vote(torch.tensor(True, device="meta"), stop=True)  # no data there: reading any would raise
    reads, real = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(1) or real(tensor))
    ballot = vote(torch.tensor(True), stop=False)
    assert not reads
    assert ballot.finite and not ballot.stop and ballot.finite
    assert len(reads) == 1


@pytest.mark.single_gpu
@pytest.mark.parametrize("bad", [None, NAN, math.inf, -math.inf])
def test_all_finite(bad):
    values = [torch.tensor(1.0), torch.zeros(3, 2), torch.tensor(3e38)]
    if bad is not None:
        values[1][2, 0] = bad
    finite = all_finite(values)
    assert finite.shape == () and finite.dtype == torch.bool and bool(finite) == (bad is None)


# ---------------------------------------------------------------------------------------------------------------------
# Non-finite steps


def take(guard, *losses, step=5):
    values = dict(zip(["semseg", "normals"], map(torch.tensor, losses), strict=True))
    return guard.take_step(
        vote(all_finite(values.values()), stop=False).finite, step=step, values=values, batch=[11, 12]
    )


@pytest.mark.single_gpu
def test_stop_says_step_rank_task_and_batch():
    guard = FiniteGuard()
    assert take(guard, 1.0, 2.0)
    with pytest.raises(NonFiniteError, match=r"step 5 is not finite \(rank 0: normals nan, batch \[11, 12\]\)"):
        take(guard, 1.0, NAN)


@pytest.mark.single_gpu
def test_skip_bears_so_many_in_a_row():
    guard = FiniteGuard(policy="skip", max_skips=2)
    for _ in range(3):  # a finite step between them starts the count again
        assert not take(guard, math.inf, 2.0)
        assert "semseg inf" in guard.report
        assert not take(guard, 1.0, NAN)
        assert take(guard, 1.0, 2.0)
    take(guard, NAN, 2.0), take(guard, NAN, 2.0)
    with pytest.raises(NonFiniteError, match="more than 2 such steps in a row"):
        take(guard, NAN, 2.0)


@pytest.mark.single_gpu
def test_a_finite_step_looks_at_no_value():
    class Unreadable:
        def __getattr__(self, name):
            raise AssertionError("looked at")

    guard = FiniteGuard()
    assert guard.take_step(True, step=1, values=Unreadable(), batch=Unreadable())


@pytest.mark.single_gpu
def test_guards_that_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="policy 'ignore'"):
        FiniteGuard(policy="ignore")
    with pytest.raises(ValueError, match="0 skips"):
        FiniteGuard(max_skips=0)
    with pytest.raises(ValueError, match=r"guard\.timeout: got 0"):
        Watchdog(tmp_path, timeout=0)


@pytest.mark.single_gpu
def test_exit_codes_are_documented():
    documented = {int(code) for code in re.findall(r"^(\d+) ", inspect.getdoc(ExitCode), re.MULTILINE)}
    assert documented == {int(code) for code in ExitCode}


@pytest.mark.single_gpu
def test_a_sign_of_life_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    def slow(path):
        raise AssertionError(f"{path} was brought to disk")

    monkeypatch.setattr("ase_dist.files.fsync", slow)
    with Watchdog(tmp_path, timeout=60) as watchdog:
        watchdog.beat("step 1")
        watchdog._show_life()
        assert json.loads((tmp_path / "rank_0.beat").read_text())["doing"] == "step 1"


# ---------------------------------------------------------------------------------------------------------------------
# Processes: all started at once


def votes(rank, folder):
    """Two ranks, rank 1 alone has a NaN, rank 0 alone is asked to stop; then rank 1 is killed."""
    ballots = []
    for finite, stop in [(True, False), (rank == 0, False), (True, rank == 0), (rank == 0, rank == 0)]:
        ballot = vote(torch.tensor(finite), stop=stop)
        ballots.append([ballot.finite, ballot.stop])
    values = {"depth": torch.tensor(1.0 if rank == 0 else NAN)}
    try:
        FiniteGuard().take_step(
            vote(all_finite(values.values()), stop=False).finite, step=3, values=values, batch=torch.tensor([rank, 7])
        )
    except NonFiniteError as error:
        return [ballots, str(error)]


def bombarded(rank, folder):
    """Signals between any two groups that a save writes, and a thread that sends more all the while."""
    store, is_over = CheckpointStore(folder / "checkpoints", keep=1), threading.Event()

    def send():
        while not is_over.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.001)

    def parts():
        for group in groups(1):
            os.kill(os.getpid(), signal.SIGTERM)
            yield group

    with StopFlag() as flag:
        thread = threading.Thread(target=send)
        thread.start()
        store.save(1, parts(), meta=META)
        is_over.set()
        thread.join()
        code = ExitCode.STOPPED if len(flag.received) > 1 else ExitCode.FAILED
    raise SystemExit(int(code))


def beats_in_time(rank, folder):
    with Watchdog(folder, timeout=2.5) as watchdog:  # far more than two beats are apart, on a busy machine too
        for step in range(60):
            watchdog.beat(f"step {step}")
            time.sleep(0.05)
    time.sleep(3)  # nothing goes off after it was left
    return sorted(path.name for path in folder.iterdir())


def sleeps_past_the_limit(rank, folder):
    with Watchdog(folder, timeout=0.5, on_silence=(folder / "said").write_text) as watchdog:
        watchdog.beat("backward of step 12")
        time.sleep(60)


def holds_the_lock(rank, folder):
    with Watchdog(folder, timeout=1.0) as watchdog:
        watchdog.beat("a search that never yields")
        re.match(r"(a+)+$", "a" * 60 + "b")


def peer_dies(rank, folder):
    with Watchdog(folder, timeout=4.0) as watchdog:
        watchdog.beat("forward of step 4")
        time.sleep(1.5)  # both have shown that they live
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        watchdog.beat("all-to-all of step 4")
        time.sleep(60)


def peer_dies_early(rank, folder):
    """As under NCCL, where a collective with a dead rank raises nothing: long before the limit of a minute."""
    watchdog = Watchdog(folder, timeout=60.0)
    watchdog._interval = 0.2
    with mock.patch.object(watchdog_module, "PEER_GRACE", 1.5), watchdog:
        watchdog.beat("forward of step 4")
        time.sleep(2.0)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(20):  # who goes on is left alone
            watchdog.beat("saving step 4")
            time.sleep(0.2)
        watchdog.beat("all-to-all of step 5")
        time.sleep(40)


def peer_leaves(rank, folder):
    """A rank that has done its work goes, and a file of an earlier attempt names a process that is dead."""
    earlier = {"beats": 1, "doing": "", "host": platform.node(), "pid": 2**22}
    (folder / "rank_2.beat").write_text(json.dumps(earlier))
    with (
        mock.patch.object(watchdog_module, "PEER_GRACE", 0.5),
        mock.patch.object(watchdog_module, "world_size", lambda: 3),
    ):
        watchdog = Watchdog(folder, timeout=60.0)
        watchdog._interval = 0.2
        with watchdog:
            watchdog.beat("the end")
            time.sleep(1.0 if rank else 4.0)


def peer_is_behind(rank, folder):
    with Watchdog(folder, timeout=8.0) as watchdog:
        for step in range(4 if rank == 0 else 2):
            watchdog.beat(f"batch {step}")
        time.sleep(2.5)
        barrier()
        said = watchdog.suspects()
        barrier()  # none leaves before the other has looked
        return said


WORKERS = {
    votes: 2,
    bombarded: 1,
    beats_in_time: 1,
    sleeps_past_the_limit: 1,
    holds_the_lock: 1,
    peer_dies: 2,
    peer_dies_early: 2,
    peer_leaves: 2,
    peer_is_behind: 2,
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folders = {worker: tmp_path_factory.mktemp(worker.__name__) for worker in WORKERS}
    started = {worker: start_world(worker, folders[worker], size=size) for worker, size in WORKERS.items()}
    return {worker: (*finish(), folders[worker]) for worker, finish in started.items()}


@pytest.mark.multi_gpu
def test_all_ranks_get_the_same_vote_and_the_same_report(worlds):
    codes, results, _ = worlds[votes]
    assert codes == [0, 0] and results[0] == results[1]
    assert results[0][0] == [[True, False], [False, False], [True, True], [False, True]]
    assert "rank 1: depth nan, batch [1, 7]" in results[0][1] and "rank 0:" not in results[0][1]


@pytest.mark.single_gpu
def test_signals_while_saving_corrupt_nothing(worlds):
    codes, _, folder = worlds[bombarded]
    assert codes == [ExitCode.STOPPED]
    assert loads(CheckpointStore(folder / "checkpoints", keep=1)) == 1


@pytest.mark.single_gpu
def test_who_beats_is_left_alone(worlds):
    codes, results, _ = worlds[beats_in_time]
    assert codes == [0]
    assert results[0] == ["rank_0.log"], "the beat file goes with the watchdog"


@pytest.mark.single_gpu
def test_silence_ends_the_process_and_says_where(worlds):
    codes, _, folder = worlds[sleeps_past_the_limit]
    log = (folder / "rank_0.log").read_text()
    assert codes == [ExitCode.SILENT]
    assert re.search(r"rank 0 on \S+ has made no progress .* the last thing it began was 'backward of step 12'", log)
    assert "in sleeps_past_the_limit" in log, "the stack of the main thread"
    assert parse_line(log.splitlines()[0]).level == "CRITICAL"
    assert json.loads((folder / "rank_0.beat").read_text())["ended"] == "silent"
    assert "made no progress" in (folder / "said").read_text()


@pytest.mark.single_gpu
def test_a_thread_that_holds_the_lock_is_ended_too(worlds):
    codes, _, folder = worlds[holds_the_lock]
    assert codes == [ExitCode.FAILED]
    assert "in holds_the_lock" in (folder / "rank_0.log").read_text()


@pytest.mark.multi_gpu
def test_a_dead_peer_is_named(worlds):
    codes, _, folder = worlds[peer_dies]
    assert codes == [ExitCode.SILENT, -signal.SIGKILL]
    log = (folder / "rank_0.log").read_text()
    assert re.search(r"rank 1 on \S+ is dead, the last thing it was known to begin is 'forward of step 4'", log)


@pytest.mark.multi_gpu
def test_a_peer_that_died_on_this_host_ends_the_rank_that_waits_for_it(worlds):
    codes, _, folder = worlds[peer_dies_early]
    assert codes == [ExitCode.SILENT, -signal.SIGKILL]
    log = (folder / "rank_0.log").read_text()
    assert re.search(
        r"has made no progress for [1-9] s \(a rank that it may be waiting for is dead\), the last thing it began was "
        r"'all-to-all of step 5'; rank 1 on \S+ is dead",
        log,
    )
    assert "in peer_dies_early" in log, "the stack of the main thread"


@pytest.mark.multi_gpu
def test_a_peer_that_has_left_and_one_of_an_earlier_attempt_end_nobody(worlds):
    assert worlds[peer_leaves][0] == [0, 0]


@pytest.mark.multi_gpu
def test_a_peer_that_is_behind_is_named(worlds):
    codes, results, _ = worlds[peer_is_behind]
    assert codes == [0, 0]
    assert re.search(r"rank 1 on \S+ is behind, the last thing it was known to begin is 'batch 1'", results[0])
    assert results[1] == "no other rank looks dead or behind"


def test_a_watchdog_reads_few_beats_at_a_time_however_large_the_world(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog_module, "world_size", lambda: 4096)
    monkeypatch.setattr(watchdog_module, "rank", lambda: 1001)
    dog, read = Watchdog(tmp_path, timeout=60), []
    here, pids = platform.node(), {rank: 10_000 + rank for rank in range(1000, 1008)}  # eight ranks on this host

    def read_beat(other):
        read.append(other)
        return watchdog_module._Beat(1, "step 1", here if other in pids else "elsewhere", pids.get(other, 1))

    monkeypatch.setattr(dog, "_read_beat", read_beat)
    monkeypatch.setattr(watchdog_module, "is_alive", lambda pid: True)
    assert not dog._has_dead_neighbour() and len(read) == watchdog_module.LOOKS
    assert dog._neighbours == {rank: pid for rank, pid in pids.items() if rank != 1001}
    seen = set(read)
    assert not dog._has_dead_neighbour() and len(read) == 2 * watchdog_module.LOOKS and not seen & set(read[64:])
    monkeypatch.setattr(watchdog_module, "is_alive", lambda pid: pid != pids[1003])
    assert dog._has_dead_neighbour()
