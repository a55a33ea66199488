"""Make one self-contained HTML page of a run or a study: readable offline, on a phone and on paper."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from ase_dist.commands.cli import command_parser, path, run_command
from ase_dist.printable import log_messages

EPILOG = """examples:
  python launch/report.py runs/scenes
  python launch/report.py studies/table1_scenes --out table1.html
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = command_parser("report", description=__doc__, epilog=EPILOG)
    p.add_argument("folder", type=path, metavar="RUN_OR_STUDY", help="the output folder of a run or of a study")
    p.add_argument("--out", type=path, metavar="FILE.html", help="where to write it (default: report.html in there)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 after one sentence about what is wrong."""
    arguments = parser().parse_args(argv)
    log_messages(sys.stdout)

    def make_report() -> int:
        from ase_dist.report.page import write_report

        out = write_report(arguments.folder, arguments.out)
        logging.info("%s, %.1f MB", out, out.stat().st_size / 1e6)
        return 0

    return run_command(make_report)
