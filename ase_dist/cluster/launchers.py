"""What launchers tell their processes, as the variables that torch reads; the interface for ranks on several nodes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ase_dist.cluster.environment import INTERFACE
from ase_dist.cluster.network import interface_for

DEFAULT_PORT = "29500"
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


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
