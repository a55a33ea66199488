"""Mixture-of-experts layers: routers, experts, dispatch, and DeepSpeed's face of them. Usable alone.

``ASEMoE`` extends ``deepspeed.moe.layer.MoE``; ``MoEFFN`` is the same layer as a plain module without DeepSpeed.
"""

from typing import TYPE_CHECKING

from ase_dist.moe.layer import MoEFFN, MoEOutput
from ase_dist.moe.state import global_state, load_global_state

if TYPE_CHECKING:
    from ase_dist.moe.deepspeed_layer import ASEMoE

__all__ = ["ASEMoE", "MoEFFN", "MoEOutput", "global_state", "load_global_state"]


def __getattr__(name: str) -> object:
    """Import ``ASEMoE`` on demand, so that the plain layer works where DeepSpeed is not installed."""
    if name == "ASEMoE":
        from ase_dist.moe.deepspeed_layer import ASEMoE

        return ASEMoE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
