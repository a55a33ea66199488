"""How runs end that something stops: a bug keeps its traceback, a mistake is one sentence, and all ranks end."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from ase_dist import agreement, collectives
from ase_dist.agreement import RankError, on_every_rank, raise_together, require_same_on_ranks
from ase_dist.commands import train as command
from ase_dist.data.loader import TrainLoader
from ase_dist.errors import ExitCode, RunError, UserError
from ase_dist.models.heads import LinearHead
from ase_dist.registries import HEADS
from ase_dist.training.state.checkpoint import shards
from tests.training.conftest import start_world
from tests.training.tiny_runs import ROOT, TINY, before_step, checkpoint

TRAIN = str(ROOT / "launch" / "train.py")
LINE_OF_THE_BUG = "a, b = tokens_BPD.shape"


class BadHead(LinearHead):
    """Someone's head with a bug."""

    def forward(self, tokens_BPD):
        a, b = tokens_BPD.shape
        return tokens_BPD.view(a, b)


def fails_on_last_rank(error):
    """A head that cannot be built on the last rank."""

    def build(*arguments, **options):
        if collectives.rank() == collectives.world_size() - 1:
            raise error
        return LinearHead(*arguments, **options)

    return build


HEADS_THAT_FAIL = {
    "user_error": fails_on_last_rank(UserError("the head wants more patches")),
    "bug": fails_on_last_rank(ValueError("too many values")),
    "io_error": fails_on_last_rank(OSError(errno.EIO, os.strerror(errno.EIO), "/net/weights")),
    "full_disk": fails_on_last_rank(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "forward": BadHead,
}


@contextlib.contextmanager
def stderr_in(path):
    """Everything that this process writes to its standard error goes to ``path`` meanwhile."""
    before = os.dup(2)
    with path.open("w") as file, contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


@contextlib.contextmanager
def loader_dies_before_step(step):
    """The loader reads on itself, as it does where its processes have died."""
    dead = RunError("data.workers: a loader process has died", exit_code=ExitCode.IO_ERROR)
    failure = mock.PropertyMock(return_value=None)
    with (
        mock.patch.object(TrainLoader, "failure", failure),
        before_step({step: lambda batch: setattr(failure, "return_value", dead)}),
    ):
        yield


def runs_that_fail(rank, folder):
    """The exit codes; what was said lies in ``folder``."""
    options = [
        *TINY,
        f"data.root={(folder / 'scenes').read_text()}",
        f"train.batch_size={4 // collectives.world_size()}",
    ]
    codes = {}

    def train(name, *more):
        with stderr_in(folder / f"{name}_{rank}.err"):
            codes[name] = command.main([*options, f"output={folder / name}", *more])

    def no_file(*arguments, **more):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with mock.patch.object(shards, "fsync", no_file) if rank == 0 else contextlib.nullcontext():
        train("stale_save")
    with loader_dies_before_step(2) if rank == collectives.world_size() - 1 else contextlib.nullcontext():
        train("loader", "checkpoint.every=0")
    for name, head in HEADS_THAT_FAIL.items():
        HEADS[name] = head
        train(name, f"model.head={name}")
    return codes


class Ended:
    """What the ranks of a world that failed have left behind."""

    def __init__(self, folder, codes):
        self.folder, self._codes = folder, codes
        self.ranks = range(len(codes))

    def codes(self, name):
        return [codes[name] for codes in self._codes]

    def terminal(self, name, rank):
        return (self.folder / f"{name}_{rank}.err").read_text()

    def logs(self, name, rank):
        files = ["train.log", "rank_0.log"] if rank == 0 else [f"rank_{rank}.log"]
        return [(self.folder / name / file).read_text() for file in files]


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=pytest.mark.single_gpu), pytest.param(2, marks=pytest.mark.multi_gpu)]
)
def ended(request, scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"ended_{request.param}")
    (folder / "scenes").write_text(str(scenes))
    world = start_world(runs_that_fail, folder, size=request.param, seconds=200)()
    assert world.codes == [0] * request.param
    return Ended(folder, world.results)


def test_a_bug_in_a_custom_head_has_its_traceback_everywhere_once(ended):
    assert set(ended.codes("forward")) == {ExitCode.FAILED}
    for rank in ended.ranks:
        for said in [ended.terminal("forward", rank), *ended.logs("forward", rank)]:
            assert said.count(LINE_OF_THE_BUG) == 1 and said.count("Traceback (most recent call last)") == 1
            assert "too many values to unpack (expected 2)" in said and Path(__file__).name in said


def test_a_bug_on_one_rank_has_its_traceback_there_and_ends_the_others_with_a_sentence(ended):
    last = ended.ranks[-1]
    assert set(ended.codes("bug")) == {ExitCode.FAILED}
    for said in [ended.terminal("bug", last), *ended.logs("bug", last)]:
        assert said.count("Traceback (most recent call last)") == 1 and "ValueError: too many values" in said
        assert "in fails_on_last_rank" not in said and "raise error" in said
    if last == 1:
        sentence = "rank 1 ended with ValueError: too many values; its traceback is in its own log"
        assert (
            ended.terminal("bug", 0).endswith(f"\nerror: {sentence}\n")
            or ended.terminal("bug", 0) == f"error: {sentence}\n"
        )
        for said in [ended.terminal("bug", 0), *ended.logs("bug", 0)]:
            assert sentence in said and "Traceback" not in said


def test_a_users_mistake_is_the_same_sentence_on_all_ranks(ended):
    assert set(ended.codes("user_error")) == {ExitCode.USAGE}
    sentence = ("" if len(ended.ranks) == 1 else "rank 1: ") + "the head wants more patches"
    for rank in ended.ranks:
        assert ended.terminal("user_error", rank).splitlines()[-1] == f"error: {sentence}"
        for said in [ended.terminal("user_error", rank), *ended.logs("user_error", rank)]:
            assert "Traceback" not in said and sentence in said


def test_a_run_that_loses_a_loader_process_saves_and_ends_with_its_code(ended):
    assert set(ended.codes("loader")) == {ExitCode.IO_ERROR}
    assert checkpoint(ended.folder / "loader", 2)
    said = ("" if len(ended.ranks) == 1 else "rank 1: ") + "data.workers: a loader process has died"
    for rank in ended.ranks:
        assert ended.terminal("loader", rank).splitlines()[-1] == f"error: {said}"


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("io_error", ExitCode.IO_ERROR, "Input/output error: /net/weights"),
        ("full_disk", ExitCode.NOT_SAVED, "No space left on device"),
        ("stale_save", ExitCode.IO_ERROR, "the checkpoint of step 3 was not saved: rank 0: could not write "),
    ],
)
def test_a_file_system_that_fails_is_a_sentence_and_a_code(ended, name, code, words):
    assert set(ended.codes(name)) == {code}
    for rank in ended.ranks:
        for said in [ended.terminal(name, rank), *ended.logs(name, rank)]:
            assert words in said


@pytest.mark.single_gpu
def test_ctrl_c_before_the_loop_is_one_line(scenes, tmp_path):
    """While the model and the engine are built; in the loop it is a signal like the others."""
    options = [*TINY, f"data.root={scenes}", f"output={tmp_path / 'run'}", "train.max_steps=1000000"]
    log = tmp_path / "said"
    with log.open("w") as said:
        run = subprocess.Popen([sys.executable, TRAIN, *options], stderr=said, stdout=said, cwd=ROOT)
    while not (tmp_path / "run" / "train.log").exists():
        assert run.poll() is None, log.read_text()
        time.sleep(0.001)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=100) == ExitCode.INTERRUPTED
    assert "Traceback" not in log.read_text() and log.read_text().splitlines()[-1] == "error: interrupted"


# ---------------------------------------------------------------------------------------------------------------------
# Agreement


def agreements(rank, folder):
    """What this rank heard, and how many objects it has gathered for it."""

    def heard(work):
        try:
            return work()
        except (RuntimeError, ValueError) as error:
            return [type(error).__name__, str(error), int(getattr(error, "exit_code", 0)), repr(error.__cause__)]

    def fails(error):
        if rank == 1:
            raise error
        return "fine"

    many = {f"fact {i}": "x" * 100 for i in range(1000)}
    gathered = []
    real = collectives.gather_objects
    with mock.patch.object(agreement, "gather_objects", lambda value: gathered.append(len(str(value))) or real(value)):
        same = heard(lambda: require_same_on_ranks(many))
    return {
        "same": [same, sum(gathered) < 200],
        "equal": heard(lambda: require_same_on_ranks({"lr": 1 if rank else 1.0})),
        "other": heard(lambda: require_same_on_ranks({"lr": rank, "seed": rank, "k": 3})),
        "missing": heard(lambda: require_same_on_ranks({"k": 3} | ({"new": 1} if rank else {}))),
        "fine": heard(lambda: raise_together(lambda: f"mine {rank}")),
        "all": heard(lambda: on_every_rank(lambda: rank)),
        "told": heard(lambda: on_every_rank(lambda: fails(RunError("full", exit_code=ExitCode.NOT_SAVED)))),
        "bug": heard(lambda: on_every_rank(lambda: fails(TypeError("x")))),
        "both": heard(lambda: raise_together(lambda: both(rank))),
    }


def both(rank):
    """A user's mistake on rank 0 and a bug on rank 1."""
    raise UserError("a mistake") if rank == 0 else ValueError("a bug")


@pytest.mark.multi_gpu
def test_agreement(tmp_path):
    first, second = start_world(agreements, tmp_path, size=2)().results
    assert first["same"] == second["same"] == [None, True], "1000 facts that are the same cross as a hash"
    assert first["equal"] is None and second["equal"] is None
    words = "rank 0 and rank 1 differ in lr: 0 and 1 (1 more differ); start all ranks alike"
    assert first["other"] == second["other"] == ["UserError", words, 0, "None"]
    assert first["missing"] == second["missing"]
    assert first["missing"][1] == "rank 0 and rank 1 differ in new: None and 1; start all ranks alike"
    assert (first["fine"], second["fine"]) == ("mine 0", "mine 1")
    assert first["all"] == second["all"] == [0, 1]
    assert first["told"][:3] == second["told"][:3] == ["RankError", "rank 1: full", ExitCode.NOT_SAVED]
    assert first["bug"][:3] == second["bug"][:3] == ["RankError", "rank 1: TypeError: x", ExitCode.FAILED]
    assert (first["bug"][3], second["bug"][3]) == ("None", "TypeError('x')"), "the rank concerned keeps its traceback"
    assert second["both"][:2] == ["ValueError", "a bug"]
    assert first["both"][:2] == ["RankError", "rank 1 ended with ValueError: a bug; its traceback is in its own log"]


@pytest.mark.single_gpu
def test_alone_everything_is_agreed_upon():
    assert raise_together(lambda: 3) == 3 and on_every_rank(lambda: 3) == [3]
    require_same_on_ranks({"x": float("nan")})
    with pytest.raises(ValueError, match=r"^too many$"):
        raise_together(lambda: raised(ValueError("too many")))
    with pytest.raises(RankError, match=r"^rank 0: a mistake$"):
        on_every_rank(lambda: raised(UserError("a mistake")))


def raised(error):
    raise error
