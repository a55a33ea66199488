"""Make one self-contained HTML page of a run or a study, or of several runs compared: readable offline."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from ase_dist.commands.cli import command_parser, path, path_or_name, run_command
from ase_dist.errors import UserError
from ase_dist.printable import log_messages
from ase_dist.report.watch import serve

EPILOG = """examples:
  python launch/report.py runs/scenes
  python launch/report.py studies/table1_scenes --out table1.html
  python launch/report.py runs/scenes runs/scenes_mtl_vit_lora --out compared.html
  python launch/report.py runs/scenes --watch
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = command_parser("report", description=__doc__, epilog=EPILOG)
    p.add_argument(
        "folders",
        type=path,
        nargs="+",
        metavar="RUN_OR_STUDY",
        help="the output folder of a run or a study; of runs several",
    )
    p.add_argument(
        "--out",
        type=path,
        metavar="FILE.html",
        help="where to write it (default: report.html in there; several: needed)",
    )
    p.add_argument(
        "--reference",
        type=path_or_name,
        metavar="WHICH",
        help="what gains are relative to: one of the runs (default: the first), or anything that evaluate takes",
    )
    p.add_argument(
        "--watch",
        action="store_true",
        help="write nothing, but serve the page to this machine's browsers and renew it while the run goes on",
    )
    p.add_argument(
        "--port", type=int, default=0, metavar="N", help="of --watch, on 127.0.0.1 (default: one that is free)"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 after one sentence about what is wrong."""
    arguments = parser().parse_args(argv)
    log_messages(sys.stdout)

    def make_report() -> int:
        from ase_dist.report.page import watched_report, write_comparison, write_report

        if arguments.watch:
            if arguments.out is not None:
                raise UserError("--watch: it writes nothing, and got --out; take one of them")
            serve(
                arguments.folders,
                lambda version: watched_report(arguments.folders, version, reference=arguments.reference),
                port=arguments.port,
                ready=lambda address: logging.info("%s shows the page as the run goes on; Ctrl-C ends it", address),
            )
            return 0
        if len(arguments.folders) == 1 and arguments.reference is None:
            out = write_report(arguments.folders[0], arguments.out)
        elif arguments.out is None:
            raise UserError("--out: wanted the file for the page that compares the runs, such as --out compared.html")
        else:
            out = write_comparison(arguments.folders, arguments.out, reference=arguments.reference)
        logging.info("%s, %.1f MB", out, out.stat().st_size / 1e6)
        return 0

    return run_command(make_report)
