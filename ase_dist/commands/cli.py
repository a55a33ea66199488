"""What all commands share: how their help names them, and how they end. Imports no torch."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from ase_dist.errors import ExitCode, UserError, describe, exit_code_of, has_traceback
from ase_dist.files import expand_user

SCRIPTS = Path("launch")  # of a checkout; without one there is python -m ase_dist
MODULE_FILE = "__main__.py"


def command_parser(name: str, *, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """A parser whose help shows how the command was started: as a script of launch/ or by ``python -m ase_dist``.

    The examples in ``epilog`` are written for a checkout and are rewritten for ``python -m ase_dist``.
    """
    as_module = Path(sys.argv[0]).name == MODULE_FILE
    return argparse.ArgumentParser(
        prog=f"python -m ase_dist {name}" if as_module else script_of(name).name,
        description=description,
        epilog=without_checkout(epilog) if as_module else epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def path_or_name(text: str) -> str:
    """The type of an option that takes a path or a name: ~ is the home folder; empty text is refused."""
    try:
        return expand_user(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path(text: str) -> Path:
    """The type of an option that takes a path: ~ is the home folder; empty text is refused."""
    return Path(path_or_name(text))


class RenamedOption(argparse.Action):
    """The old name of an option: stores into that option's ``dest`` and warns. Give it ``const="--new-name"``."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        """Store the value and say what the option is called now."""
        sys.stderr.write(f"warning: {option} is called {self.const} now; the old name will go\n")
        setattr(namespace, self.dest, values)


def script_of(name: str) -> Path:
    """The file below launch/ of a command: ``cluster check`` is launch/cluster/check.py."""
    return SCRIPTS.joinpath(*name.split()).with_suffix(".py")


def without_checkout(text: str) -> str:
    """Rewrite a checkout's command lines: ``-m ase_dist train`` for its script, ``z2`` for ``ds_configs/z2.json``.

    For DeepSpeed's launcher -m is --module.
    """
    text = re.sub(r"\bds_configs/(\w+)\.json", r"\1", text)
    text = re.sub(r"\blaunch/([\w/]+)\.py", lambda found: f"-m ase_dist {found[1].replace('/', ' ')}", text)
    return re.sub(r"(deepspeed |job=\")-m ", r"\1--module ", text)


def run_command(work: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """The exit code that ``work`` returns, or that of the exception it raises, which goes to the standard error.

    User errors and run errors print one sentence, bugs a traceback (see ``ase_dist.errors``), Ctrl-C ``interrupted``.
    """
    try:
        return work()
    except KeyboardInterrupt as error:
        return refuse(interrupted, code=exit_code_of(error))
    except Exception as error:
        if not has_traceback(error):
            return refuse(describe(error), code=exit_code_of(error))
        traceback.print_exception(error)
        return exit_code_of(error)


def refuse(sentence: str, *, code: ExitCode = ExitCode.USAGE) -> ExitCode:
    """Say in one sentence why a command ends, and give its exit code."""
    sys.stderr.write(f"error: {sentence}\n")
    return code
