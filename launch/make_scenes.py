"""Make a generated data set; --help lists the options."""

import sys

from ase_dist.commands.make_scenes import main

if __name__ == "__main__":
    sys.exit(main())
