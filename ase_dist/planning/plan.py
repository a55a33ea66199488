"""What each rank of a run would hold and send, computed from shapes alone, for any number of ranks.

Letters: W ranks of the world, P of an expert-parallel group, R = W / P replicas of a routed expert, G micro-steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ase_dist.config import Settings
from ase_dist.errors import UserError
from ase_dist.models import parameter_groups
from ase_dist.moe import MoEFFN
from ase_dist.moe.dispatch import LayerShape
from ase_dist.moe.sharding import Shard
from ase_dist.planning.activations import measure_activations
from ase_dist.planning.flops import bare_model, count_flops
from ase_dist.training.ds_config import ZERO_STAGES, resolve
from ase_dist.training.record.traffic import tokens_per_image

FP32, BF16 = 4, 2  # bytes
MOMENTS = 2  # of Adam, float32


@dataclass(frozen=True)
class ModelSizes:
    """What a plan needs to know about a model that is not sharded.

    ``frozen`` and ``dense`` (trained, without the routed experts) count elements; ``layers`` are the MoE layers at
    expert-parallel size 1 in the run's type; ``width`` is the bytes of a weight; tokens are those of all tasks. FLOPs
    and ``activations`` (bytes kept for the backward pass) are per image. ``forwards`` is how often a micro-step runs
    the blocks forward: 2 with activation checkpointing.
    """

    frozen: int
    dense: int
    layers: tuple[LayerShape, ...]
    width: int
    tokens_per_image: int
    forward_flops: float
    backward_flops: float
    activations: int = 0
    forwards: int = 1

    def sharded(self, ep_size: int) -> tuple[LayerShape, ...]:
        """The MoE layers with their routed experts in ``ep_size`` shards."""
        return tuple(
            replace(layer, ranks=ep_size, slots=Shard(layer.routed, count=ep_size).slots) for layer in self.layers
        )


@dataclass(frozen=True)
class Plan:
    """One rank of one topology: elements and bytes held, bytes sent per optimiser step, seconds.

    ``parameters`` are the elements of weights held, ``trained`` those of them with a gradient before ZeRO divides
    anything. ``wire_dense`` and ``wire_replicas`` are the bytes of gradients and weights that data parallelism sends:
    for everything but the routed experts over the world, and for routed experts over their replicas. ``wire_dispatch``
    and ``step_seconds`` are by dispatch (only ``local`` at expert-parallel size 1); ``crossover`` is the number of
    tokens per rank from which gather is cheaper.
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
    wire_dispatch: Mapping[str, float]
    auto: str
    crossover: float | None
    compute_seconds: float
    step_seconds: Mapping[str, float]

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
    sizes = measure(settings)
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
) -> Plan:
    """The plan of one topology; ``batch`` images per rank and micro-step, ``accumulation`` micro-steps per step."""
    layers = sizes.sharded(ep_size)
    routed = sum(layer.slots * layer.expert_values for layer in layers)
    trained = sizes.dense + routed
    divided = -(-sizes.dense // world) + -(-routed // (world // ep_size))
    held = -(-sizes.frozen // world) + divided if zero == 3 else sizes.frozen + trained
    master = 0 if zero == 0 and sizes.width == FP32 else FP32  # ZeRO 1 to 3 also copy float32 weights
    state = master + MOMENTS * FP32
    common = {"stage": zero, "width": sizes.width, "accumulation": accumulation}
    dense_wire = reduction_bytes(sizes.dense, frozen=sizes.frozen, ranks=world, **common)
    replica_wire = reduction_bytes(routed, ranks=world // ep_size, **common)
    tokens = batch * sizes.tokens_per_image
    dispatch = dispatch_bytes(layers, tokens=tokens, accumulation=accumulation, forwards=sizes.forwards)
    compute = accumulation * batch * (sizes.forwards * sizes.forward_flops + sizes.backward_flops) / flops
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
        wire_dispatch=dispatch,
        auto="/".join(sorted({layer.cheaper(tokens) for layer in layers})) or "none",
        crossover=crossover(layers),
        compute_seconds=compute,
        step_seconds={n: compute + (dense_wire + replica_wire + sent) / bandwidth for n, sent in dispatch.items()},
    )


def reduction_bytes(elements: int, *, frozen: int = 0, ranks: int, stage: int, width: int, accumulation: int) -> float:
    """Bytes that a rank sends per step to keep ``elements`` trained weights equal on ``ranks`` (ring collectives).

    A reduce-scatter or an all-gather of n bytes sends (ranks - 1) / ranks * n. Stages 0 (an all-reduce) and 1 do one
    of each per step, stage 2 reduces in every micro-step, stage 3 (ZeRO, arXiv 1910.02054) also gathers all weights,
    the ``frozen`` ones too, for every forward and backward pass.
    """
    reduced = accumulation * elements if stage >= 2 else elements
    gathered = 2 * accumulation * (elements + frozen) if stage == 3 else elements
    return (ranks - 1) / ranks * width * (reduced + gathered)


def dispatch_bytes(
    layers: Sequence[LayerShape], *, tokens: float, accumulation: int = 1, forwards: int = 1
) -> dict[str, float]:
    """Bytes that a rank with ``tokens`` sends per step for its experts, by dispatch; for all_to_all the expected value.

    A recomputed forward pass sends its part again.
    """
    if all(layer.ranks == 1 for layer in layers):
        return {"local": 0.0}
    passes = (forwards + 1) / 2  # in units of one forward and one backward pass, as the formulas count
    gather = sum(layer.gather_bytes() for layer in layers) * passes
    counts = [layer.all_to_all_bytes(0) for layer in layers]  # exchanged in forward passes only
    tokens_sent = sum(layer.all_to_all_bytes(layer.expected_rows(tokens)) for layer in layers) - sum(counts)
    return {
        "gather": accumulation * gather,
        "all_to_all": accumulation * (tokens_sent * passes + sum(counts) * forwards),
    }


def crossover(layers: Sequence[LayerShape]) -> float | None:
    """Tokens per rank from which gather is cheaper (all layers have one shape); None at expert-parallel size 1."""
    tokens = layers[0].crossover() if layers and layers[0].ranks > 1 else math.inf
    return tokens if math.isfinite(tokens) else None


def measure(settings: Settings) -> ModelSizes:
    """The sizes of the model of ``settings``, built on the meta device; bf16 where ``train.bf16`` is not false.

    Raises UserError as ``build_model`` does.
    """
    model = bare_model(settings)
    width = BF16 if settings.train.bf16 else FP32
    groups = parameter_groups(model)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    layers = [m.layer_shape() for m in model.modules() if isinstance(m, MoEFFN) and m.shard.routed]
    flops = count_flops(settings)
    return ModelSizes(
        frozen=sum(p.numel() for p in model.parameters()) - sum(trained.values()),
        dense=sum(count for name, count in trained.items() if groups[name] != "routed"),
        layers=tuple(replace(layer, element_bytes=width) for layer in layers),
        width=width,
        tokens_per_image=len(model.task_names) * tokens_per_image(model),
        forward_flops=flops.forward,
        backward_flops=flops.backward,
        activations=measure_activations(settings, width=width).kept(settings.model.checkpoint_activations),
        forwards=1 if settings.model.checkpoint_activations == "none" else 2,
    )


def default_ep_sizes(settings: Settings, *, world: int, stages: Sequence[int]) -> list[int]:
    """The settings' own size where it is set; else 1 and those of 2, 4 and 8 that divide the world."""
    moe = settings.model.moe
    if not moe.enabled or 3 in stages:
        return [1]
    return [moe.ep_size] if moe.ep_size > 1 else [size for size in (1, 2, 4, 8) if world % size == 0]
