"""``ase-dist`` as a program, and its completion in a real bash (zsh where there is one)."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ase_dist.commands.completion import completion
from ase_dist.commands.main import COMMANDS, find_command, main
from ase_dist.config import setting_keys
from ase_dist.read_config import shipped_configs

pytestmark = pytest.mark.single_gpu
BASH = shutil.which("bash")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the program as an installation has it, the scripts of both shells, and a run to be completed."""
    folder = tmp_path_factory.mktemp("program")
    program = folder / "ase-dist"
    start = "import sys\nfrom ase_dist.commands.start import ase_dist\nsys.exit(ase_dist())\n"
    program.write_text(f"#!{sys.executable}\n{start}")
    program.chmod(0o755)
    for shell in ("bash", "zsh"):
        (folder / shell).write_text(completion(shell))
    (folder / "runs" / "first one").mkdir(parents=True)
    return folder


def run(place, *words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([str(place / "ase-dist"), *words], capture_output=True, text=True, check=False, timeout=120,
                          env=environment)  # fmt: skip


def test_the_program_names_itself_and_writes_commands_with_hyphens(place):
    listed = run(place)
    assert listed.returncode == 0 and listed.stdout.startswith("usage: ase-dist COMMAND ")
    names = [line.split("  ")[1] for line in listed.stdout.splitlines() if line.startswith("  ")]
    assert names == [name.replace("_", "-") for name in COMMANDS]
    told = run(place, "prepare-data", "--help").stdout
    assert told.startswith("usage: ase-dist prepare-data ") and "launch/" not in told and "python -m" not in told
    assert "  ase-dist prepare-data photographs --init" in told
    assert "deepspeed --module ase_dist train --deepspeed_config z2" in run(place, "train", "--help").stdout
    wrong = run(place, "prepare-dta")
    assert wrong.returncode == 2 and wrong.stderr.startswith(
        "error: there is no command 'prepare-dta', did you mean 'prepare-data'?"
    )


@pytest.mark.parametrize(
    "words", [["prepare-data"], ["prepare_data"], ["cluster", "check"], ["cluster-check"], ["pretrain-backbone"]]
)
def test_hyphens_and_underscores_are_alike(words):
    assert find_command([*words, "--help"]) == ("_".join(words).replace("-", "_").replace("r_c", "r c"), ["--help"])


def test_another_shell_is_refused(capsys):
    for words in (["--print-completion"], ["--print-completion", "fish"], ["--print-completion=fish"]):
        assert main(words) == 2
        assert "wanted bash or zsh" in capsys.readouterr().err
    assert main(["--print-completion=zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef ase-dist\n")


CASES = [
    ("tr", {"train"}),
    ("pre", {"predict", "prepare-data", "pretrain-backbone"}),
    ("cluster ", {"check"}),
    ("report --ref", {"--reference"}),
    ("train --config pascal", {name for name in shipped_configs() if name.startswith("pascal")}),
    ("train --baseline mtl_v", {"mtl_vit", "mtl_vit_lora"}),
    ("train --config scenes train.adam", {"train.adam.betas=", "train.adam.eps="}),
    ("train model.moe.num_e", {"model.moe.num_experts="}),
    ("evaluate runs/f", {"runs/first one"}),
    ("--print-completion ", {"bash", "zsh"}),
]


@pytest.mark.skipif(BASH is None, reason="no bash here")
@pytest.mark.parametrize(("line", "wanted"), CASES)
def test_bash_completes(place, line, wanted):
    words = ["ase-dist", *line.split(" ")]
    quoted = " ".join(f"'{word}'" for word in words)
    script = f"source ./bash\nCOMP_WORDS=({quoted})\nCOMP_CWORD={len(words) - 1}\n"
    script += "_ase_dist 2>/dev/null\nprintf '%s\\n' \"${COMPREPLY[@]}\"\n"
    done = subprocess.run([BASH, "--norc", "-c", script], capture_output=True, text=True, check=True, cwd=place)
    assert set(done.stdout.splitlines()) == wanted


@pytest.mark.skipif(BASH is None, reason="no bash here")
def test_a_terminal_writes_the_rest_of_the_word(place):
    """A setting goes on behind its =, without a space and without a backslash."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(PS1="$ ", TERM="dumb", PATH=f"{place}{os.pathsep}{os.environ['PATH']}")
        os.execv(BASH, [BASH, "--norc", "--noprofile", "-i"])
    try:
        said(terminal, f"bind 'set enable-bracketed-paste off'; source {place}/bash; echo RE''ADY\n", until="\nREADY")
        told = said(terminal, "echo a; ase-dist train model.moe.num_e\t7", until="=7")
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)
    assert told.endswith("ase-dist train model.moe.num_experts=7")


def said(terminal, keys, *, until, seconds=20.0):
    """What the terminal shows after ``keys``, up to ``until``."""
    os.write(terminal, keys.encode())
    shown, end = "", time.monotonic() + seconds
    while until not in shown and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 65536).decode(errors="replace")
    return shown


@pytest.mark.skipif(BASH is None, reason="no bash here")
def test_the_lines_of_the_page_do_what_it_says(place, tmp_path):
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs/command_line.md").read_text(), re.M | re.S)
    path = f"{place}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([BASH, "--norc", "-ec", "".join(blocks)], capture_output=True, text=True, env=environment,
                          check=False)  # fmt: skip
    assert len(blocks) == 2 and done.returncode == 0, done.stderr
    assert (tmp_path / ".zfunc/_ase-dist").read_text().startswith("#compdef ase-dist")
    known = subprocess.run([BASH, "--norc", "-c", "source ~/.bashrc; complete -p ase-dist"], capture_output=True,
                           text=True, env=environment, check=True).stdout  # fmt: skip
    assert "-F _ase_dist ase-dist" in known


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_is_one_that_the_shell_reads_and_knows_every_setting(place, shell):
    text = (place / shell).read_text()
    assert all(f"{key}=" in text for key in setting_keys())
    if shutil.which(shell):
        subprocess.run([shutil.which(shell), "-n", str(place / shell)], check=True)
