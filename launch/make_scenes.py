"""Make a generated data set in the layout of PASCAL_MT, or a contact sheet of its scenes."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ase_dist.data.scenes.make import ensure_scenes
from ase_dist.data.scenes.sheet import SHOWN, contact_sheet


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="folder to make the data set in; default: the user's cache")
    parser.add_argument("--train", type=int, default=480, metavar="N", help="training images (default %(default)s)")
    parser.add_argument("--val", type=int, default=64, metavar="N", help="validation images (default %(default)s)")
    parser.add_argument("--size", type=int, default=224, metavar="S", help="side in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="another seed is another data set")
    parser.add_argument("--workers", type=int, metavar="W", help="rendering processes (default: one for each core)")
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE", help="write only a PNG of scenes and labels")
    parser.add_argument("--scenes", type=int, nargs="+", default=SHOWN, metavar="I", help="numbers on that sheet")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 after one sentence about what is wrong."""
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if args.contact_sheet is not None:
            contact_sheet(args.contact_sheet, indices=args.scenes, seed=args.seed, size=args.size)
            logging.info("%s", args.contact_sheet)
            return 0
        folder = ensure_scenes(
            args.out, train=args.train, val=args.val, size=args.size, seed=args.seed, workers=args.workers
        )
    except (ValueError, OSError) as error:
        logging.error("%s", error)
        return 2
    logging.info("%s", folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
