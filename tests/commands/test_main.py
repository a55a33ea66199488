"""Every command by both ways of starting it: quick help, the same options, one sentence for a wrong name."""

import subprocess
import sys
from pathlib import Path

import pytest

import ase_dist
from ase_dist.commands.cli import script_of
from ase_dist.commands.main import COMMANDS, find_command, main, module_of
from ase_dist.errors import ExitCode

pytestmark = pytest.mark.single_gpu

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "deepspeed", "timm", "matplotlib")
BOTH_WAYS = f"""
import runpy, sys
def said(start, *words):
    sys.argv = [*words, "--help"]
    try:
        start()
    except SystemExit as end:
        assert not end.code, end.code
    print("=====")
name, script = sys.argv[1:]
said(lambda: runpy.run_path(script, run_name="__main__"), script)
said(lambda: runpy.run_module("ase_dist", run_name="__main__"), "ase_dist/__main__.py", *name.split())
heavy = [name for name in {HEAVY} if name in sys.modules]
assert not heavy, heavy
"""


def python(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_torch_and_names_the_command_as_it_was_started(name):
    done = python("-c", BOTH_WAYS, name, script_of(name))
    assert done.returncode == 0, done.stderr
    script, module = done.stdout.split("=====\n")[:2]
    assert script.startswith(f"usage: {script_of(name).name} ")
    assert module.startswith(f"usage: python -m ase_dist {name} ")
    assert "launch/" not in module and "ds_configs/" not in module
    words = [[word for word in text.split() if word.startswith("--")] for text in (script, module)]
    assert set(words[1]) - {"--module"} == set(words[0])


def test_the_commands_are_the_scripts():
    scripts = {path.relative_to(ROOT) for path in (ROOT / "launch").rglob("*.py")}
    assert {script_of(name) for name in COMMANDS} == scripts


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_all_commands_are_listed_in_a_line_each(words, capsys):
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS:
        (line,) = (line for line in lines if line.startswith(f"  {name} "))
        summary = line.removeprefix(f"  {name} ").strip()
        assert module_of(name).__doc__.replace("``", "").startswith(summary) and 20 < len(summary) < 100


def test_the_listing_needs_no_torch():
    program = "import sys; from ase_dist.commands.main import main; main([])\n"
    done = python("-c", program + f"assert not set({HEAVY}) & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_is_one_sentence_with_the_nearest():
    done = python("-m", "ase_dist", "trian", "--help")
    assert done.returncode == ExitCode.USAGE and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: there is no command 'trian', did you mean 'train'? (commands: train, ")


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{ase_dist.__version__}\n"


@pytest.mark.parametrize(
    ("words", "name", "others"),
    [
        (["train", "seed=1"], "train", ["seed=1"]),
        (["make-scenes"], "make_scenes", []),
        (["cluster", "check", "hosts"], "cluster check", ["hosts"]),
    ],
)
def test_the_first_words_are_the_command(words, name, others):
    assert find_command(words) == (name, others)


@pytest.mark.parametrize("words", [["cluster"], ["cluster", "chekc"], ["check"], ["Train"], ["train evaluate"]])
def test_other_words_are_no_command(words):
    with pytest.raises(ValueError, match="there is no command"):
        find_command(words)


def test_what_deepspeeds_launcher_puts_first_goes_to_the_command(capsys):
    assert main(["--local_rank=0", "train", "--print-config", "seed=5"]) == 0
    assert "seed: 5\n" in capsys.readouterr().out
