"""A cluster made ready for a job: its hostfile read, its nodes asked, ``.deepspeed_env`` written."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ase_dist.cluster.check import address_of, ask_nodes, differences, unshared
from ase_dist.cluster.environment import shared_variables, write_deepspeed_env
from ase_dist.cluster.facts import Facts
from ase_dist.cluster.hostfile import Node, parse_hostfile, read_text
from ase_dist.cluster.job import Job
from ase_dist.cluster.shell import over_ssh


class Ready(NamedTuple):
    """A checked cluster: the address of its first node, or a sentence for each thing that is wrong."""

    master: str
    problems: list[str]


def check(hostfile: Path, job: Job, *, env: Path, port: int | None = None, ask: bool = True) -> Ready:
    """Check a hostfile and, with ``ask``, its nodes over ssh; write ``env`` where all is well.

    Raises UserError and OSError where the hostfile cannot be read or ``env`` not be written.
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
