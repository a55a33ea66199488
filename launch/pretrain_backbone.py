"""Make the small backbone that ships with the package; --help lists the options."""

import sys

from ase_dist.commands.start import start

if __name__ == "__main__":
    sys.exit(start("pretrain_backbone"))
