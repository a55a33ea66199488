"""Make one HTML page of a run or a study; --help lists the options."""

import sys

from ase_dist.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
