"""Evaluate a run or an export; --help lists the options."""

import sys

from ase_dist.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
