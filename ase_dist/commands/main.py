"""``ase-dist COMMAND ...``, ``python -m ase_dist COMMAND ...``: the commands by name, without a checkout. No torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import ase_dist
from ase_dist.commands.cli import program, run_command, spelled
from ase_dist.errors import UserError, did_you_mean
from ase_dist.printable import show

COMMANDS = (
    "train",
    "evaluate",
    "export",
    "predict",
    "report",
    "clean",
    "study",
    "plan",
    "prepare_data",
    "make_scenes",
    "pretrain_backbone",
    "demo",
    "doctor",
    "cluster check",
)
HELP, VERSION, COMPLETION = ("--help", "-h"), "--version", "--print-completion"
SHELLS = ("bash", "zsh")
LOCAL_RANK = ("--local_rank", "--local-rank")  # DeepSpeed's launcher puts it first (0.19.8, --module)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named by the first words; returns its exit code, or 2 where there is no such command."""
    words = list(sys.argv[1:] if argv is None else argv)
    launched = [word for word in words[:1] if word.startswith(LOCAL_RANK)]
    words = words[len(launched) :]
    if not words or words[0] in HELP:
        show(listing())
        return 0
    if words[0] == VERSION:
        show(f"{ase_dist.__version__}\n")
        return 0

    def run_named() -> int:
        if words[0].partition("=")[0] == COMPLETION:
            return print_completion(words)
        name, others = find_command(words)
        code: int = module_of(name).main([*launched, *others])
        return code

    return run_command(run_named)


def find_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command named by the first words, and the other words; UserError with the closest name if there is none."""
    for name in COMMANDS:
        count = len(name.split())
        if " ".join(words[:count]).replace("-", "_") == name:
            return name, list(words[count:])
        if words[0].replace("-", "_") == name.replace(" ", "_"):  # cluster-check
            return name, list(words[1:])
    names = [spelled(name) for name in COMMANDS]
    raise UserError(f"there is no command {words[0]!r}{did_you_mean(words[0], names)} (commands: {', '.join(names)})")


def module_of(name: str) -> ModuleType:
    """The module of a command: ``cluster check`` is ``ase_dist.commands.cluster_check``."""
    return import_module(f"ase_dist.commands.{name.replace(' ', '_')}")


def first_line(name: str) -> str:
    """What a command does: the first line of its module's docstring, up to the first colon."""
    line = (module_of(name).__doc__ or "").partition("\n")[0]
    return line.partition(": ")[0].rstrip(".").replace("``", "")


def listing() -> str:
    """The help: each command in a line."""
    names = [spelled(name) for name in COMMANDS]
    width = max(map(len, names))
    lines = [f"  {shown:{width}}  {first_line(name)}" for shown, name in zip(names, COMMANDS, strict=True)]
    usage = f"usage: {program()} COMMAND ...    (COMMAND --help tells its options; {VERSION}; {COMPLETION} bash or zsh)"
    return "\n".join([usage, "", ase_dist.__doc__ or "", "", "commands:", *lines, ""])


def print_completion(words: Sequence[str]) -> int:
    """Print the script that completes ``ase-dist`` in the shell that ``words`` name; UserError for another one."""
    from ase_dist.commands.completion import completion

    shell = " ".join([*words[0].partition("=")[2:], *words[1:]]).strip()
    if shell not in SHELLS:
        raise UserError(f"{COMPLETION}: got {shell!r}, wanted {' or '.join(SHELLS)}")
    show(completion(shell))
    return 0
