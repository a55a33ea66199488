"""Environment variables of a job's ranks: what the launching machine shares, and what launchers tell their processes.

``.deepspeed_env`` is how DeepSpeed's launcher forwards variables to other nodes. On CPU hosts that launcher forwards
nothing of itself (0.19.8). It writes the file's values into a remote shell's command line, so only values that a shell
takes for what they are go into it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ase_dist.cluster.facts import Facts
from ase_dist.cluster.hostfile import Node
from ase_dist.cluster.network import interface_for
from ase_dist.errors import UserError
from ase_dist.files import write_atomic

FILE = ".deepspeed_env"
# what a user has set on the launching machine goes to all nodes and is never overruled
GIVEN = re.compile(r"(?:TORCH_)?NCCL_\w+|GLOO_\w+|UCX_\w+|OMP_NUM_THREADS|DS_ACCELERATOR|HF_HUB_OFFLINE|XDG_CACHE_HOME")
INTERFACE = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
DEFAULT_PORT = "29500"
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)


def shared_variables(
    nodes: Sequence[Node], facts: Sequence[Facts], environment: Mapping[str, str], *, timeout: float
) -> dict[str, str]:
    """The variables for all ranks of ``nodes``, whose answers are ``facts``.

    1. One interface's name, where all nodes reach each other over one of that name; else each rank finds its own when
       it starts (``interface_variables``).
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


def task_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK and its like for a task of Slurm's srun or Open MPI's mpirun; empty for one that stands alone.

    Empty as well where RANK or WORLD_SIZE are there already, as under deepspeed and torchrun. Those two launchers name
    no meeting point: MASTER_ADDR must come with the job (``launch/cluster`` has examples).
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return {}
    for names in (_SLURM, _OPEN_MPI):
        values = [environment.get(name, "") for name in names]
        if all(values) and int(values[1]) > 1:
            values[3] = _on_this_node(values[3], int(environment.get("SLURM_NODEID", "0")))
            return {
                **dict(zip(_TORCH, values, strict=True)),
                "MASTER_PORT": environment.get("MASTER_PORT", DEFAULT_PORT),
            }
    return {}


def interface_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The interface for NCCL and gloo, where ranks are on several nodes and nobody has named one.

    It is the one on the way to MASTER_ADDR. Left alone, gloo takes whatever this host's name stands for, which on
    Debian is a loopback address, and NCCL the first that it finds, which may be a container engine's bridge.
    """
    local = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or "1"
    if int(local) >= int(environment.get("WORLD_SIZE", "1")) or "MASTER_ADDR" not in environment:
        return {}
    interface = interface_for(environment["MASTER_ADDR"])
    if interface is None or interface.is_loopback:
        return {}
    return {name: interface.name for name in INTERFACE if name not in environment}


def _on_this_node(counts: str, node: int) -> str:
    """Tasks on a node out of Slurm's list: ``8(x2),4`` are 8 on nodes 0 and 1, and 4 on node 2."""
    expanded: list[str] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        expanded += [count] * int(times or 1)
    return expanded[node] if node < len(expanded) else counts
