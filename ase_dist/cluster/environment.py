"""The environment variables that the ranks of a job get: from a launcher, from ``.deepspeed_env``, from this machine.

DeepSpeed's launcher forwards the variables in ``.deepspeed_env``; on CPU hosts it forwards no others (0.19.8). It
writes the values into a remote shell's command line, so only values that no shell would read as code go into the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ase_dist.cluster.facts import NodeFacts
from ase_dist.cluster.hostfile import Node
from ase_dist.cluster.network import interface_for
from ase_dist.errors import UserError
from ase_dist.files import write_atomic

FILE = ".deepspeed_env"
# How the names begin of variables that DeepSpeed's launcher (0.19.8) exports on all nodes, NCCL only from GPU hosts: it
# writes their values as they are into the command line of a shell there.
EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
PASSWORDS = "MLFLOW"  # among the variables that begin so
# What neither a shell reads as code nor pdsh replaces, as it does %n, %h and %u.
SHELL_SAFE = re.compile(r"[\w@+=:,./-]+", re.ASCII)
DEFAULT_PORT = "29500"
# variables that go from the launching machine to all nodes as the user set them
FORWARDED = re.compile(
    r"(?:TORCH_)?NCCL_\w+|GLOO_\w+|UCX_\w+|OMP_NUM_THREADS|DS_ACCELERATOR|HF_HUB_OFFLINE|XDG_CACHE_HOME"
)
INTERFACE = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def shared_variables(
    nodes: Sequence[Node], facts: Sequence[NodeFacts], environment: Mapping[str, str], *, timeout: float
) -> dict[str, str]:
    """The variables for all ranks of ``nodes``, whose answers are ``facts``.

    1. The interface, where all nodes reach each other over one of the same name; else each rank finds its own when it
       starts (``interface_variables``).
    2. Threads: the cores per rank of the node that has the fewest.
    3. NCCL's own watchdog waits as long as the run's (``timeout`` seconds), which names the rank that is missing. The
       limit of a collective itself is ``guard.timeout``, with NCCL and with gloo.
    4. What ``environment``, the launching machine's, sets of these has precedence.
    """
    found = {"OMP_NUM_THREADS": str(min(max(1, f.cores // node.slots) for node, f in zip(nodes, facts, strict=True)))}
    names = {f.interface for f in facts}
    if len(nodes) > 1 and len(names) == 1 and (name := names.pop()):
        found |= dict.fromkeys(INTERFACE, name)
    found["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] = str(max(60, round(timeout)))
    return found | {name: value for name, value in environment.items() if FORWARDED.fullmatch(name)}


def refused_exports(environment: Mapping[str, str]) -> list[str]:
    """A sentence for each variable that DeepSpeed's launcher would export as shell code, or though it may be secret.

    The values are not shown.
    """
    problems = []
    for name, value in environment.items():
        if name.startswith(PASSWORDS):
            problems.append(f"{name} is set, and DeepSpeed would write it into a command line on every node; unset it")
        elif name.startswith(EXPORTED) and not SHELL_SAFE.fullmatch(name + value):
            problems.append(
                f"{name} holds characters that a shell on every node would read as code; unset it, or set it on every "
                "node itself"
            )
    return problems


def write_deepspeed_env(path: str | Path, variables: Mapping[str, str]) -> None:
    """Write ``NAME=value`` lines atomically; UserError for a value that a shell would read as code."""
    for name, value in variables.items():
        if not SHELL_SAFE.fullmatch(value):
            raise UserError(
                f"{name}: got {value!r}, wanted letters, digits and @+=:,./- only, since DeepSpeed's launcher passes "
                "it through a shell; unset it, or set it on every node itself"
            )
    write_atomic(path, "".join(f"{name}={value}\n" for name, value in sorted(variables.items())))


def task_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and so on for a task of Slurm's srun or Open MPI's mpirun; empty for a single process.

    Also empty where RANK or WORLD_SIZE are set, as under deepspeed and torchrun. srun and mpirun name no meeting point:
    the job must set MASTER_ADDR (``launch/cluster`` has examples).
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return {}
    for names in (_SLURM, _OPEN_MPI):
        values = [environment.get(name, "") for name in names]
        if all(values) and int(values[1]) > 1:
            # Slurm lists the tasks of all nodes: 8(x2),4 are 8 on nodes 0 and 1, and 4 on node 2
            counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", values[3])
            by_node = [count for count, times in counts for _ in range(int(times or 1))]
            node = int(environment.get("SLURM_NODEID", "0"))
            values[3] = by_node[node] if node < len(by_node) else values[3]
            port = environment.get("MASTER_PORT", DEFAULT_PORT)
            return {**dict(zip(_TORCH, values, strict=True)), "MASTER_PORT": port}
    return {}


def interface_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The interface for NCCL and gloo, where ranks are on several nodes and the environment names none.

    It is the one on the route to MASTER_ADDR. By default gloo takes the address of this host's name, which on Debian is
    a loopback address, and NCCL the first interface that it finds, which may be a container engine's bridge.
    """
    local = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or "1"
    if int(local) >= int(environment.get("WORLD_SIZE", "1")) or "MASTER_ADDR" not in environment:
        return {}
    interface = interface_for(environment["MASTER_ADDR"])
    if interface is None or interface.is_loopback:
        return {}
    return {name: interface.name for name in INTERFACE if name not in environment}
