"""The command line of ``launch/cluster/check.py``: check a cluster and a job, write ``.deepspeed_env``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ase_dist.cluster.check import address_of, ask_nodes, differences, unshared
from ase_dist.cluster.environment import FILE, shared_variables, write_deepspeed_env
from ase_dist.cluster.facts import Facts
from ase_dist.cluster.hostfile import Node, parse_hostfile, read_text
from ase_dist.cluster.job import Job
from ase_dist.cluster.shell import over_ssh

USAGE = 2  # exit code of a cluster or a job that is not ready
EPILOG = """The address of the first node is all that goes to the standard output:
  job="launch/train.py --deepspeed_config ds_configs/z2.json output=runs/cluster"
  deepspeed --hostfile hosts --master_addr "$(python launch/cluster/check.py hosts -- $job)" $job
"""


class Ready(NamedTuple):
    """A checked cluster: the address of its first node, or a sentence for each thing that is wrong."""

    master: str
    problems: list[str]


def parser() -> argparse.ArgumentParser:
    """The options; what follows ``--`` is the job, whose data and run folder are looked at on all nodes."""
    p = argparse.ArgumentParser(
        prog="check.py",
        usage="%(prog)s [OPTION]... HOSTFILE [-- SCRIPT [ARGUMENT]...]",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("hostfile", type=Path, help="lines such as 'n1 slots=8'")
    p.add_argument("--env", type=Path, default=Path(FILE), metavar="FILE", help="what to write (default %(default)s)")
    p.add_argument("--ssh-port", type=int, metavar="PORT", help="default: as ssh is configured")
    p.add_argument("--no-ssh", action="store_true", help="look at the hostfile and the job's settings only")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 after a sentence for each thing that is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    dashes = words.index("--") if "--" in words else len(words)
    arguments = parser().parse_args(words[:dashes])
    try:
        job = Job.of(words[dashes + 1 :])
        ready = check(arguments.hostfile, job, env=arguments.env, port=arguments.ssh_port, ask=not arguments.no_ssh)
    except (ValueError, OSError) as error:
        ready = Ready("", [str(error)])
    if ready.problems:
        sys.stderr.write("".join(f"error: {problem}\n" for problem in ready.problems))
        return USAGE
    sys.stdout.write(f"{ready.master}\n")
    return 0


def check(hostfile: Path, job: Job, *, env: Path, port: int | None = None, ask: bool = True) -> Ready:
    """Check a hostfile and, with ``ask``, its nodes over ssh; write ``env`` where all is well.

    Raises ValueError and OSError where the hostfile cannot be read or ``env`` not be written.
    """
    nodes, problems = parse_hostfile(read_text(hostfile), name=str(hostfile))
    if problems or not ask:
        return Ready(address_of(nodes[0]) if nodes else "", problems)
    shell = over_ssh(port=port)
    known, problems = ask_nodes(nodes, shell, folder=Path.cwd(), data=job.data)
    problems += job.shell_characters() + differences(known, data=job.data)
    if job.output and len(nodes) > 1 and not problems:
        problems = unshared(nodes, shell, output=Path(job.output).absolute())
    if problems:
        return Ready("", problems)
    _describe(known)
    write_deepspeed_env(env, shared_variables(nodes, list(known.values()), os.environ, timeout=job.timeout))
    return Ready(known[nodes[0]].address or address_of(nodes[0]), [])


def _describe(known: Mapping[Node, Facts]) -> None:
    for node, facts in known.items():
        what = f"{facts.devices} devices" if facts.devices else "no accelerator"
        way = f", {facts.address} on {facts.interface}" if facts.interface else ""
        sys.stderr.write(f"{node.host}: slots={node.slots}, {what}, {facts.cores} cores{way}\n")
