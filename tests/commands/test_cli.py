"""What commands share: the text of their help with and without a checkout, and how they end."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ase_dist.commands.cli import run_command, script_of, without_checkout
from ase_dist.errors import ExitCode, RunError, UserError

pytestmark = pytest.mark.single_gpu


def test_scripts_lie_in_launch():
    assert script_of("cluster check") == Path("launch/cluster/check.py")


@pytest.mark.parametrize(
    ("checkout", "package"),
    [
        ("python launch/plan.py --world 64", "python -m ase_dist plan --world 64"),
        ("python launch/cluster/check.py hosts", "python -m ase_dist cluster check hosts"),
        (
            "deepspeed launch/train.py --deepspeed_config ds_configs/z2_bf16.json",
            "deepspeed --module ase_dist train --deepspeed_config z2_bf16",
        ),
        ("torchrun --nproc_per_node 2 launch/train.py", "torchrun --nproc_per_node 2 -m ase_dist train"),
        ('job="launch/train.py seed=1"', 'job="--module ase_dist train seed=1"'),
        ("data.root=PASCAL_MT", "data.root=PASCAL_MT"),
    ],
)
def test_examples_work_without_a_checkout(checkout, package):
    assert without_checkout(checkout) == package


def end_by(error, capsys):
    """The code and the words on the standard error of a command that ``error`` ends."""

    def work():
        raise error

    code = run_command(work)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("--steps: got 0, wanted 1 or more"), 2, "--steps: got 0, wanted 1 or more"),
        (RunError("the disk is full", exit_code=ExitCode.NOT_SAVED), 74, "the disk is full"),
        (RunError("rank 1 ended with ValueError: x"), 1, "rank 1 ended with ValueError: x"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "x/y"), 2, "No such file or directory: x/y"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x/y"), 2, "Permission denied: x/y"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), 2, "Read-only file system"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 74, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_is_no_bug_is_one_sentence_and_a_code(error, code, sentence, capsys):
    assert end_by(error, capsys) == (code, f"error: {sentence}\n")


@pytest.mark.parametrize("error", [ValueError("too many values"), TypeError("x"), FileNotFoundError("our own words")])
def test_a_bug_keeps_its_traceback(error, capsys):
    code, said = end_by(error, capsys)
    assert code == ExitCode.FAILED and said.count("Traceback (most recent call last)") == 1
    assert "in work" in said and said.endswith(f"{type(error).__name__}: {error}\n")


@pytest.mark.parametrize(
    "error",
    [OSError(getattr(errno, name), os.strerror(getattr(errno, name))) for name in ("EIO", "ESTALE", "ETIMEDOUT")]
    + [ConnectionResetError(errno.ECONNRESET, "reset"), TimeoutError("too slow"), BlockingIOError(errno.EAGAIN, "")],
)
def test_what_may_work_in_a_moment_has_a_code_of_its_own(error, capsys):
    code, said = end_by(error, capsys)
    assert code == ExitCode.IO_ERROR and "in work" in said


def test_a_command_that_ends_well_says_nothing(capsys):
    assert run_command(lambda: ExitCode.SKIPPED) == 3
    assert capsys.readouterr().err == ""


COMMAND = [sys.executable, "-m", "ase_dist"]


def test_a_full_disk_behind_the_standard_output_is_one_sentence():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, "train", "--print-config"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == ExitCode.NOT_SAVED
    assert done.stderr == b"error: No space left on device: the standard output\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_disk_behind_the_streams_changes_no_other_code(stream):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, "train", "--print-config", "seed=x"], **{stream: full}, check=False)
    assert done.returncode == ExitCode.USAGE


def test_a_reader_that_has_read_enough_is_no_error():
    shell = f"set -o pipefail; {' '.join(COMMAND)} train --print-keys | true"
    done = subprocess.run(["bash", "-c", shell], stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
