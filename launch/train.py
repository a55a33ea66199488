"""Train: ``deepspeed launch/train.py --deepspeed_config ds_configs/z2.json``; --help lists the rest."""

import sys

from ase_dist.commands.start import start

if __name__ == "__main__":
    sys.exit(start("train"))
