"""``python -m ase_dist COMMAND ...``: the same commands as in launch/, without a checkout."""

import sys

from ase_dist.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
