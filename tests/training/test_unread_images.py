"""A picture that one rank cannot read ends all ranks alike, with the steps before it saved; mended, nothing differs."""

import contextlib
import errno
import os
from unittest import mock

import pytest

from ase_dist import collectives
from ase_dist.commands import evaluate as evaluate_command
from ase_dist.commands import train as command
from ase_dist.data.folder import FolderDataset
from ase_dist.errors import ExitCode, UserError
from tests.training.conftest import start_world
from tests.training.tiny_runs import TINY, checkpoint, metric_lines, same_bits, saved_meta

BAD = UserError("JPEGImages/7.jpg: got an unreadable file of 300 bytes")
AWAY = OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/net/7.jpg")


@contextlib.contextmanager
def unreadable(split, *, rank, error, after=0):
    """On that rank the images of a split raise ``error`` once so many have been read."""
    real, taken = FolderDataset.__getitem__, []

    def read(dataset, index):
        if dataset.split == split and rank == collectives.rank():
            taken.append(index)
            if len(taken) > after:
                raise error
        return real(dataset, index)

    with mock.patch.object(FolderDataset, "__getitem__", read):
        yield


@mock.patch("ase_dist.training.process.runtime.stop", lambda: None)  # torch makes no second group in a process
def runs(rank, folder):
    """Codes and the last line of each run on this rank."""
    world = collectives.world_size()
    last, ended = world - 1, {}
    options = [
        *TINY, f"data.root={(folder / 'scenes').read_text()}", f"train.batch_size={4 // world}", "checkpoint.every=0",
        "model.drop_path=0.1", "train.max_steps=4", "data.cache_in_memory=false",
    ]  # fmt: skip

    def ended_with(name, main, *arguments):
        with (folder / f"{name}_{rank}.err").open("w") as said, contextlib.redirect_stderr(said):
            code = main([*arguments])
        ended[name] = [code, (folder / f"{name}_{rank}.err").read_text().splitlines()[-1:]]

    def train(name, *more):
        ended_with(name, command.main, *options, f"output={folder / name}", *more)

    train("whole")
    share = 4 // world
    with unreadable("train", rank=last, error=BAD, after=10 // world + 2 * share):
        train("damaged")
    train("damaged_mended", f"output={folder / 'damaged'}")
    with unreadable("val", rank=last, error=AWAY):
        train("away", "eval.every=2")
        ended_with("evaluated", evaluate_command.main, str(folder / "whole"), "--device", "cpu")
    with unreadable("train", rank=last, error=BAD):
        train("at_once")
    return ended


@pytest.mark.parametrize(
    "size", [pytest.param(1, marks=pytest.mark.single_gpu), pytest.param(2, marks=pytest.mark.multi_gpu)]
)
def test_a_picture_that_one_rank_cannot_read(size, scenes, tmp_path):
    (tmp_path / "scenes").write_text(str(scenes))
    world = start_world(runs, tmp_path, size=size, seconds=250)()
    assert world.codes == [0] * size
    who = "" if size == 1 else "rank 1: "
    for ended in world.results:
        code, (said,) = ended["damaged"]
        assert code == ExitCode.USAGE and said.startswith(f"error: {who}{BAD}; step "), said
        assert said.endswith(" is saved: the same command goes on from there")
        assert ended["whole"][0] == ended["damaged_mended"][0] == ExitCode.DONE
        code, (said,) = ended["away"]
        assert code == ExitCode.IO_ERROR and "Stale file handle: /net/7.jpg; step 2 is saved" in said, said
        assert ended["evaluated"][0] == ExitCode.IO_ERROR and "/net/7.jpg" in ended["evaluated"][1][0]
        assert ended["at_once"] == [ExitCode.USAGE, [f"error: {who}{BAD}"]]
    assert checkpoint(tmp_path / "away", 2)
    saved = sorted(path.name for path in (tmp_path / "damaged" / "checkpoints").iterdir() if path.is_dir())
    assert len(saved) == 2 and saved[0] in {"step_1", "step_2", "step_3"}, "before the step that could not be begun"
    assert same_bits(checkpoint(tmp_path / "whole", 4), checkpoint(tmp_path / "damaged", 4)) == []
    assert saved_meta(tmp_path / "whole", 4)["sampler"] == saved_meta(tmp_path / "damaged", 4)["sampler"]
    assert metric_lines(tmp_path / "whole") == metric_lines(tmp_path / "damaged")
