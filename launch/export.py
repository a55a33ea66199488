"""Export the model of a run for inference; --help lists the options."""

import sys

from ase_dist.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
