"""Open a local page for an export; --help lists the options."""

import sys

from ase_dist.commands.start import start

if __name__ == "__main__":
    sys.exit(start("demo"))
