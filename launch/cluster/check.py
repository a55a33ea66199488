"""Check the nodes of a hostfile, write .deepspeed_env, print the first node's address; --help lists the rest."""

import sys

from ase_dist.commands.start import start

if __name__ == "__main__":
    sys.exit(start("cluster_check"))
