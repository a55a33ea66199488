"""What each rank of a run would hold and send, computed from shapes alone, for any number of ranks.

Letters: W ranks of the world, P of an expert-parallel group, R = W / P replicas of a routed expert, G micro-steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from ase_dist.config import Settings
from ase_dist.errors import UserError
from ase_dist.planning.balancing import Needs, balancing_collectives, balancing_flops, needs_of
from ase_dist.planning.communication import Collective, crossover, dispatch_bytes, reduction_bytes, step_collectives
from ase_dist.planning.sizes import FP32, ModelSizes, measure
from ase_dist.training.ds_config import ZERO_STAGES, resolve


@dataclass(frozen=True)
class Plan:
    """One rank of one topology: elements and bytes held, bytes sent per optimiser step, seconds.

    ``parameters`` are the elements of weights held, ``trained`` those of them with a gradient before ZeRO divides
    anything. ``wire_dense`` and ``wire_replicas`` are the bytes of gradients and weights that data parallelism sends:
    for everything but the routed experts over the world, and for routed experts over their replicas;
    ``wire_balancing`` is what ``train.balancing`` sends with the dispatch that ``auto`` takes. ``wire_dispatch``
    and ``step_seconds`` are by dispatch (only ``local`` at expert-parallel size 1); ``crossover`` is the number of
    tokens per rank from which gather is cheaper. ``collectives`` are those of a step with the dispatch that ``auto``
    takes; None at ZeRO 3.
    """

    world: int
    ep_size: int
    zero: int
    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    wire_dense: float
    wire_replicas: float
    wire_balancing: float
    wire_dispatch: Mapping[str, float]
    auto: str
    crossover: float | None
    compute_seconds: float
    step_seconds: Mapping[str, float]
    collectives: Sequence[Collective] | None

    @property
    def memory(self) -> int:
        """Bytes of weights, gradients, optimiser state and what a micro-step keeps for its backward pass."""
        return self.weights + self.gradients + self.optimizer + self.activations


def make_plans(
    settings: Settings,
    *,
    world: int,
    ep_sizes: Sequence[int],
    stages: Sequence[int],
    bandwidth: float,
    flops: float,
) -> tuple[ModelSizes, list[Plan]]:
    """A plan for every expert-parallel size and ZeRO stage on ``world`` ranks, and the model sizes behind them.

    ``bandwidth`` in bytes/s that a rank sends, ``flops`` in FLOP/s that it sustains. No process is started and no
    weight allocated. Raises UserError also for what a run of this topology would refuse.
    """
    if world < 1:
        raise UserError(f"--world: got {world}, wanted 1 rank or more")
    for name, value in {"--bandwidth": bandwidth, "--flops": flops}.items():
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name}: got {value:g}, wanted a number above 0")
    for stage in stages:
        if stage not in ZERO_STAGES:
            raise UserError(f"--zero: got {stage}, wanted stages out of {ZERO_STAGES}")
    for size in ep_sizes:
        if size < 1 or world % size:
            raise UserError(f"--ep: got {size}, wanted a divisor of the world, {world} ranks")
        if size > 1 and not settings.model.moe.enabled:
            raise UserError(f"--ep: got {size} without experts; set model.moe.enabled=true, or take 1")
    for ep_size, stage in product(ep_sizes, stages):  # a run would refuse some stages with some sizes
        moe = settings.model.moe.model_copy(update={"ep_size": ep_size})
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"moe": moe})})
        zero = {"zero_optimization": {"stage": stage}}
        settings = resolve(settings, zero, world=world, native_bf16=True).settings
    sizes, needs = measure(settings), needs_of(settings)
    train = settings.train
    return sizes, [
        plan(
            sizes,
            world=world,
            ep_size=ep_size,
            zero=stage,
            batch=train.batch_size,
            accumulation=train.gradient_accumulation_steps,
            bandwidth=bandwidth,
            flops=flops,
            clipping=train.gradient_clipping > 0,
            moments=train.moments,
            balancing=needs,
        )
        for ep_size, stage in product(ep_sizes, stages)
    ]


def plan(
    sizes: ModelSizes,
    *,
    world: int,
    ep_size: int,
    zero: int,
    batch: int,
    accumulation: int,
    bandwidth: float,
    flops: float,
    clipping: bool = True,
    moments: int = 2,
    balancing: Needs | None = None,
) -> Plan:
    """The plan of one topology; ``batch`` images per rank and micro-step, ``accumulation`` micro-steps per step.

    ``moments`` are the float32 values that the optimiser keeps of a trained one: 2 of Adam, 1 of SGD with momentum.
    """
    layers = sizes.sharded(ep_size)
    routed = sum(layer.slots * layer.expert_values for layer in layers)
    trained = sizes.dense + routed
    divided = -(-sizes.dense // world) + -(-routed // (world // ep_size))
    held = -(-sizes.frozen // world) + divided if zero == 3 else sizes.frozen + trained
    master = 0 if zero == 0 and sizes.width == FP32 else FP32  # ZeRO 1 to 3 also copy float32 weights
    state = master + moments * FP32
    common = {"stage": zero, "width": sizes.width, "accumulation": accumulation}
    dense_wire = reduction_bytes(sizes.dense, frozen=sizes.frozen, ranks=world, **common)
    replica_wire = reduction_bytes(routed, ranks=world // ep_size, **common)
    tokens = batch * sizes.tokens_per_image
    dispatch = dispatch_bytes(layers, tokens=tokens, accumulation=accumulation, forwards=sizes.forwards)
    sent = step_collectives(
        sizes,
        world=world,
        ep_size=ep_size,
        zero=zero,
        tokens=tokens,
        accumulation=accumulation,
        clipping=clipping,
    )
    per_image = sizes.forwards * sizes.forward_flops + sizes.backward_flops
    extra: list[Collective] = []
    if balancing is not None:
        per_image += balancing_flops(sizes, balancing)
        extra = balancing_collectives(
            sizes, balancing, world=world, ep_size=ep_size, tokens=tokens, accumulation=accumulation
        )
    wire_balancing = sum(each.sent for each in extra)
    compute = accumulation * batch * per_image / flops
    return Plan(
        world=world,
        ep_size=ep_size,
        zero=zero,
        parameters=held,
        trained=trained,
        weights=held * sizes.width,
        gradients=(divided if zero >= 2 else trained) * sizes.width,
        optimizer=(divided if zero >= 1 else trained) * state,
        activations=batch * sizes.activations,
        wire_dense=dense_wire,
        wire_replicas=replica_wire,
        wire_balancing=wire_balancing,
        wire_dispatch=dispatch,
        auto="/".join(sorted({layer.cheaper(tokens * layer.share) for layer in layers})) or "none",
        crossover=crossover(layers),
        compute_seconds=compute,
        step_seconds={
            n: compute + (dense_wire + replica_wire + wire_balancing + size) / bandwidth for n, size in dispatch.items()
        },
        collectives=None if zero == 3 else [*sent, *extra],
    )


def default_ep_sizes(settings: Settings, *, world: int, stages: Sequence[int]) -> list[int]:
    """The settings' own size where it is set; else 1 and those of 2, 4 and 8 that divide the world."""
    moe = settings.model.moe
    if not moe.enabled or 3 in stages:
        return [1]
    return [moe.ep_size] if moe.ep_size > 1 else [size for size in (1, 2, 4, 8) if world % size == 0]
