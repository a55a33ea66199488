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
from ase_dist.errors import UserError
from ase_dist.moe.base import FeedForward, FFNForm
from ase_dist.moe.dispatch import Choice, LayerShape, gather_experts, plan_exchange
from ase_dist.moe.experts import FFNExperts, LoRAExperts, RoutedTokens, Tensors
from ase_dist.moe.forms import FormCost
from ase_dist.moe.gating import Gates, check_gating
from ase_dist.moe.losses import check_aux_losses, weighted_router_loss
from ase_dist.moe.router import RoutingSums, TaskRouter, mean_statistics, routing_sums, stacked_sums
from ase_dist.moe.sharding import Shard
from ase_dist.ops import modes
from ase_dist.ops.activations import Activation, GatedActivation
from ase_dist.seeding import derive_seed, drawn_seed

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

    ``base`` is any module with ``fc1``, ``act`` and ``fc2``, or a gated FFN, fc2(act(gate(x)) * up(x)), as
    ``ase_dist.moe.base`` names them; it is frozen and kept. ``num_experts`` counts the shared ones; ``alpha`` scales
    LoRA experts by alpha / rank (None: by 1); ``hidden`` is an ffn expert's width. ``adapt``: fc1, fc2, bypass; of a
    gated base also gate and up, which fc1 is together. ``seed`` None is drawn from torch's generator. Raises UserError
    for settings that contradict each other or the base.
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
        form = FFNForm(base, recomputed=experts == "lora")
        self.num_experts, self.num_shared, self.num_tasks = num_experts, num_shared, num_tasks
        self.kept_tasks = tuple(range(num_tasks))  # those of ``num_tasks`` that ``keep_tasks`` has left, in order
        num_routed = num_experts - num_shared
        self.dim: int = form.fc1.in_features
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
        self._form: FFNForm | None = form if experts == "lora" else None
        self.base: nn.Module | None = None
        self.act: Activation | None = None  # of ffn experts, and which half of theirs is the gate
        self._gate_last: bool | None = None
        self.routed: LoRAExperts | FFNExperts
        self.shared: LoRAExperts | FFNExperts | None
        if experts == "lora":
            if rank < 1 or (alpha is not None and alpha <= 0):
                raise UserError(
                    f"rank, alpha: got {rank}, {alpha}, wanted rank >= 1 and alpha > 0 (None: alpha = rank)"
                )
            self.scale = 1.0 if alpha is None else alpha / rank
            places = form.places(adapt)
            self.base = base.requires_grad_(False)
            self.routed = LoRAExperts(self.shard.ids, places, rank=rank, seed=seed)
            self.shared = LoRAExperts(shared_ids, places, rank=rank, seed=seed) if num_shared else None
        elif experts == "ffn":
            linears = (*getattr(form.fc1, "parts", (form.fc1,)), form.fc2)
            if not all(isinstance(linear, nn.Linear) for linear in linears):
                raise UserError("base: experts='ffn' start from its weights and need its linears to be nn.Linear")
            if form.has_norm:
                raise UserError(
                    "base: experts='ffn' are parts of its hidden units, and its norm is over all of them; take "
                    "experts='lora', which leaves the norm where it is"
                )
            hidden = max(1, form.hidden // max(k + num_shared, 1)) if hidden is None else hidden
            if not 1 <= hidden <= form.hidden:
                raise UserError(f"hidden: got {hidden}, wanted 1 to the base's {form.hidden}")
            self.scale = 1.0
            ends = form.fc1, form.fc2
            self.routed = FFNExperts(self.shard.ids, *ends, hidden=hidden, seed=seed)
            self.shared = FFNExperts(shared_ids, *ends, hidden=hidden, seed=seed) if num_shared else None
            self.act, self._gate_last = form.own_act, form.gate_last
        else:
            raise UserError(f"experts: got {experts!r}, wanted 'lora' or 'ffn'")
        weight: Tensor = form.fc2.weight
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
            and self.routed.stacks_router(x_tTD, self.form, num_routed=self.shard.routed, k=self.k)
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
            self.form.joined_weight.forget()
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

    @property
    def form(self) -> FFNForm:
        """The base under LoRA experts as two linears and what is between them; of another base once that is put in."""
        if self._form is None or self._form.base is not self.base:
            self._form = FFNForm(self.base, recomputed=True)
        return self._form

    def linears_without_experts(self) -> list[str]:
        """The names of the base's linears on which no LoRA experts act; none of ffn experts, which replace it."""
        return self.form.linears_without(tuple(self.routed.places)) if isinstance(self.routed, LoRAExperts) else []

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
        """The tensors of all experts, gathered from other ranks where those have some; None where tokens travel.

        Those of LoRA experts by the linear of the base's form.
        """
        shared = None if self.shared is None else self.shared.by_linear(self.shared.tensors())
        if self.shard.count == 1:
            return _Experts(self.routed.by_linear(self.routed.tensors()), shared)
        if self.group is None:
            raise UserError(
                f"ep_size: {self.shard.count} ranks share the experts; call deepspeed.initialize on the model first"
            )
        if self.dispatch == "all_to_all":
            return None
        gathered = gather_experts(self.routed, num_routed=self.shard.routed, group=self.group)
        return _Experts(self.routed.by_linear(gathered), shared)

    def _apply_experts(self, tokens: RoutedTokens, experts: _Experts | None) -> Tensor:
        """[T, D]: the experts' compute where tokens and experts meet. See ``ase_dist.moe.dispatch``."""
        form = None if self.base is None else self.form
        if form is not None:
            act = form.act
        else:
            assert self.act is not None
            act = self.act if self._gate_last is None else GatedActivation(self.act, gate_last=self._gate_last)
        if experts is not None:
            return self.routed.compute(tokens, form, act, routed=experts.routed, shared=experts.shared)
        assert self.group is not None
        shared = None if self.shared is None else self.shared.tensors()
        exchange = plan_exchange(tokens.gates_TN, tokens.active_TN, self.shard, self.group)
        return self.routed.compute_exchanged(tokens, form, act, shared=shared, exchange=exchange)


def finish_layers(layers: Sequence[MoEFFN], sums: Sequence[RoutingSums]) -> tuple[Tensor, Tensor, Tensor]:
    """Step 4 of several layers: the losses' sum, the counts and the mean gates [L, t, N], from ``with_sums`` of each.

    In one computation, and over ranks in one collective, where the layers have the same settings; they may have seen
    different numbers of tokens.
    """
    settings = [(layer.aux_losses, layer.sync_statistics, layer.training) for layer in layers]
    if all(each == settings[0] for each in settings):
        return layers[0].finish(stacked_sums(sums))
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
