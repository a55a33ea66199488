"""How tokens and experts meet on several ranks: the same numbers, different bytes.

``local``: all experts are on this rank. ``gather``: experts are fetched to the tokens. ``all_to_all``: tokens are sent
to the experts. ``auto``: the one of the two that sends fewer bytes (``cost``).
"""

from ase_dist.moe.dispatch.cost import Choice, LayerShape
from ase_dist.moe.dispatch.exchange import TokenExchange, plan_exchange
from ase_dist.moe.dispatch.gather import gather_experts

__all__ = ["Choice", "LayerShape", "TokenExchange", "gather_experts", "plan_exchange"]
