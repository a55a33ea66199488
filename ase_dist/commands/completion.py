"""Completion of ``ase-dist`` in bash and zsh: commands, options, settings, names of configs and baselines, files.

    eval "$(ase-dist --print-completion bash)"

The commands' own parsers say what there is, and shtab writes the script. Imports no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import shtab

from ase_dist.baselines import baselines
from ase_dist.commands.cli import path, path_or_name
from ase_dist.commands.main import COMMANDS, SHELLS, first_line, module_of
from ase_dist.config import setting_keys
from ase_dist.read_config import shipped_configs
from ase_dist.study.variants import STUDIES
from ase_dist.training.ds_config import shipped_ds_configs

PROGRAM = "ase-dist"
SETTINGS = "settings"
WORDS: dict[str, Callable[[], Iterable[str]]] = {  # by the dest of an argument that takes one of them
    "config": shipped_configs,
    "baseline": baselines,
    "deepspeed_config": shipped_ds_configs,
    "name": lambda: STUDIES,
    SETTINGS: lambda: [f"{key}=" for key in setting_keys()],
}
# After shtab's own function: what ends with = goes on with its value.
BASH_END = """
_ase_dist() {
  _shtab_ase_dist "$@"
  [[ ${#COMPREPLY[@]} -gt 0 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace +o filenames 2>/dev/null
  return 0
}
complete -o filenames -F _ase_dist ase-dist
"""


def completion(shell: str) -> str:
    """The script of ``shell``, bash or zsh."""
    parser = whole_parser()
    preamble = {each: "\n".join(_functions(each)) for each in SHELLS}
    script = shtab.complete(parser, shell=shell, root_prefix="ase_dist", preamble=preamble)
    return script + (BASH_END if shell == "bash" else "")


def whole_parser() -> argparse.ArgumentParser:
    """All commands as one parser, whose arguments say how they are completed."""
    parser = argparse.ArgumentParser(prog=PROGRAM)
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("--print-completion", choices=SHELLS, help="print the script that completes this command")
    groups: dict[tuple[str, ...], argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    groups[()] = parser.add_subparsers()
    for name in COMMANDS:
        *above, last = name.replace("_", "-").split()
        if tuple(above) not in groups:
            groups[tuple(above)] = groups[()].add_parser(*above, help=f"{' '.join(above)} ...").add_subparsers()
        own = module_of(name).parser()
        groups[tuple(above)].add_parser(last, help=first_line(name), parents=[own], add_help=False)
        for action in own._actions:
            _say_how(action)
    return parser


def _say_how(action: argparse.Action) -> None:
    """Give an argument the attribute ``complete`` that shtab reads."""
    if action.dest in WORDS and action.nargs != 0:
        action.complete = dict.fromkeys(SHELLS, f"_ase_dist_{action.dest}")  # type: ignore[attr-defined]
    elif action.type in (path, path_or_name):
        action.complete = shtab.FILE  # type: ignore[attr-defined]


def _functions(shell: str) -> Iterable[str]:
    """A function of the shell for each list of words."""
    takes_files = {"config", "deepspeed_config"}
    for name, words in WORDS.items():
        listed = " ".join(words())
        if shell == "bash":
            files = '; compgen -f -- "$1"' if name in takes_files else ""
            yield f'_ase_dist_{name}() {{ compgen -W "{listed}" -- "$1"{files}; }}'
        else:
            end = "-S '' " if name == SETTINGS else ""
            files = "; _files" if name in takes_files else ""
            yield f"_ase_dist_{name}() {{ compadd {end}-- {listed}{files} }}"
