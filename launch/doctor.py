"""Say what this machine is and what would go wrong; --help lists the options."""

import sys

from ase_dist.commands.start import start

if __name__ == "__main__":
    sys.exit(start("doctor"))
