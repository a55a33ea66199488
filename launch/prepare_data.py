"""Check a data set that was fetched, and pack it for training; --help lists the options."""

import sys

from ase_dist.commands.prepare_data import main

if __name__ == "__main__":
    sys.exit(main())
