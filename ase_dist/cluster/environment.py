"""The variables that every rank of a job shares, and ``.deepspeed_env``, by which DeepSpeed's launcher forwards them.

On CPU hosts that launcher forwards nothing of itself (0.19.8). It writes the file's values into a remote shell's
command line, so only values that a shell takes for what they are go into it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ase_dist.cluster.facts import Facts
from ase_dist.cluster.hostfile import Node
from ase_dist.errors import UserError
from ase_dist.files import write_atomic

FILE = ".deepspeed_env"
# what a user has set on the launching machine goes to all nodes and is never overruled
GIVEN = re.compile(r"(?:TORCH_)?NCCL_\w+|GLOO_\w+|UCX_\w+|OMP_NUM_THREADS|DS_ACCELERATOR|HF_HUB_OFFLINE|XDG_CACHE_HOME")
INTERFACE = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)


def shared_variables(
    nodes: Sequence[Node], facts: Sequence[Facts], environment: Mapping[str, str], *, timeout: float
) -> dict[str, str]:
    """The variables for all ranks of ``nodes``, whose answers are ``facts``.

    1. One interface's name, where all nodes reach each other over one of that name; else each rank finds its own when
       it starts (``training.runtime``).
    2. Threads: the cores of the node that has the fewest for each of its ranks.
    3. NCCL's own watchdog waits as long as the run's (``timeout`` seconds), which names the rank that is missing. The
       limit of a collective itself is ``guard.timeout``, with NCCL and with gloo.
    4. What ``environment``, the launching machine's, sets of these goes before.
    """
    found = {"OMP_NUM_THREADS": str(min(max(1, f.cores // node.slots) for node, f in zip(nodes, facts, strict=True)))}
    names = {f.interface for f in facts}
    if len(nodes) > 1 and len(names) == 1 and (name := names.pop()):
        found |= dict.fromkeys(INTERFACE, name)
    found["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] = str(max(60, round(timeout)))
    return found | {name: value for name, value in environment.items() if GIVEN.fullmatch(name)}


def write_deepspeed_env(path: str | Path, variables: Mapping[str, str]) -> None:
    """Write ``NAME=value`` lines, whole or not at all; UserError for a value that a shell would read as code."""
    for name, value in variables.items():
        if not _PLAIN.fullmatch(value):
            raise UserError(
                f"{name}: got {value!r}, wanted letters, digits and @%+=:,./- only, since DeepSpeed's launcher passes "
                "it through a shell; unset it, or set it on every node itself"
            )
    write_atomic(path, "".join(f"{name}={value}\n" for name, value in sorted(variables.items())))
