"""Run a study of the paper's questions; --help lists them."""

import sys

from ase_dist.commands.study import main

if __name__ == "__main__":
    sys.exit(main())
