"""The mixture-of-experts FFN as a plain ``nn.Module`` that knows no DeepSpeed.

Letters: t tasks, T tokens of one task, D width, N experts (routed first, the S shared last), k active routed ones.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ase_dist import collectives
from ase_dist.errors import UserError, did_you_mean
from ase_dist.moe.dispatch import Choice, LayerShape, gather_experts, plan_exchange
from ase_dist.moe.experts import FeedForward, FFNExperts, LoRAExperts, RoutedTokens, Tensors
from ase_dist.moe.forms import FormCost
from ase_dist.moe.gating import Gates, check_gating
from ase_dist.moe.losses import check_aux_losses, weighted_router_loss
from ase_dist.moe.router import RoutingSums, TaskRouter, mean_statistics, routing_sums
from ase_dist.moe.sharding import Shard
from ase_dist.ops import modes
from ase_dist.ops.activations import Activation, CopyFirst, check_activation
from ase_dist.seeding import derive_seed, drawn_seed

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


class _Experts(NamedTuple):
    """The tensors of all routed and of the shared experts, by name."""

    routed: Tensors
    shared: Tensors | None


class MoEFFN(nn.Module):
    """A frozen FFN with N experts on it, of which k routed and S shared ones act on each token.

    1. the task's router gives each token its gates (``gating``: a mode of the paper's comparison)
    2. ``dispatch`` brings tokens and experts together; on one rank they are together already
    3. ``lora`` experts: y = fc2(act(fc1(x))), each adapted linear with its gated low-rank pairs added (Eq. 10);
       ``ffn`` experts: y = the gated sum of feed-forward experts that replace the base
    4. the router losses, over the tokens of all ranks where ``sync_statistics`` is set

    ``base`` is any module with ``fc1``, ``act`` and ``fc2``; it is frozen and kept. ``num_experts`` counts the shared
    ones; ``alpha`` scales LoRA experts by alpha / rank (None: by 1); ``hidden`` is an ffn expert's width. ``seed`` None
    is drawn from torch's generator. Raises UserError for settings that contradict each other or the base.
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
        seed: int | None = None,
        shard: Shard | None = None,
        sync_statistics: bool = False,
    ) -> None:
        seed = drawn_seed() if seed is None else seed
        nn.Module.__init__(self)  # not super(): that of a subclass with DeepSpeed's MoE would build DeepSpeed's experts
        self.k = check_gating(gating, num_experts=num_experts, k=k, num_shared=num_shared)
        check_base(base)
        self.num_experts, self.num_shared, self.num_tasks = num_experts, num_shared, num_tasks
        self.kept_tasks = tuple(range(num_tasks))  # those of ``num_tasks`` that ``keep_tasks`` has left, in order
        num_routed = num_experts - num_shared
        self.dim: int = base.fc1.in_features
        self.aux_losses = dict({"mutual_information": 0.005} if aux_losses is None else aux_losses)
        check_aux_losses(self.aux_losses)
        self.shard = shard or Shard(num_routed)
        self.dispatch: Choice | None = "local"  # None: not decided yet, see ``ASEMoE``
        self.sync_statistics = sync_statistics
        self._group = _SharedGroup(None)
        self.router = TaskRouter(
            self.dim,
            num_experts=num_experts,
            num_tasks=num_tasks,
            k=k,
            num_shared=num_shared,
            gating=gating,
            seed=derive_seed(seed, "router"),
        )
        shared_ids = range(num_routed, num_experts)
        self.base: nn.Module | None = None
        self.act: nn.Module | None = None
        self.routed: LoRAExperts | FFNExperts
        self.shared: LoRAExperts | FFNExperts | None
        if experts == "lora":
            if rank < 1 or (alpha is not None and alpha <= 0):
                raise UserError(
                    f"rank, alpha: got {rank}, {alpha}, wanted rank >= 1 and alpha > 0 (None: alpha = rank)"
                )
            self.scale = 1.0 if alpha is None else alpha / rank
            places = _adapted_shapes(base, adapt)
            self._copy_before_act = check_activation(base.act, width=base.fc1.out_features)
            self.base = base.requires_grad_(False)
            self.routed = LoRAExperts(self.shard.ids, places, rank=rank, seed=seed)
            self.shared = LoRAExperts(shared_ids, places, rank=rank, seed=seed) if num_shared else None
        elif experts == "ffn":
            if not (isinstance(base.fc1, nn.Linear) and isinstance(base.fc2, nn.Linear)):
                raise UserError("base: experts='ffn' start from its weights and need fc1 and fc2 to be nn.Linear")
            width = base.fc1.out_features
            hidden = max(1, width // max(k + num_shared, 1)) if hidden is None else hidden
            if not 1 <= hidden <= width:
                raise UserError(f"hidden: got {hidden}, wanted 1 to the base's {width}")
            self.scale = 1.0
            self.act, self._copy_before_act = base.act, False
            self.routed = FFNExperts(self.shard.ids, base.fc1, base.fc2, hidden=hidden, seed=seed)
            self.shared = FFNExperts(shared_ids, base.fc1, base.fc2, hidden=hidden, seed=seed) if num_shared else None
        else:
            raise UserError(f"experts: got {experts!r}, wanted 'lora' or 'ffn'")
        weight: Tensor = base.fc1.weight
        self.to(weight.device, weight.dtype if weight.is_floating_point() else None)

    def forward(
        self, x: Tensor, *, task: TaskIndex = None, unfinished: bool = False
    ) -> MoEOutput | tuple[Tensor, RoutingSums]:
        """Apply the layer to x [tasks, ..., D]; with ``task`` an index to [..., D], with a list to [len, ..., D].

        ``unfinished`` leaves step 4 to the caller (``with_sums``).
        """
        if modes.is_tracing():
            raise NotImplementedError(
                "torch.jit.trace cannot record this layer; use torch.export, or torch.onnx.export(dynamo=True)"
            )
        if modes.is_transforming() and collectives.world_size() > 1 and (self.shard.count > 1 or self.sync_statistics):
            raise NotImplementedError(
                "torch.func and forward-mode derivatives through collectives: build the layer with ep_size=1 outside "
                "of DeepSpeed's engine, where they are exact"
            )
        x_tTD, tasks = self._streams(x, task)
        own, ranks_TR = self._experts_here(), None
        if (
            own is not None
            and isinstance(self.routed, LoRAExperts)
            and self.routed.stacks_router(x_tTD, self.base, num_routed=self.shard.routed, k=self.k)
        ):
            a = (own.routed["fc1.A"], None if own.shared is None else own.shared["fc1.A"])
            logits_tTN, routing, x_tTD, ranks_TR = self.router(x_tTD, tasks, a)
        else:
            logits_tTN, routing = self.router(x_tTD, tasks)
        gates_TN = routing.gates.flatten(0, 1) if self.scale == 1.0 else routing.gates.flatten(0, 1) * self.scale
        tokens = RoutedTokens(x_tTD.flatten(0, 1), gates_TN, routing.active.flatten(0, 1), self.k, ranks_TR)
        output = self._apply_experts(tokens, own).view_as(x)
        sums = routing_sums(logits_tTN, routing, squared_lse=bool(self.aux_losses.get("z")))
        if unfinished:
            return output, sums
        aux_loss, counts_tN, mean_tN = self.finish(sums)
        if _is_index(task):
            counts_tN, mean_tN = counts_tN[0], mean_tN[0]
        return MoEOutput(output, aux_loss, counts_tN, mean_tN)

    def with_sums(self, x: Tensor, *, task: TaskIndex = None) -> tuple[Tensor, RoutingSums]:
        """Call the layer, hooks included: the output, and the sums from which ``finish`` makes the rest."""
        result: tuple[Tensor, RoutingSums] = self(x, task=task, unfinished=True)
        return result

    def finish(self, sums: RoutingSums) -> tuple[Tensor, Tensor, Tensor]:
        """Step 4: the sum of the weighted losses, the counts and the mean gates [t, N].

        Also of several layers with the settings of this one, from their sums stacked, [L, t, M]: counts and mean gates
        are then [L, t, N], and one collective serves all.
        """
        stats, counts, mean_gates = mean_statistics(sums, over_ranks=self.sync_statistics and self.training)
        return weighted_router_loss(stats, self.aux_losses), counts, mean_gates

    def with_statistics(self, x: Tensor, *, task: TaskIndex = None) -> MoEOutput:
        """Call the layer, hooks included; everything by name, also where ``forward`` returns less (``ASEMoE``)."""
        result: MoEOutput = self(x, task=task)
        return result

    def gates(self, x: Tensor, *, task: TaskIndex = None) -> Tensor:
        """The gates of x [tasks, ..., D] as a dense tensor [tasks, ..., N], 0 where an expert is inactive."""
        x_tTD, tasks = self._streams(x, task)
        routing: Gates = self.router(x_tTD, tasks)[1]
        return routing.gates.view(*x.shape[:-1], self.num_experts)

    def train(self, mode: bool = True) -> MoEFFN:
        """As of any module; the base's weights are then read anew (``ase_dist.ops.stacked.WeightStack``)."""
        if isinstance(self.routed, LoRAExperts):
            self.routed.forget_stacks()
        super().train(mode)
        return self

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drop the routers of all other tasks, for good; those of ``tasks``, no longer trained, count from 0."""
        self.router.weight = nn.Parameter(self.router.weight.detach()[list(tasks)], requires_grad=False)
        self.num_tasks, self.kept_tasks = len(tasks), tuple(self.kept_tasks[task] for task in tasks)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the routed experts in shards; None where this process has all of them."""
        return self._group.group

    def share_experts(self, group: dist.ProcessGroup, dispatch: Choice | None) -> None:
        """Use ``dispatch`` over ``group``, whose ranks hold the routed experts in shards; None: not decided yet."""
        assert self.shard.count == collectives.group_size(group), "the shard was made for another group"
        self._group, self.dispatch = _SharedGroup(group), dispatch

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

    def form_cost(self, device_type: str) -> FormCost | None:
        """What LoRA experts cost on a device, all of them for every token or a token's own; None for ffn experts."""
        if not isinstance(self.routed, LoRAExperts):
            return None
        routed, ranks = self.shard.routed, self.shard.count
        if self.dispatch == "all_to_all":
            routed = min(routed, self.shard.slots * min(ranks, self.k + 1))
        return self.routed.form_cost(num_routed=routed, k=self.k, device_type=device_type)

    def _streams(self, x: Tensor, task: TaskIndex) -> tuple[Tensor, list[int]]:
        """x as [t, T, D] and the tasks of its first axis."""
        try:
            if _is_index(task):
                x, tasks = x.unsqueeze(0), [operator.index(task)]  # type: ignore[arg-type]
            else:
                tasks = list(range(self.num_tasks) if task is None else map(operator.index, task))  # type: ignore[arg-type]
        except TypeError:
            raise UserError(f"task: got {task!r}, wanted the number of a task or a list of them") from None
        if x.dim() < 2 or x.shape[-1] != self.dim or x.shape[0] != len(tasks):
            raise UserError(
                f"x: got shape {list(x.shape)}, wanted [{len(tasks)} tasks, ..., {self.dim}]; for one task give "
                "task=INDEX and [..., D]"
            )
        if any(not 0 <= index < self.num_tasks for index in tasks):
            raise UserError(f"task: got {task}, wanted indices from 0 to {self.num_tasks - 1}")
        return x.reshape(len(tasks), -1, self.dim), tasks

    def _experts_here(self) -> _Experts | None:
        """The tensors of all experts, gathered from other ranks where those have some; None where tokens travel."""
        shared = None if self.shared is None else self.shared.tensors()
        if self.shard.count == 1:
            return _Experts(self.routed.tensors(), shared)
        if self.group is None:
            raise UserError(
                f"ep_size: {self.shard.count} ranks share the experts; call deepspeed.initialize on the model first"
            )
        if self.dispatch == "all_to_all":
            return None
        return _Experts(gather_experts(self.routed, num_routed=self.shard.routed, group=self.group), shared)

    def _apply_experts(self, tokens: RoutedTokens, experts: _Experts | None) -> Tensor:
        """[T, D]: the experts' compute where tokens and experts meet. See ``ase_dist.moe.dispatch``."""
        act: Activation = self.act if self.base is None else self.base.act  # type: ignore[assignment]
        act = CopyFirst(act) if self._copy_before_act else act
        if experts is not None:
            return self.routed.compute(tokens, self.base, act, routed=experts.routed, shared=experts.shared)
        assert self.group is not None
        shared = None if self.shared is None else self.shared.tensors()
        exchange = plan_exchange(tokens.gates_TN, tokens.active_TN, self.shard, self.group)
        return self.routed.compute_exchanged(tokens, self.base, act, shared=shared, exchange=exchange)


def finish_layers(layers: Sequence[MoEFFN], sums: Sequence[RoutingSums]) -> tuple[Tensor, Tensor, Tensor]:
    """Step 4 of several layers: the losses' sum, the counts and the mean gates [L, t, N], from ``with_sums`` of each.

    In one computation, and over ranks in one collective, where the layers have the same settings.
    """
    settings = [(layer.aux_losses, layer.sync_statistics, layer.training) for layer in layers]
    if all(each == settings[0] for each in settings):
        return layers[0].finish(RoutingSums(torch.stack([each.sums_tM for each in sums]), sums[0].tokens))
    losses, counts, mean_gates = zip(*(layer.finish(s) for layer, s in zip(layers, sums, strict=True)), strict=True)
    return torch.stack(losses).sum(), torch.stack(counts), torch.stack(mean_gates)


def _is_index(task: object) -> bool:
    """Whether ``task`` is one number, NumPy's and a tensor of no dimensions included."""
    return isinstance(task, Integral) or getattr(task, "ndim", None) == 0


class _SharedGroup:
    """A process group that copies of a layer share and that pickles leave out: it is of this process only."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, object]) -> _SharedGroup:
        return self

    def __reduce__(self) -> tuple[type[_SharedGroup], tuple[None]]:
        return _SharedGroup, (None,)


def check_base(base: FeedForward) -> None:
    """Raise UserError unless the layer can stand for ``base``'s forward: fc2(act(fc1(x))) and nothing else."""
    kind = type(base).__name__
    missing = [name for name in ("fc1", "act", "fc2") if not hasattr(base, name)]
    if missing:
        raise UserError(
            f"base: {kind} has no {', '.join(missing)}; wanted a module with fc1, act and fc2, which "
            "ase_dist.moe.FFN(fc1, act, fc2) makes of parts with other names"
        )
    for name in ("fc1", "fc2"):
        if not (hasattr(getattr(base, name), "in_features") and hasattr(getattr(base, name), "out_features")):
            raise UserError(
                f"base: {name} of {kind} is a {type(getattr(base, name)).__name__}, wanted a linear with in_features "
                "and out_features; a 1x1 convolution can be rewritten as nn.Linear"
            )
    if base.fc1.out_features != base.fc2.in_features:
        raise UserError(
            f"base: fc1 gives {base.fc1.out_features} features and fc2 takes {base.fc2.in_features}; gated FFNs "
            "(SwiGLU, GEGLU) have another forward and are not supported"
        )
    norm = getattr(base, "norm", None)
    drops = [getattr(base, name, None) for name in ("drop1", "drop2", "drop")]
    if not isinstance(norm, nn.Identity | None) or any(isinstance(d, nn.Dropout) and d.p > 0 for d in drops):
        raise UserError("base: its norm or dropout between fc1 and fc2 would be skipped; build it without them")


def _adapted_shapes(base: FeedForward, adapt: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(input width, output width) of each place that carries LoRA experts."""
    places = (adapt,) if isinstance(adapt, str) else tuple(adapt)
    for place in places:
        if place not in PLACES:
            raise UserError(f"adapt: got {place!r}, wanted some of {list(PLACES)}{did_you_mean(place, PLACES)}")
    if not places or len(set(places)) != len(places):
        raise UserError(f"adapt: got {list(places)}, wanted one or more of {list(PLACES)}, each once")
    ends = {"fc1": (base.fc1, base.fc1), "fc2": (base.fc2, base.fc2), "bypass": (base.fc1, base.fc2)}
    return {place: (ends[place][0].in_features, ends[place][1].out_features) for place in places}
