"""Say what this machine is and, in one sentence each, what would go wrong on it: the first thing for a bug report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ase_dist.commands.cli import command_parser, path, run_command
from ase_dist.errors import UserError
from ase_dist.printable import show

EPILOG = """examples:
  python launch/doctor.py
  python launch/doctor.py --output runs --data ~/PASCALContext --json

It writes no file, prints no environment variable that may hold a secret, and ends within about three times --timeout.
exit codes: 0 runs work here, perhaps with warnings; 2 nothing would work (what is "broken" says why)
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = command_parser("doctor", description=__doc__, epilog=EPILOG)
    p.add_argument(
        "--output",
        type=path,
        default=Path("runs"),
        metavar="FOLDER",
        help="where runs are to be written; nothing is made (default %(default)s)",
    )
    p.add_argument("--data", type=path, action="append", default=[], metavar="ROOT", help="a data set; may be repeated")
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    p.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds for each probe (default %(default)g)"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 where nothing would work."""
    arguments = parser().parse_args(argv)

    def look() -> int:
        if not 1 <= arguments.timeout <= 3600:
            raise UserError(f"--timeout: got {arguments.timeout:g}, wanted 1 to 3600 seconds")
        from ase_dist.doctor.examination import examine

        found = examine(
            output=str(arguments.output), data=[str(root) for root in arguments.data], timeout=arguments.timeout
        )
        show(json.dumps(found.as_json(), indent=2) + "\n" if arguments.json else found.as_text())
        return found.exit_code

    return run_command(look)
