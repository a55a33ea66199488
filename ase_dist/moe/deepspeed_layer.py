"""``ASEMoE``: the layer as a ``deepspeed.moe.layer.MoE``, so that the engine finds it and reduces its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from ase_dist import collectives
from ase_dist.errors import UserError, did_you_mean
from ase_dist.moe import deepspeed_compat
from ase_dist.moe.deepspeed_state import from_engine_names, to_engine_names
from ase_dist.moe.layer import MoEFFN, MoEOutput, TaskIndex
from ase_dist.moe.sharding import Shard
from ase_dist.moe.state import global_state, load_global_state

DISPATCHES = ("auto", "local", "all_to_all", "gather")


class ASEMoE(MoE):  # type: ignore[misc]
    """A frozen FFN with LoRA experts and adaptive shared experts, in DeepSpeed's MoE interface.

    Called with x [tasks, ..., D], or with ``task=i`` and [..., D], it returns ``(output, aux_loss, expert_counts)``
    as DeepSpeed's own layer does; ``aux_loss`` is already weighted, ``expert_counts`` is [tasks, N] (or [N]). The
    settings and the errors are those of ``MoEFFN``; beside them:

    ep_size: ranks that share the routed experts, a divisor of the world. At 1 no process group is needed.
    dispatch: ``auto``, ``local`` (ep_size 1), ``all_to_all`` or ``gather``.

    DeepSpeed's constructor is not run: it would build its own gate and a Python list of experts.
    """

    def __init__(
        self,
        base: nn.Module,
        num_experts: int = 16,
        *,
        k: int = 3,
        num_shared: int = 1,
        rank: int = 4,
        num_tasks: int = 5,
        ep_size: int = 1,
        adapt: Sequence[str] = ("fc1", "fc2"),
        gating: str = "ase",
        dispatch: str = "auto",
        alpha: float | None = None,
        experts: str = "lora",
        hidden: int | None = None,
        aux_losses: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        nn.Module.__init__(self)
        _check_parallelism(ep_size, dispatch)
        shard = Shard(num_experts - num_shared, index=_ep_rank(ep_size), count=ep_size)
        self.moe = MoEFFN(
            base,
            num_experts=num_experts,
            k=k,
            num_shared=num_shared,
            rank=rank,
            num_tasks=num_tasks,
            alpha=alpha,
            experts=experts,
            hidden=hidden,
            adapt=adapt,
            gating=gating,
            aux_losses=aux_losses,
            seed=seed,
            shard=shard,
        )
        self.dispatch_choice = "local" if ep_size == 1 else dispatch
        self._undecided = False
        self._in_engine = False
        deepspeed_compat.tag_routed(self.moe.routed.parameters(), ep_size=ep_size)
        # what DeepSpeed's engine reads of a MoE layer
        self.num_experts = num_experts
        self.num_local_experts = shard.slots
        self.ep_size = ep_size
        self.expert_group_name = deepspeed_compat.group_name(ep_size)
        self.enable_expert_tensor_parallelism = False
        self.use_residual = False

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by ``deepspeed.initialize``: take the expert-parallel group and count tokens over all ranks."""
        if use_data_before_expert_parallel_:
            raise UserError(
                "use_data_before_expert_parallelism: experts are sharded over consecutive ranks; set it false"
            )
        self._in_engine = True
        group = deepspeed_compat.expert_parallel_group(self.ep_size)
        self.moe.sync_statistics = True
        if self.ep_size > 1:
            self.moe.group = group
            self._undecided = True

    def forward(
        self, x: Tensor, used_token: Tensor | None = None, *, task: TaskIndex = None, with_stats: bool = False
    ) -> tuple[Tensor, Tensor, Tensor] | MoEOutput:
        """(output, aux_loss, expert_counts), or all of ``MoEOutput`` by name with ``with_stats``.

        ``used_token`` of DeepSpeed's interface is refused: no token is ever dropped here.
        """
        if used_token is not None:
            raise UserError("used_token: this layer drops no tokens; mask the loss instead")
        if self.ep_size > 1:
            self._decide(x)
        result: MoEOutput = self.moe(x, task=task)
        return result if with_stats else result[:3]

    def _decide(self, x: Tensor) -> None:
        """At the first call: which dispatch moves fewer bytes for the mean tokens of the group's ranks (collective)."""
        if self.moe.group is None:
            raise UserError(
                f"ep_size: {self.ep_size} ranks share the experts; call deepspeed.initialize on the model first"
            )
        if not self._undecided:
            return
        own = torch.tensor([x.numel() // x.shape[-1]], device=x.device)
        tokens = collectives.all_gather_rows(own, group=self.moe.group).sum().item() / self.ep_size
        if self.dispatch_choice == "auto":
            self.dispatch_choice = self.moe.layer_shape().cheaper(tokens)
        self.moe.share_experts(self.moe.group, self.dispatch_choice)
        self._undecided = False

    def state_dict(
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The layer's tensors by name; in an engine, by the names that ``engine.save_checkpoint`` wants."""
        state: dict[str, Any] = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self._in_engine:
            to_engine_names(state, prefix=prefix, ep_size=self.ep_size)
        return state

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Take either kind of names; ``load_state_dict`` calls this before the children's."""
        from_engine_names(state, prefix=prefix, ep_size=self.ep_size)
        super()._load_from_state_dict(state, prefix, *arguments)

    def gates(self, x: Tensor, *, task: TaskIndex = None) -> Tensor:
        """Dense gates [tasks, ..., N] of x [tasks, ..., D]; see ``MoEFFN.gates``."""
        return self.moe.gates(x, task=task)

    def global_state(self) -> dict[str, Tensor]:
        """The whole layer's tensors in global order; see ``ase_dist.moe.state.global_state``."""
        return global_state(self.moe)

    def load_global_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy a whole layer's tensors into this rank's part; see ``ase_dist.moe.state.load_global_state``."""
        load_global_state(self.moe, state)


def _check_parallelism(ep_size: int, dispatch: str) -> None:
    if dispatch not in DISPATCHES:
        raise UserError(
            f"dispatch: got {dispatch!r}, wanted one of {list(DISPATCHES)}{did_you_mean(dispatch, DISPATCHES)}"
        )
    if ep_size < 1:
        raise UserError(f"ep_size: got {ep_size}, wanted 1 or more")
    if ep_size > 1 and dispatch == "local":
        raise UserError(f"dispatch: 'local' needs ep_size=1, got ep_size={ep_size}; use 'auto'")
    if ep_size > 1 and not dist.is_initialized():
        raise UserError(f"ep_size: got {ep_size} without a process group; call deepspeed.init_distributed() first")
    if ep_size > 1 and dist.get_world_size() % ep_size:
        raise UserError(f"ep_size: got {ep_size}, wanted a divisor of the world, {dist.get_world_size()} ranks")


def _ep_rank(ep_size: int) -> int:
    """This rank's place in its expert-parallel group: DeepSpeed's groups are runs of consecutive ranks."""
    return dist.get_rank() % ep_size if ep_size > 1 else 0
