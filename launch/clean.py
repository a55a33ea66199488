"""Free the disk of runs; --help lists the options."""

import sys

from ase_dist.commands.start import start

if __name__ == "__main__":
    sys.exit(start("clean"))
