"""Evaluate a run or an export; --help lists the options."""

import sys

from ase_dist.commands.start import start

if __name__ == "__main__":
    sys.exit(start("evaluate"))
