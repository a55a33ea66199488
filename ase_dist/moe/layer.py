"""The mixture-of-experts FFN as a plain ``nn.Module`` that knows no DeepSpeed.

Letters: t tasks, T tokens of one task, D width, N experts (routed first, the S shared last), k active routed ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from ase_dist import collectives
from ase_dist.errors import UserError, did_you_mean
from ase_dist.moe.dispatch import AllToAllDispatch, Dispatch, GatherDispatch, LayerShape, LocalDispatch
from ase_dist.moe.dispatch.base import FeedForward, Routed
from ase_dist.moe.experts import FFNExperts, LoRAExperts
from ase_dist.moe.gating import Gates, check_gating
from ase_dist.moe.losses import check_aux_losses, weighted_router_loss
from ase_dist.moe.router import TaskRouter, router_statistics
from ase_dist.moe.sharding import Shard
from ase_dist.seeding import derive_seed

PLACES = ("fc1", "fc2", "bypass")
TaskIndex = int | Sequence[int] | None


class MoEOutput(NamedTuple):
    """What the layer computes; the statistics are those of this process's tokens and carry no gradient.

    ``output`` has the input's shape, ``aux_loss`` is the weighted sum of the router losses (a scalar),
    ``expert_counts`` [t, N] int64 the tokens for which an expert was active, ``mean_gates`` [t, N] float32. With a
    single task given by number the last two are [N].
    """

    output: Tensor
    aux_loss: Tensor
    expert_counts: Tensor
    mean_gates: Tensor


class MoEFFN(nn.Module):
    """A frozen FFN with N experts on it, of which k routed and S shared ones act on each token.

    1. the task's router gives each token its gates (``gating``: a row of the paper's table)
    2. the dispatch brings tokens and experts together
    3. ``lora`` experts: y = fc2(act(fc1(x))), each adapted linear with its gated low-rank pairs added (Eq. 10);
       ``ffn`` experts: y = the gated sum of feed-forward experts that replace the base
    4. the router losses, over the tokens of all ranks where ``sync_statistics`` is set

    ``base`` is any module with ``fc1``, ``act`` and ``fc2``; it is frozen and kept. Raises UserError for settings
    that contradict each other or the base.
    """

    def __init__(
        self,
        base: FeedForward,
        *,
        num_experts: int = 16,
        k: int = 3,
        num_shared: int = 1,
        rank: int = 4,
        num_tasks: int = 5,
        alpha: float | None = None,
        experts: str = "lora",
        hidden: int | None = None,
        adapt: Sequence[str] = ("fc1", "fc2"),
        gating: str = "ase",
        aux_losses: Mapping[str, float] | None = None,
        seed: int = 0,
        shard: Shard | None = None,
    ) -> None:
        super().__init__()
        self.k = check_gating(gating, num_experts=num_experts, k=k, num_shared=num_shared)
        check_base(base)
        self.num_experts, self.num_shared, self.num_tasks = num_experts, num_shared, num_tasks
        routed = num_experts - num_shared
        self.dim: int = base.fc1.in_features
        self.aux_losses = dict({"mutual_information": 0.005} if aux_losses is None else aux_losses)
        check_aux_losses(self.aux_losses)
        self.shard = shard or Shard(routed)
        self.dispatch: Dispatch = LocalDispatch()
        self.group: dist.ProcessGroup | None = None
        self.sync_statistics = False
        self.router = TaskRouter(
            self.dim,
            num_experts=num_experts,
            num_tasks=num_tasks,
            k=k,
            num_shared=num_shared,
            gating=gating,
            seed=derive_seed(seed, "router"),
        )
        shared_ids = range(routed, num_experts)
        self.base: nn.Module | None = None
        self.act: nn.Module | None = None
        self.routed: LoRAExperts | FFNExperts
        self.shared: LoRAExperts | FFNExperts | None
        if experts == "lora":
            self.scale = _lora_scale(rank, alpha)
            places = {place: _place_shape(base, place) for place in _check_adapt(adapt)}
            self.base = base.requires_grad_(False)
            self.routed = LoRAExperts(self.shard.ids, places, rank=rank, seed=seed)
            self.shared = LoRAExperts(shared_ids, places, rank=rank, seed=seed) if num_shared else None
        elif experts == "ffn":
            self.scale = 1.0
            self.act = base.act
            fc1, fc2, width = _check_ffn(base, hidden, active=k + num_shared)
            self.routed = FFNExperts(self.shard.ids, fc1, fc2, hidden=width, seed=seed)
            self.shared = FFNExperts(shared_ids, fc1, fc2, hidden=width, seed=seed) if num_shared else None
        else:
            raise UserError(f"experts: got {experts!r}, wanted 'lora' or 'ffn'")
        self.to(base.fc1.weight.device, base.fc1.weight.dtype if base.fc1.weight.is_floating_point() else None)

    def forward(self, x: Tensor, *, task: TaskIndex = None) -> MoEOutput:
        """Apply the layer to x [tasks, ..., D]; with ``task`` an index to [..., D], with a list to [len, ..., D]."""
        x_tTD, tasks = self._streams(x, task)
        logits_tTN, routing = self.router(x_tTD, tasks)
        y_TD = self._mix(x_tTD.flatten(0, 1), routing)
        stats = router_statistics(logits_tTN, routing, over_ranks=self.sync_statistics and self.training)
        aux_loss = weighted_router_loss(stats, self.aux_losses)
        counts_tN = routing.active.sum(dim=1)
        gates_tN = routing.gates.detach().sum(dim=1) / max(x_tTD.shape[1], 1)
        if isinstance(task, int):
            counts_tN, gates_tN = counts_tN[0], gates_tN[0]
        return MoEOutput(y_TD.view_as(x), aux_loss, counts_tN, gates_tN)

    def gates(self, x: Tensor, *, task: TaskIndex = None) -> Tensor:
        """The gates of x [tasks, ..., D] as a dense tensor [tasks, ..., N], 0 where an expert is inactive."""
        x_tTD, tasks = self._streams(x, task)
        routing: Gates = self.router(x_tTD, tasks)[1]
        return routing.gates.view(*x.shape[:-1], self.num_experts)

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drop the routers of all other tasks, for good; those of ``tasks``, no longer trained, count from 0."""
        self.router.weight = nn.Parameter(self.router.weight.detach()[list(tasks)], requires_grad=False)
        self.num_tasks = len(tasks)

    def layer_shape(self) -> LayerShape:
        """The sizes from which the cost of a dispatch follows."""
        one_expert = [tensor[0] for tensor in self.routed.tensors().values()]
        return LayerShape(
            routed=self.shard.routed,
            active=self.k,
            slots=self.shard.slots,
            ranks=self.shard.count,
            values_per_token=self.routed.values_per_token,
            expert_values=sum(tensor.numel() for tensor in one_expert),
            element_bytes=one_expert[0].element_size(),
        )

    def share_experts(self, group: dist.ProcessGroup, dispatch: str) -> None:
        """Use ``dispatch`` ("gather" or "all_to_all") over ``group``, whose ranks hold the routed experts in shards."""
        assert self.shard.count == collectives.group_size(group), "the shard was made for another group"
        self.group = group
        kind = {"gather": GatherDispatch, "all_to_all": AllToAllDispatch}[dispatch]
        self.dispatch = kind(self.routed, group=group, shard=self.shard)  # type: ignore[assignment]

    def _streams(self, x: Tensor, task: TaskIndex) -> tuple[Tensor, list[int]]:
        """x as [t, T, D] and the tasks of its first axis."""
        if isinstance(task, int):
            x = x.unsqueeze(0)
            tasks = [task]
        else:
            tasks = list(range(self.num_tasks)) if task is None else list(task)
        if x.dim() < 2 or x.shape[-1] != self.dim or x.shape[0] != len(tasks):
            raise UserError(
                f"x: got shape {list(x.shape)}, wanted [{len(tasks)} tasks, ..., {self.dim}]; for one task give "
                "task=INDEX and [..., D]"
            )
        if any(not 0 <= index < self.num_tasks for index in tasks):
            raise UserError(f"task: got {task}, wanted indices from 0 to {self.num_tasks - 1}")
        return x.reshape(len(tasks), -1, self.dim), tasks

    def _mix(self, x_TD: Tensor, routing: Gates) -> Tensor:
        gates_tTN = routing.gates if self.scale == 1.0 else routing.gates * self.scale
        gates_TN = gates_tTN.flatten(0, 1)
        tokens = Routed(x_TD, gates_TN, routing.active.flatten(0, 1), self.k, self.num_shared)
        if isinstance(self.routed, LoRAExperts):
            assert self.base is not None and not isinstance(self.shared, FFNExperts)
            return self.dispatch.lora(tokens, self.base, self.routed, self.shared)
        assert self.act is not None and not isinstance(self.shared, LoRAExperts)
        return self.dispatch.ffn(tokens, self.act, self.routed, self.shared)


def check_base(base: FeedForward) -> None:
    """Raise UserError unless the layer can stand for ``base``'s forward: fc2(act(fc1(x))) and nothing else."""
    missing = [name for name in ("fc1", "act", "fc2") if not hasattr(base, name)]
    if missing:
        raise UserError(f"base: {type(base).__name__} has no {', '.join(missing)}; wanted a module with fc1, act, fc2")
    if base.fc1.out_features != base.fc2.in_features:
        raise UserError(
            f"base: fc1 gives {base.fc1.out_features} features and fc2 takes {base.fc2.in_features}; gated FFNs "
            "(SwiGLU, GEGLU) have another forward and are not supported"
        )
    norm = getattr(base, "norm", None)
    drops = [getattr(base, name, None) for name in ("drop1", "drop2", "drop")]
    if not isinstance(norm, nn.Identity | None) or any(isinstance(d, nn.Dropout) and d.p > 0 for d in drops):
        raise UserError("base: its norm or dropout between fc1 and fc2 would be skipped; build it without them")


def _check_adapt(adapt: Sequence[str]) -> tuple[str, ...]:
    places = (adapt,) if isinstance(adapt, str) else tuple(adapt)
    for place in places:
        if place not in PLACES:
            raise UserError(f"adapt: got {place!r}, wanted some of {list(PLACES)}{did_you_mean(place, PLACES)}")
    if not places or len(set(places)) != len(places):
        raise UserError(f"adapt: got {list(places)}, wanted one or more of {list(PLACES)}, each once")
    return places


def _place_shape(base: FeedForward, place: str) -> tuple[int, int]:
    if place == "bypass":
        return base.fc1.in_features, base.fc2.out_features
    linear = getattr(base, place)
    return linear.in_features, linear.out_features


def _lora_scale(rank: int, alpha: float | None) -> float:
    if rank < 1 or (alpha is not None and alpha <= 0):
        raise UserError(f"rank, alpha: got {rank}, {alpha}, wanted rank >= 1 and alpha > 0 (None: alpha = rank)")
    return 1.0 if alpha is None else alpha / rank


def _check_ffn(base: FeedForward, hidden: int | None, *, active: int) -> tuple[nn.Linear, nn.Linear, int]:
    fc1, fc2 = base.fc1, base.fc2
    if not (isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)):
        raise UserError("base: experts='ffn' start from its weights and need fc1 and fc2 to be nn.Linear")
    width = fc1.out_features
    hidden = max(1, width // max(active, 1)) if hidden is None else hidden
    if not 1 <= hidden <= width:
        raise UserError(f"hidden: got {hidden}, wanted 1 to the base's {width}")
    return fc1, fc2, hidden
