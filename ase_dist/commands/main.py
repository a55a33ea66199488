"""``python -m ase_dist COMMAND ...``: the commands of launch/ by name, without a checkout. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import ase_dist
from ase_dist.commands.cli import run_command
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
    "cluster check",
)
HELP, VERSION = ("--help", "-h"), "--version"
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
    raise UserError(
        f"there is no command {words[0]!r}{did_you_mean(words[0], COMMANDS)} (commands: {', '.join(COMMANDS)})"
    )


def module_of(name: str) -> ModuleType:
    """The module of a command: ``cluster check`` is ``ase_dist.commands.cluster_check``."""
    return import_module(f"ase_dist.commands.{name.replace(' ', '_')}")


def listing() -> str:
    """The help: each command with the first line of its module's docstring, up to the first colon."""
    lines = []
    width = max(map(len, COMMANDS))
    for name in COMMANDS:
        first_line = (module_of(name).__doc__ or "").partition("\n")[0]
        lines.append(f"  {name:{width}}  {first_line.partition(': ')[0].rstrip('.').replace('``', '')}")
    usage = "usage: python -m ase_dist COMMAND ...    (COMMAND --help tells its options; --version)"
    return "\n".join([usage, "", ase_dist.__doc__ or "", "", "commands:", *lines, ""])
