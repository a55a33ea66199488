"""Run a study of the paper's questions; --help lists them."""

import sys

from ase_dist.commands.start import start

if __name__ == "__main__":
    sys.exit(start("study"))
