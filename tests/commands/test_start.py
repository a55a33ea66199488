"""A signal at any moment of a command is one line and 128 + its number."""

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
import atexit, ctypes, pathlib, sys, time
def wait():
    print("now", flush=True)
    time.sleep(20)
if sys.argv[1] == "import":
    wait()
def main():
    if sys.argv[1] == "end":
        atexit.register(wait)
        return 0
    from ase_dist import stopping
    from ase_dist.commands.cli import run_command
    from ase_dist.files import replacing
    file = pathlib.Path(__file__).with_name("out")
    def work():
        with replacing(file) as temporary:
            temporary.write_text("half")
            wait()
    def blocked():  # in C, where Python's handlers have to wait: as in a collective
        stopping.GRACE = 0.2
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        libc.pthread_mutex_lock(mutex)
        print("now", flush=True)
        libc.pthread_mutex_lock(mutex)
    def lazy():  # an import that a signal does not break off
        try:
            import slowly
        finally:
            assert slowly.is_whole
    works = {"work": (work, ", its file is gone"), "blocked": (blocked, ""), "lazy": (lazy, " after the import")}
    work, after = works[sys.argv[1]]
    code = run_command(work, after_signal=after)
    return code if list(file.parent.glob("*out*")) == [] else 1
"""
PROGRAM = """
import sys, ase_dist.commands
from ase_dist.commands.start import start
sys.path.append(sys.argv[1])
ase_dist.commands.__path__.append(sys.argv.pop(1))
sys.exit(start("slow"))
"""


@pytest.mark.parametrize(
    ("moment", "number", "sentence"),
    [
        ("import", signal.SIGINT, "interrupted"),
        ("end", signal.SIGINT, "interrupted"),
        ("import", signal.SIGTERM, "ended by SIGTERM"),
        ("end", signal.SIGHUP, "ended by SIGHUP"),
        ("work", signal.SIGQUIT, "ended by SIGQUIT, its file is gone"),
        ("blocked", signal.SIGTERM, "ended by SIGTERM"),
        ("lazy", signal.SIGINT, "interrupted after the import"),
    ],
)
def test_a_signal_at_any_moment_is_one_line(tmp_path, moment, number, sentence):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "slowly.py").write_text("import time\nprint('now', flush=True)\ntime.sleep(1)\nis_whole = True\n")
    words = [sys.executable, "-c", PROGRAM, str(tmp_path), moment]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (128 + number, f"error: {sentence}\n")


def test_an_ignored_signal_stays_ignored_and_later_ones_do_not_disturb_the_cleaning_up(capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    cleaned = []

    def work():
        os.kill(os.getpid(), signal.SIGHUP)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)

    try:
        assert run_command(work) == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert cleaned and capsys.readouterr().err == "error: ended by SIGTERM\n"


def test_a_command_that_another_one_runs_says_it_once(capsys):
    assert run_command(lambda: run_command(breaks_off)) == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == "error: interrupted\n"
    assert run_command(lambda: run_command(lambda: os.kill(os.getpid(), signal.SIGTERM))) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "error: ended by SIGTERM\n"


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
