"""Check the nodes of a hostfile and a job, write ``.deepspeed_env``, print the first node's address."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ase_dist.cluster.check import ClusterJob, check_cluster
from ase_dist.cluster.environment import FILE
from ase_dist.commands.cli import command_parser, path, refuse, run_command
from ase_dist.errors import ExitCode
from ase_dist.printable import show

EPILOG = """The address of the first node is all that goes to the standard output:
  job="launch/train.py --deepspeed_config ds_configs/z2.json output=runs/cluster"
  deepspeed --hostfile hosts --master_addr "$(python launch/cluster/check.py hosts -- $job)" $job
"""


def parser() -> argparse.ArgumentParser:
    """The options; what follows ``--`` is the job, whose data and run folder are looked at on all nodes."""
    p = command_parser("cluster check", description=__doc__, epilog=EPILOG)
    p.usage = "%(prog)s [OPTION]... HOSTFILE [-- SCRIPT [ARGUMENT]...]"
    p.add_argument("hostfile", type=path, help="lines such as 'n1 slots=8'")
    p.add_argument("--env", type=path, default=Path(FILE), metavar="FILE", help="what to write (default %(default)s)")
    p.add_argument("--ssh-port", type=int, metavar="PORT", help="default: as ssh is configured")
    p.add_argument("--no-ssh", action="store_true", help="look at the hostfile and the job's settings only")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 after a sentence for each thing that is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    dashes = words.index("--") if "--" in words else len(words)
    arguments = parser().parse_args(words[:dashes])

    def check() -> int:
        job = ClusterJob.from_words(words[dashes + 1 :])
        result = check_cluster(
            arguments.hostfile, job, env=arguments.env, port=arguments.ssh_port, ask=not arguments.no_ssh
        )
        for problem in result.problems:
            refuse(problem)
        if result.problems:
            return ExitCode.USAGE
        show(f"{result.master}\n")
        return 0

    return run_command(check)
