"""The watchdog: ends a run that makes no progress, after logging where it stands and which rank looks dead."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import platform
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

from ase_dist.collectives import rank, world_size
from ase_dist.errors import ExitCode, UserError
from ase_dist.files import read_text, refuse_irregular, write_atomic
from ase_dist.training.process.launcher_watch import is_alive
from ase_dist.training.record.logs import format_line
from ase_dist.training.record.run_folder import RunFolder

STDERR = 2
MISSED = (
    3  # missed beats in a row after which a rank on another host, whose process cannot be inspected, counts as dead
)
GRACE = 10.0  # seconds that a file system gets to write the last report
END_GRACE = 30.0  # seconds that a process gets to end after it has lost a peer
LOOKS = 64  # beats of ranks on hosts that are not known yet, read at a time: the same load at any size of the world
PEER_GRACE = 30.0  # seconds without a beat after a peer has died: with gloo the loop has raised an error by then


class _Beat(NamedTuple):
    """What a rank writes into its beat file."""

    beats: int
    doing: str
    host: str
    pid: int


class Watchdog:
    """Threads that end this process when the main thread has not called ``beat`` for ``timeout`` seconds.

    1. While entered, ``rank_N.beat`` in ``folder`` is kept up to date; the other ranks read it to name who is missing.
    2. When the time is up, one sentence and the stacks of all threads go to ``rank_N.log``, the sentence also to the
       standard error, and the process ends with ``ExitCode.SILENT``. Nothing is saved: the state may be half a step.
    3. The same happens ``PEER_GRACE`` seconds after another rank's process on this host has died, unless the main
       thread goes on: with NCCL the others would wait for the dead one until the time is up.
    4. A main thread that holds Python's lock stops the other threads too; then faulthandler's own timer, after up to
       twice the time, dumps the stacks and ends the process with code 1.

    ``timeout`` must be longer than the longest time between two beats: beat while evaluating, compiling and saving too.
    ``on_silence``, which may be set later, is given the sentence before the process ends, in the watchdog's thread.
    ``folder`` None, for work that writes none, and a folder that cannot be written to: all goes to the standard error.
    Raises UserError where ``timeout`` is not positive.
    """

    def __init__(self, folder: Path | None, *, timeout: float, on_silence: Callable[[str], None] | None = None) -> None:
        if timeout <= 0:
            raise UserError(f"guard.timeout: got {timeout}, wanted more than 0 seconds")
        self.run_folder = None if folder is None else RunFolder(folder)
        self.timeout, self.on_silence = timeout, on_silence
        self._interval = min(timeout / 8, 5.0)
        self._last = (time.monotonic(), 0, "starting")  # replaced as a whole: two threads use it
        self._leaving, self._force_exit_on_close = threading.Event(), False
        self._neighbours: dict[int, int] = {}  # pids of the ranks that were seen alive on this host
        self._elsewhere = {rank()}  # ranks on other hosts, and this one
        # Two threads: a file system that hangs stops the one that writes, not the one that watches.
        loops = {"watchdog": self._watch, "heartbeat": self._pulse}
        self._threads = [threading.Thread(target=loop, name=name, daemon=True) for name, loop in loops.items()]

    def __enter__(self) -> Watchdog:
        self._log = self._open_log()
        self.beat("starting")
        self._show_life()
        self._put_off_last_resort()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        for thread in self._threads:
            thread.join(timeout=GRACE)
        if self.run_folder is not None:
            with contextlib.suppress(OSError):
                self.run_folder.beat(rank()).unlink(missing_ok=True)
        if self._force_exit_on_close:
            # No thread of Python's: it may be in C++ that the process does not come to its end.
            faulthandler.dump_traceback_later(min(END_GRACE, self.timeout), exit=True, file=self._log)
            return
        faulthandler.cancel_dump_traceback_later()
        self._log.close()

    def force_exit_on_close(self) -> None:
        """Once this is left the process has ``END_GRACE`` seconds to end, then it is ended with code 1, stacks dumped.

        For a process that has lost a peer: what gloo has under way with that one can hold up its exit for as long as a
        collective may take.
        """
        self._force_exit_on_close = True

    def beat(self, doing: str) -> None:
        """Say that the main thread is alive and what it begins now, such as "forward of step 12"."""
        self._last = (time.monotonic(), self._last[1] + 1, doing)

    @property
    def patience(self) -> float:
        """Seconds until a rank that has just died counts as dead, on any host: its last beat must be old enough."""
        return min(MISSED * self._interval + 1, self.timeout / 2)

    def suspects(self) -> str:
        """The other ranks that look dead, else those behind this one, with what they did last: for an error's text."""
        if self.run_folder is None:
            return "without a run folder nothing is known of other ranks"
        found = [self._suspicion(other) for other in range(world_size()) if other != rank()]
        clauses = [clause for is_dead, clause in found if is_dead] or [clause for _, clause in found if clause]
        return "; ".join(clauses) or "no other rank looks dead or behind"

    def _open_log(self) -> IO[bytes]:
        if self.run_folder is not None:
            path = self.run_folder.rank_log(rank())
            with contextlib.suppress(OSError):  # what cannot be written to is told by who needs it
                path.parent.mkdir(parents=True, exist_ok=True)
                refuse_irregular(path)
                return path.open("ab", buffering=0)
        return os.fdopen(STDERR, "wb", buffering=0, closefd=False)

    def _watch(self) -> None:
        lost = math.inf  # when a dead peer was seen first
        while not self._leaving.wait(self._interval):
            self._put_off_last_resort()
            since, _, _ = self._last
            if time.monotonic() - since > self.timeout:
                self._end(f"limit {self.timeout:g} s")
            lost = min(lost, time.monotonic()) if self._has_dead_neighbour() else math.inf
            if time.monotonic() - max(since, lost) > PEER_GRACE:
                self._end("a rank that it may be waiting for is dead")

    def _has_dead_neighbour(self) -> bool:
        """Whether a rank that was seen alive on this host has died; one that left has removed its beat file.

        Ranks whose host is not known yet are looked at in the order of their distance: launchers number those of a host
        one after the other.
        """
        looks = 0
        for other in sorted(set(range(world_size())) - self._elsewhere, key=lambda other: abs(other - rank())):
            pid = self._neighbours.get(other)
            if pid is not None and is_alive(pid):
                continue
            looks += pid is None
            if pid is None and looks > LOOKS:
                continue
            beat = self._read_beat(other)
            if beat is None:  # it has not started, or has left
                continue
            if beat.pid == pid:
                return True
            if beat.host != platform.node():
                self._elsewhere.add(other)
            elif is_alive(beat.pid):  # else the file of an earlier attempt
                self._neighbours[other] = beat.pid
        return False

    def _put_off_last_resort(self) -> None:
        """Set faulthandler's timer anew: it needs no lock of Python's, and goes off when this is no longer called."""
        faulthandler.dump_traceback_later(self.timeout, exit=True, file=self._log)

    def _pulse(self) -> None:
        while not self._leaving.wait(self._interval):
            self._show_life()

    def _end(self, why: str) -> None:
        last_resort = threading.Timer(GRACE, os._exit, [ExitCode.SILENT])  # where writing the report hangs as well
        last_resort.daemon = True
        last_resort.start()
        since, _, doing = self._last
        stacks = "above" if self._log.fileno() == STDERR else f"in {self._log.name}"
        sentence = (
            f"rank {rank()} on {platform.node()} has made no progress for {time.monotonic() - since:.0f} s ({why}), "
            f"the last thing it began was {doing!r}; {self.suspects()}; stacks are {stacks}"
        )
        with contextlib.suppress(OSError):  # the disk may be full
            # Not through logging: the main thread may be stuck with its lock.
            self._log.write(format_line(rank(), "CRITICAL", sentence).encode())
            faulthandler.dump_traceback(file=self._log, all_threads=True)
            os.fsync(self._log.fileno())
        self._show_life(ended="silent")
        if select.select([], [STDERR], [], 1.0)[1]:  # not into a full pipe: that would block
            os.write(STDERR, f"{sentence}\n".encode())
        if self.on_silence is not None:
            self.on_silence(sentence)
        os._exit(ExitCode.SILENT)

    def _show_life(self, **more: str) -> None:
        if self.run_folder is None:
            return
        _, beats, doing = self._last
        beat = _Beat(beats, doing, platform.node(), os.getpid())
        with contextlib.suppress(OSError):  # a full disk is reported by the next save
            write_atomic(self.run_folder.beat(rank()), json.dumps(beat._asdict() | more), durable=False)

    def _read_beat(self, other: int) -> _Beat | None:
        """The last sign of life of a rank; None where there is none."""
        if self.run_folder is None:
            return None
        try:
            state = json.loads(read_text(self.run_folder.beat(other)))
            return _Beat(int(state["beats"]), str(state["doing"]), str(state["host"]), int(state["pid"]))
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def _suspicion(self, other: int) -> tuple[bool, str]:
        """Whether another rank looks dead, and a clause about it; an empty one where it is as far as this one."""
        beat = self._read_beat(other)
        if beat is None or self.run_folder is None:
            return True, f"rank {other} has not started, has left, or writes its beats elsewhere"
        who, last = f"rank {other} on {beat.host}", f"the last thing it was known to begin is {beat.doing!r}"
        if beat.host == platform.node() and not is_alive(beat.pid):
            return True, f"{who} is dead, {last}"
        # Both times are the file server's: the clocks of two nodes may differ.
        own, theirs = (_changed_at(self.run_folder.beat(each)) for each in (rank(), other))
        if own - theirs > MISSED * self._interval:
            return True, f"{who} gave no sign of life for {own - theirs:.0f} s, {last}"
        return False, f"{who} is behind, {last}" if beat.beats < self._last[1] else ""


def _changed_at(path: Path) -> float:
    """Time of the file's last change in seconds; 0 where it has just been removed."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
