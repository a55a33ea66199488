"""How tokens and experts meet: one interface, the same numbers whichever is used.

``local``: all experts are here. ``gather``: experts travel to the tokens. ``all_to_all``: tokens travel to the experts.
"""

from ase_dist.moe.dispatch.all_to_all import AllToAllDispatch
from ase_dist.moe.dispatch.base import Dispatch
from ase_dist.moe.dispatch.cost import LayerShape
from ase_dist.moe.dispatch.gather import GatherDispatch
from ase_dist.moe.dispatch.local import LocalDispatch

__all__ = ["AllToAllDispatch", "Dispatch", "GatherDispatch", "LayerShape", "LocalDispatch"]
