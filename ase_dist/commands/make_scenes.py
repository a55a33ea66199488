"""Make a generated data set in the layout of PASCAL_MT, or a contact sheet of its scenes."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ase_dist.commands.cli import command_parser, image_size, path, run_command
from ase_dist.printable import log_messages

EPILOG = """examples:
  python launch/make_scenes.py
  python launch/make_scenes.py scenes --train 2000 --seed 1
  python launch/make_scenes.py --contact-sheet scenes.png --size 128
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = command_parser("make_scenes", description=__doc__, epilog=EPILOG)
    p.add_argument("out", type=path, nargs="?", help="folder to make the data set in; default: the user's cache")
    p.add_argument("--train", type=int, default=480, metavar="N", help="training images (default %(default)s)")
    p.add_argument("--val", type=int, default=64, metavar="N", help="validation images (default %(default)s)")
    p.add_argument("--size", type=image_size, default=224, metavar="S", help="pixels, S or HxW (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="K", help="another seed is another data set")
    p.add_argument("--workers", type=int, metavar="W", help="rendering processes (default: one for each core)")
    p.add_argument("--contact-sheet", type=path, metavar="FILE", help="write only a PNG of scenes and labels")
    p.add_argument(
        "--scenes", type=int, nargs="+", metavar="I", help="numbers on that sheet (default: six that differ)"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 after one sentence about what is wrong."""
    arguments = parser().parse_args(argv)
    log_messages()

    def make() -> int:
        from ase_dist.scenes.make import ensure_scenes
        from ase_dist.scenes.sheet import SHOWN, contact_sheet

        made: Path = arguments.contact_sheet
        if made is not None:
            contact_sheet(made, indices=arguments.scenes or SHOWN, seed=arguments.seed, size=arguments.size)
        else:
            made = ensure_scenes(
                arguments.out,
                train=arguments.train,
                val=arguments.val,
                size=arguments.size,
                seed=arguments.seed,
                workers=arguments.workers,
            )
        logging.info("%s", made)
        return 0

    return run_command(make)
