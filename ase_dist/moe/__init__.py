"""Mixture-of-experts layers: routers, experts, dispatch, and their form for DeepSpeed. Usable alone.

``ASEMoE`` extends ``deepspeed.moe.layer.MoE``; ``MoEFFN`` is the same layer as a plain module without DeepSpeed.
``TaskFFN`` puts either where a model of another library expects its FFN, ``FFN`` and ``GatedFFN`` give that
library's the names wanted.
``adapter_state`` and ``save_adapters`` take what was trained out of any model, without the model.
"""

from typing import TYPE_CHECKING

from ase_dist.moe.adapters import adapter_state, load_adapter_state, load_adapters, save_adapters
from ase_dist.moe.base import FFN, GatedFFN
from ase_dist.moe.layer import MoEFFN, MoEOutput
from ase_dist.moe.state import global_state, load_global_state
from ase_dist.moe.task_ffn import TaskFFN, router_loss, set_tasks

if TYPE_CHECKING:
    from ase_dist.moe.deepspeed_compat import optimizer_groups
    from ase_dist.moe.deepspeed_layer import ASEMoE

__all__ = [
    "FFN",
    "ASEMoE",
    "GatedFFN",
    "MoEFFN",
    "MoEOutput",
    "TaskFFN",
    "adapter_state",
    "global_state",
    "load_adapter_state",
    "load_adapters",
    "load_global_state",
    "optimizer_groups",
    "router_loss",
    "save_adapters",
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
