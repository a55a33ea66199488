"""Check a data set that was fetched, and pack it for training; --help lists the options."""

import sys

from ase_dist.commands.start import start

if __name__ == "__main__":
    sys.exit(start("prepare_data"))
