"""A layer's tensors under the names that DeepSpeed's own ``engine.save_checkpoint`` can store and load.

It writes each expert into a file of its own and knows one by its name alone, ``...deepspeed_experts.3.<tensor>``; the
number is counted from 0 on every rank and made global by the engine. Any other name with "expert" in it, an attribute
above the layer included, it drops in silence, unless the name is that of a router (0.19.8). So stacked tensors are
taken apart into experts here, and everything else goes under the router's name.

The names are those of the first version, in which the layer's tensors stood under ``moe.``.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor

from ase_dist.errors import UserError

EXPERT = "deepspeed_moe.experts.deepspeed_experts."
ROUTER = "deepspeed_moe.gate.wg.weight."
EP_SIZE = f"{ROUTER}ep_size"
ROUTED = "routed."
FIRST_VERSION = "moe."


def to_engine_names(state: MutableMapping[str, Tensor], *, prefix: str, ep_size: int) -> None:
    """Rename the entries of a layer, those under ``prefix``, in place; an expert's tensor stays a view of the stack."""
    for name in [name for name in state if name.startswith(prefix)]:
        tensor, local = state.pop(name), name[len(prefix) :]
        if local.startswith(ROUTED) and len(tensor):
            for slot, row in enumerate(tensor):
                state[f"{prefix}{EXPERT}{slot}.{local.removeprefix(ROUTED)}"] = row
        else:
            state[f"{prefix}{ROUTER}{FIRST_VERSION}{local}"] = tensor
    state[f"{prefix}{EP_SIZE}"] = torch.tensor(ep_size)


def from_engine_names(state: MutableMapping[str, Tensor], *, prefix: str, ep_size: int) -> None:
    """The reverse, in place; entries that have the layer's own names already stay as they are.

    Raises UserError where they were saved with another expert-parallel size: the optimiser's state that belongs to
    them, which this cannot see, would be that of other experts.
    """
    saved = state.pop(f"{prefix}{EP_SIZE}", None)
    if saved is not None and int(saved) != ep_size:
        raise UserError(
            f"load_checkpoint: saved with ep_size={int(saved)}, this layer has ep_size={ep_size}; build it with the "
            "same, or carry the weights over with global_state() and load_global_state()"
        )
    rows: dict[str, dict[int, Tensor]] = {}
    # where the layer is the whole model the engine puts a dot in front of the experts' names alone
    places = (*(f"{prefix}{place}" for place in (EXPERT, ROUTER, FIRST_VERSION)), *([] if prefix else [f".{EXPERT}"]))
    for name in [name for name in state if name.startswith(places)]:
        tensor, local = state.pop(name), name.removeprefix(prefix).removeprefix(".")
        if local.startswith(EXPERT):
            slot, _, tensor_name = local.removeprefix(EXPERT).partition(".")
            rows.setdefault(tensor_name, {})[int(slot)] = tensor
        else:
            state[f"{prefix}{local.removeprefix(ROUTER).removeprefix(FIRST_VERSION)}"] = tensor
    for name, found in rows.items():
        state[f"{prefix}{ROUTED}{name}"] = torch.stack([found[slot] for slot in sorted(found)])
