"""Predict images with an export; --help lists the options."""

import sys

from ase_dist.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())
