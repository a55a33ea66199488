"""``ASEMoE``: the layer as a ``deepspeed.moe.layer.MoE``, so that the engine finds it and reduces its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from ase_dist import collectives
from ase_dist.errors import UserError, did_you_mean
from ase_dist.moe import deepspeed_compat
from ase_dist.moe.base import FeedForward
from ase_dist.moe.engine_names import from_engine_names, to_engine_names
from ase_dist.moe.experts import LoRAExperts
from ase_dist.moe.layer import MoEFFN, MoEOutput, TaskIndex
from ase_dist.moe.router import RoutingSums
from ase_dist.moe.sharding import Shard
from ase_dist.moe.state import global_state, load_global_state

DISPATCHES = ("auto", "local", "all_to_all", "gather")


class ASEMoE(MoEFFN, MoE):  # type: ignore[misc]
    """A frozen FFN with LoRA experts and adaptive shared experts, in DeepSpeed's MoE interface.

    Called with x [tasks, ..., D], or with ``task=i`` and [..., D], it returns ``(output, aux_loss, expert_counts)``
    as DeepSpeed's own layer does; ``aux_loss`` is already weighted, ``expert_counts`` is [tasks, N] (or [N]). The
    settings and the errors are those of ``MoEFFN``, and:

    ep_size: ranks that share the routed experts, a divisor of the world. At 1 no process group is needed.
    dispatch: ``auto``, ``local`` (ep_size 1), ``all_to_all`` or ``gather``.

    ``auto`` is decided once, for the training batch: by ``decide_dispatch``, or else by the first forward pass in
    training mode. DeepSpeed's constructor is not run: it would build its own gate and a Python list of experts.
    """

    def __init__(
        self,
        base: FeedForward,
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
        seed: int | None = None,
    ) -> None:
        if dispatch not in DISPATCHES:
            near = did_you_mean(dispatch, DISPATCHES)
            raise UserError(f"dispatch: got {dispatch!r}, wanted one of {list(DISPATCHES)}{near}")
        if ep_size < 1:
            raise UserError(f"ep_size: got {ep_size}, wanted 1 or more")
        if ep_size > 1 and dispatch == "local":
            raise UserError(f"dispatch: 'local' needs ep_size=1, got ep_size={ep_size}; use 'auto'")
        if ep_size > 1 and not dist.is_initialized():
            raise UserError(f"ep_size: got {ep_size} without a process group; call deepspeed.init_distributed() first")
        if ep_size > 1 and dist.get_world_size() % ep_size:
            raise UserError(f"ep_size: got {ep_size}, wanted a divisor of the world, {dist.get_world_size()} ranks")
        index = dist.get_rank() % ep_size if ep_size > 1 else 0  # DeepSpeed's groups are runs of consecutive ranks
        shard = Shard(num_experts - num_shared, index=index, count=ep_size)
        super().__init__(
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
        self.dispatch_setting: Any = "local" if ep_size == 1 else dispatch
        self._in_engine = False
        # what DeepSpeed's engine reads of a MoE layer
        self.num_local_experts = shard.slots
        self.ep_size = ep_size
        self.expert_group_name = deepspeed_compat.group_name(ep_size)
        self.enable_expert_tensor_parallelism = False
        self.use_residual = False
        self._tag_parameters()
        self.register_load_state_dict_post_hook(_tag_after_load)  # type: ignore[no-untyped-call]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        used_token: Tensor | None = None,
        *,
        task: TaskIndex = None,
        with_stats: bool = False,
        unfinished: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor] | MoEOutput | tuple[Tensor, RoutingSums]:
        """(output, aux_loss, expert_counts), or all of ``MoEOutput`` by name with ``with_stats``.

        ``used_token`` of DeepSpeed's interface is refused: no token is ever dropped here.
        """
        if used_token is not None:
            raise UserError("used_token: this layer drops no tokens; mask the loss instead")
        undecided = self.dispatch is None
        if undecided:
            own = torch.tensor([x.numel() // x.shape[-1]], device=x.device)
            self.decide_dispatch(collectives.all_gather_rows(own, group=self.group).sum().item() / self.ep_size)
        if isinstance(self.routed, LoRAExperts) and self.base is not None:
            keeps = not any(map(deepspeed_compat.is_partitioned, self.base.parameters()))
            self.routed.keeps_stacks = self.form.joined_weight.keeps = keeps
        result = super().forward(x, task=task, unfinished=unfinished)
        if undecided and not self.training:
            self.dispatch = None  # the batch of an evaluation does not decide for the training
        return result[:3] if isinstance(result, MoEOutput) and not with_stats else result

    def with_statistics(self, x: Tensor, *, task: TaskIndex = None) -> MoEOutput:
        """See ``MoEFFN.with_statistics``."""
        result: MoEOutput = self(x, task=task, with_stats=True)
        return result

    # -----------------------------------------------------------------------------------------------------------------
    # In DeepSpeed's engine

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by ``deepspeed.initialize``: take the expert-parallel group and count tokens over all ranks."""
        if use_data_before_expert_parallel_:
            raise UserError(
                "use_data_before_expert_parallelism: experts are sharded over consecutive ranks; set it false"
            )
        self._tag_parameters()
        deepspeed_compat.require_expert_groups(self.routed.parameters(), ep_size=self.ep_size)
        self._in_engine = True
        self.sync_statistics = True
        group = deepspeed_compat.expert_parallel_group(self.ep_size)
        if self.ep_size > 1:
            self.share_experts(group, None if self.dispatch_setting == "auto" else self.dispatch_setting)

    def decide_dispatch(self, tokens: float) -> None:
        """Settle ``dispatch="auto"`` for batches of ``tokens``, of all tasks, on each rank: the one with fewer bytes.

        All ranks must give the same number. Does nothing where a dispatch was asked for by name.
        """
        if self.ep_size > 1 and self.dispatch_setting == "auto":
            self.dispatch = self.layer_shape().cheaper(tokens)

    def _tag_parameters(self) -> None:
        """Mark the routed experts as sharded for DeepSpeed, by attributes that copying a parameter loses."""
        deepspeed_compat.tag_routed(self.routed.parameters(), ep_size=self.ep_size)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, whose parameters have lost their tags."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._tag_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ASEMoE:
        """``to``, ``half`` and others, which may make new parameters."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if hasattr(self, "expert_group_name"):
            self._tag_parameters()
        return self

    # -----------------------------------------------------------------------------------------------------------------
    # State

    def state_dict(self, *, prefix: str = "", **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """The layer's tensors by name; in an engine, by the names that ``engine.save_checkpoint`` wants."""
        state: dict[str, Any] = super().state_dict(prefix=prefix, **options)
        if self._in_engine:
            to_engine_names(state, prefix=prefix, ep_size=self.ep_size)
        return state

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Take either kind of names; ``load_state_dict`` calls this before the children's."""
        from_engine_names(state, prefix=prefix, ep_size=self.ep_size)
        super()._load_from_state_dict(state, prefix, *arguments)

    def global_state(self) -> dict[str, Tensor]:
        """The whole layer's tensors in global order; see ``ase_dist.moe.state.global_state``."""
        return global_state(self)

    def load_global_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy a whole layer's tensors into this rank's part; see ``ase_dist.moe.state.load_global_state``."""
        load_global_state(self, state)

    @property
    def moe(self) -> MoEFFN:
        """The layer itself, for code written when it wrapped a plain one."""
        return self


def _tag_after_load(layer: nn.Module, _: object) -> None:
    """After ``load_state_dict``, which with ``assign=True`` puts other parameters in place."""
    assert isinstance(layer, ASEMoE)
    layer._tag_parameters()
