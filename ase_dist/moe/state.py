"""A layer's tensors in global order, however its experts are sharded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ase_dist import collectives
from ase_dist.errors import UserError
from ase_dist.moe.layer import MoEFFN


def global_state(layer: MoEFFN) -> dict[str, Tensor]:
    """The trained tensors of the whole layer, detached copies.

    ``router`` [tasks, N, D]; per adapted linear ``fc1.A`` [N, r, D], ``fc1.B`` [N, O, r], ...; for ffn experts
    ``fc1.weight`` [N, H, D], ``fc1.bias`` [N, H], ``fc2.weight`` [N, D, H], ``fc2.bias`` [N, D]. Routed experts come
    first, the S shared ones last. With expert parallelism every rank of the group must call this: it gathers.
    """
    state = {"router": layer.router.weight.detach().clone()}
    shared = {} if layer.shared is None else layer.shared.tensors()
    for name, own in layer.routed.tensors().items():
        full = collectives.all_gather_rows(own.detach(), group=layer.group)[: layer.shard.routed]
        state[name] = torch.cat([full, shared[name].detach()]) if shared else full.clone()
    return state


def load_global_state(layer: MoEFFN, state: Mapping[str, Tensor]) -> None:
    """Copy a whole layer's tensors, as ``global_state`` gives them, into this rank's part of it.

    Raises UserError if names or shapes differ; then nothing has been copied.
    """
    check_global_state(layer, state)
    shared = {} if layer.shared is None else layer.shared.tensors()
    with torch.no_grad():
        layer.router.weight.copy_(state["router"])
        for name, own in layer.routed.tensors().items():
            own[: layer.shard.real].copy_(layer.shard.own(state[name][: layer.shard.routed]))
            if shared:
                shared[name].copy_(state[name][layer.shard.routed :])


def expert_names(tensor: str, ids: Iterable[int], *, count: int) -> list[str]:
    """The names of the stacked ``tensor``'s experts in checkpoints, by global id: "fc1.A.07" where ``count`` is 16."""
    digits = len(str(count - 1))
    return [f"{tensor}.{i:0{digits}}" for i in ids]


def check_global_state(layer: MoEFFN, state: Mapping[str, Tensor]) -> None:
    """Raise UserError unless ``state`` has the names and shapes of ``layer``'s global state."""
    stacked = {name: (layer.num_experts, *own.shape[1:]) for name, own in layer.routed.tensors().items()}
    wanted = {"router": tuple(layer.router.weight.shape), **stacked}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if got != wanted:
        names = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
        first = names[0]
        raise UserError(
            f"global state: {len(names)} tensors differ; {first!r}: got {got.get(first, 'none')}, "
            f"wanted {wanted.get(first, 'none')}"
        )
