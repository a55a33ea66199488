"""Mixture-of-experts layers: routers, experts, dispatch, and their form for DeepSpeed. Usable alone.

``ASEMoE`` extends ``deepspeed.moe.layer.MoE``; ``MoEFFN`` is the same layer as a plain module without DeepSpeed.
``TaskFFN`` puts either where a model of another library expects its FFN, ``FFN`` gives that library's the names wanted.
"""

from typing import TYPE_CHECKING

from ase_dist.moe.layer import MoEFFN, MoEOutput
from ase_dist.moe.state import global_state, load_global_state
from ase_dist.moe.task_ffn import FFN, TaskFFN, router_loss, set_tasks

if TYPE_CHECKING:
    from ase_dist.moe.deepspeed_compat import optimizer_groups
    from ase_dist.moe.deepspeed_layer import ASEMoE

__all__ = [
    "FFN",
    "ASEMoE",
    "MoEFFN",
    "MoEOutput",
    "TaskFFN",
    "global_state",
    "load_global_state",
    "optimizer_groups",
    "router_loss",
    "set_tasks",
]


def __getattr__(name: str) -> object:
    """Import what needs DeepSpeed on demand, so that the plain layer works where that is not installed."""
    if name == "ASEMoE":
        from ase_dist.moe.deepspeed_layer import ASEMoE

        return ASEMoE
    if name == "optimizer_groups":
        from ase_dist.moe.deepspeed_compat import optimizer_groups

        return optimizer_groups
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
