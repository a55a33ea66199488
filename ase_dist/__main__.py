"""``python -m ase_dist COMMAND ...``: the same commands as in launch/, without a checkout."""

import sys

from ase_dist.commands.start import start

if __name__ == "__main__":
    sys.exit(start("main"))
