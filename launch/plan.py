"""Plan a run without starting it: memory, traffic, step time; --help lists the options."""

import sys

from ase_dist.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
