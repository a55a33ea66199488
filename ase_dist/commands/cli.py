"""What all commands share: how their help names them, and how they end. Imports no torch."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ase_dist.errors import ExitCode, UserError, describe, exit_code_of, has_traceback
from ase_dist.files import expand_user
from ase_dist.image_size import ImageSize
from ase_dist.printable import printable, say
from ase_dist.stopping import Stopped, raising_stopped, stopped_by

SCRIPTS = Path("launch")  # of a checkout; without one there are python -m ase_dist and the program
MODULE_FILE, PROGRAM = "__main__.py", "ase-dist"


class _Parser(argparse.ArgumentParser):
    """Its errors are one printable line, also where an argument is not."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end with 2."""
        super().error(printable(message))


def command_parser(name: str, *, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """A parser whose help shows how the command was started: as a script of launch/, as a module, or as ``ase-dist``.

    The examples in ``epilog`` are written for a checkout and are rewritten for the other ways.
    """
    is_script = Path(sys.argv[0]).name not in (MODULE_FILE, PROGRAM)
    return _Parser(
        prog=script_of(name).name if is_script else f"{program()} {spelled(name)}",
        description=description,
        epilog=epilog if is_script else without_checkout(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def program() -> str:
    """How the commands are started: as ``ase-dist``, or in any other way as a module."""
    return PROGRAM if Path(sys.argv[0]).name == PROGRAM else "python -m ase_dist"


def spelled(name: str) -> str:
    """A command's name as its program writes it: with hyphens where that is ``ase-dist``."""
    return name.replace("_", "-") if program() == PROGRAM else name


def path_or_name(text: str) -> str:
    """The type of an option that takes a path or a name: ~ is the home folder; empty text is refused."""
    try:
        return expand_user(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path(text: str) -> Path:
    """The type of an option that takes a path: ~ is the home folder; empty text is refused."""
    return Path(path_or_name(text))


def image_size(text: str) -> ImageSize:
    """The type of an option that takes an image's size: 224, 448x576."""
    try:
        return ImageSize.read(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class RenamedOption(argparse.Action):
    """The old name of an option: stores into that option's ``dest`` and warns. Give it ``const="--new-name"``."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        """Store the value and say what the option is called now."""
        say(f"warning: {option} is called {self.const} now; the old name will go")
        setattr(namespace, self.dest, values)


def script_of(name: str) -> Path:
    """The file below launch/ of a command: ``cluster check`` is launch/cluster/check.py."""
    return SCRIPTS.joinpath(*name.split()).with_suffix(".py")


def without_checkout(text: str) -> str:
    """Rewrite a checkout's command lines: ``-m ase_dist train`` for its script, ``z2`` for ``ds_configs/z2.json``.

    For DeepSpeed's launcher -m is --module. Where the commands are started as ``ase-dist``, without a launcher it is
    that.
    """
    text = re.sub(r"\bds_configs/(\w+)\.json", r"\1", text)
    text = re.sub(r"\blaunch/([\w/]+)\.py", lambda found: f"-m ase_dist {found[1].replace('/', ' ')}", text)
    text = re.sub(r"(deepspeed |job=\")-m ", r"\1--module ", text)
    return re.sub(r"\bpython -m ase_dist (\w+)", lambda found: f"{program()} {spelled(found[1])}", text)


def run_command(work: Callable[[], int], *, after_signal: str = "") -> int:
    """The exit code that ``work`` returns, or that of the exception it raises, which goes to the standard error.

    User errors and run errors print one sentence, bugs a traceback (see ``ase_dist.errors``). Ctrl-C and the other
    signals of ``STOPPING`` print one line, which ``after_signal`` is added to, and give 128 + the signal's number.
    """
    seen: list[int] = []
    try:
        with raising_stopped() as seen:
            code = work()
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        code = refuse(f"{stopped_by(number)}{after_signal}", code=128 + number)
    except Exception as error:
        # a library that a signal breaks off may raise another error instead
        code = _tell(error) if not seen else refuse(f"{stopped_by(seen[0])}{after_signal}", code=128 + seen[0])
    with suppress(OSError):
        sys.stderr.flush()
    return code


def _tell(error: Exception) -> int:
    """Print what ended a command; its exit code."""
    code = exit_code_of(error)
    if not has_traceback(error):
        return refuse(describe(error), code=code)
    with suppress(OSError):
        sys.stderr.write(printable("".join(traceback.format_exception(error)), lines=True))
    return code


def refuse(sentence: str, *, code: int = ExitCode.USAGE) -> int:
    """Say in one sentence why a command ends, and give its exit code."""
    say(f"error: {sentence}")
    return code
