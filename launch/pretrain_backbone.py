"""Make the small backbone that ships with the package; --help lists the options."""

import sys

from ase_dist.commands.pretrain_backbone import main

if __name__ == "__main__":
    sys.exit(main())
