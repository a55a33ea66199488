"""Check a data set that was fetched, and pack it for training: from its archive, or from the unpacked folder.

Every file that the lists need is decoded; what is missing or unusable is named, all of it. The packed data set is read
by ``data.root=DIR`` and gives the same samples several times faster. Nothing is written into SRC. An interrupted
command, given again, goes on where it stood; where nothing has changed it has nothing to do.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from ase_dist.commands.cli import command_parser, path, run_command
from ase_dist.printable import log_messages
from ase_dist.tasks import packable

EPILOG = """examples:
  python launch/prepare_data.py pascal-context PASCAL_MT.tgz --check-only
  python launch/prepare_data.py pascal-context PASCAL_MT.tgz --out packed/pascal
  python launch/prepare_data.py pascal-context packed/pascal --check-only
  python launch/prepare_data.py nyud NYUD_MT --pictures files
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = command_parser("prepare_data", description=__doc__, epilog=EPILOG)
    p.add_argument("data", choices=[name.replace("_", "-") for name in packable()], help="the layout of SRC")
    p.add_argument("source", type=path, metavar="SRC", help="an archive (.tgz, .tar.gz, .tar) or an unpacked folder")
    p.add_argument("--out", type=path, metavar="DIR", help="where to pack to (default: a folder in the user's cache)")
    p.add_argument("--tasks", metavar="A,B", help="pack the labels of these only (default: all of the data set's)")
    p.add_argument("--subset", action="store_true", help="accept lists that are not the published ones")
    p.add_argument(
        "--pictures",
        choices=("pixels", "files"),
        default="pixels",
        help="keep images decoded (default), or as the files they are, slower and smaller",
    )
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    p.add_argument("--check-only", action="store_true", help="pack nothing; SRC may also be a packed data set")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 after one sentence about what is wrong."""
    arguments = parser().parse_args(argv)
    log_messages()

    def check_and_pack() -> int:
        from ase_dist.data.packed.layout import is_packed
        from ase_dist.data.packed.prepare import Request, check_only, prepare
        from ase_dist.data.packed.verify import verify

        source = arguments.source
        if is_packed(source):
            logging.info("%s: %d packed files are whole", source, verify(source))
            return 0
        data = arguments.data.replace("-", "_")
        tasks = tuple(arguments.tasks.split(",")) if arguments.tasks else None
        request = Request(data, source, tasks, arguments.pictures, arguments.subset, arguments.workers)
        if arguments.check_only:
            logging.info("%s: the files of %d images are whole", source, check_only(request, arguments.out))
            return 0
        place = prepare(request, arguments.out)
        logging.info("train with data.name=%s data.root=%s", data, place)
        return 0

    return run_command(check_and_pack, interrupted="interrupted; the same command goes on from here")
