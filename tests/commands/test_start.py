"""Ctrl-C at any moment of a command is one line and 130."""

import os
import signal
import subprocess
import sys

import pytest

from ase_dist.commands.cli import run_command
from ase_dist.errors import ExitCode
from tests.training.tiny_runs import ROOT

pytestmark = pytest.mark.single_gpu
# A command whose import, or whose end, takes long; it says when.
SLOW = """
import atexit, sys, time
def wait():
    print("now", flush=True)
    time.sleep(20)
if sys.argv[1] == "import":
    wait()
def main():
    if sys.argv[1] == "end":
        atexit.register(wait)
    return 0
"""
PROGRAM = """
import sys, ase_dist.commands
from ase_dist.commands.start import start
ase_dist.commands.__path__.append(sys.argv.pop(1))
sys.exit(start("slow"))
"""


@pytest.mark.parametrize("moment", ["import", "end"])
def test_ctrl_c_outside_of_the_work_is_one_line(tmp_path, moment):
    (tmp_path / "slow.py").write_text(SLOW)
    words = [sys.executable, "-c", PROGRAM, str(tmp_path), moment]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (ExitCode.INTERRUPTED, "error: interrupted\n")


def breaks_off():
    """As an import of numpy that is interrupted."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise AttributeError("module 'numpy' has no attribute 'ndarray'") from None


@pytest.mark.parametrize("work", [breaks_off, lambda: os.kill(os.getpid(), signal.SIGINT)])
def test_what_an_interrupted_import_raises_is_not_shown(work, capsys):
    before = signal.getsignal(signal.SIGINT)
    assert run_command(work) == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == "error: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_of_the_caller_is_left_alone():
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        assert run_command(lambda: os.kill(os.getpid(), signal.SIGINT) or 0) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]
