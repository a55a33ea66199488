"""What a run would hold and send on every rank, worked out from shapes alone: for worlds that are not at hand.

Letters: W ranks of the world, P of an expert-parallel group, R = W / P replicas of a routed expert, G micro-steps.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch

from ase_dist.config import Settings
from ase_dist.models import MultiTaskViT, build_model, parameter_groups
from ase_dist.models.heads import PUPHead
from ase_dist.moe import MoEFFN
from ase_dist.moe.dispatch import LayerShape
from ase_dist.moe.sharding import Shard
from ase_dist.tasks import select_tasks
from ase_dist.training.console import table
from ase_dist.training.ds_config import ZERO_STAGES, resolve

FP32, BF16 = 4, 2  # bytes
MOMENTS = 2  # of Adam, float32
DISPATCHES = ("gather", "all_to_all")
MB = 1e6
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, by group size


@dataclass(frozen=True)
class ModelSizes:
    """What a plan needs of a model, all of it on one rank.

    ``frozen`` and ``dense`` (trained, without the routed experts) are elements; ``layers`` the MoE layers at size 1 in
    the run's type; ``width`` bytes of a weight; tokens are those of all tasks; FLOPs are of one image. ``forwards`` is
    how often a micro-step runs the blocks forward: 2 with activation checkpointing.
    """

    frozen: int
    dense: int
    layers: tuple[LayerShape, ...]
    width: int
    tokens_per_image: int
    forward_flops: float
    backward_flops: float
    forwards: int = 1

    def sharded(self, ep_size: int) -> tuple[LayerShape, ...]:
        """The MoE layers with their routed experts in ``ep_size`` shards."""
        return tuple(
            replace(layer, ranks=ep_size, slots=Shard(layer.routed, count=ep_size).slots) for layer in self.layers
        )


@dataclass(frozen=True)
class Plan:
    """One rank of one topology. Elements and bytes that it holds, bytes that it sends per optimiser step, seconds.

    ``parameters`` are the elements of weights at hand, ``trained`` those of them with a gradient before ZeRO divides
    anything. ``wire_dense`` and ``wire_replicas`` are gradients and weights that data parallelism moves: of all but the
    routed experts over the world, and of those over their replicas. ``wire_dispatch`` and ``step_seconds`` are by
    dispatch (only ``local`` at expert-parallel size 1), ``crossover`` the tokens per rank from which gather is cheaper.
    """

    world: int
    ep_size: int
    zero: int
    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    wire_dense: float
    wire_replicas: float
    wire_dispatch: Mapping[str, float]
    auto: str
    crossover: float | None
    compute_seconds: float
    step_seconds: Mapping[str, float]

    @property
    def memory(self) -> int:
        """Bytes of weights, gradients and optimiser state; activations come on top."""
        return self.weights + self.gradients + self.optimizer


def make_plans(
    settings: Settings,
    *,
    world: int,
    ep_sizes: Sequence[int],
    stages: Sequence[int],
    bandwidth: float,
    flops: float,
) -> tuple[ModelSizes, list[Plan]]:
    """A plan for every expert-parallel size and ZeRO stage on ``world`` ranks, and the sizes that they rest on.

    ``bandwidth`` in bytes/s that a rank sends, ``flops`` in FLOP/s that it sustains. Nothing is started and no weight
    is made. Raises ValueError for what a run of this topology would refuse, too.
    """
    _check(settings, world=world, ep_sizes=ep_sizes, stages=stages, bandwidth=bandwidth, flops=flops)
    for ep_size, stage in product(ep_sizes, stages):
        settings = _resolved(settings, world=world, ep_size=ep_size, stage=stage)
    sizes = measure(settings)
    train = settings.train
    return sizes, [
        plan(sizes, world=world, ep_size=ep_size, zero=stage, batch=train.batch_size,
             accumulation=train.gradient_accumulation_steps, bandwidth=bandwidth, flops=flops)
        for ep_size, stage in product(ep_sizes, stages)
    ]  # fmt: skip


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
    """One topology; ``batch`` images per rank and micro-step, of which ``accumulation`` make a step."""
    layers = sizes.sharded(ep_size)
    routed = sum(layer.slots * layer.expert_values for layer in layers)
    trained = sizes.dense + routed
    divided = -(-sizes.dense // world) + -(-routed // (world // ep_size))
    held = -(-sizes.frozen // world) + divided if zero == 3 else sizes.frozen + trained
    master = 0 if zero == 0 and sizes.width == FP32 else FP32  # ZeRO 1 to 3 keep copies of float32 weights, too
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
        wire_dense=dense_wire,
        wire_replicas=replica_wire,
        wire_dispatch=dispatch,
        auto="/".join(sorted({layer.cheaper(tokens) for layer in layers})) or "none",
        crossover=_crossover(layers),
        compute_seconds=compute,
        step_seconds={n: compute + (dense_wire + replica_wire + sent) / bandwidth for n, sent in dispatch.items()},
    )


def reduction_bytes(elements: int, *, frozen: int = 0, ranks: int, stage: int, width: int, accumulation: int) -> float:
    """Bytes that a rank sends per step so that ``ranks`` agree on ``elements`` trained weights (ring collectives).

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
    """Bytes that a rank of ``tokens`` sends per step for its experts, by dispatch; all_to_all's are an expectation.

    A recomputed forward pass sends its share again.
    """
    if all(layer.ranks == 1 for layer in layers):
        return {"local": 0.0}
    passes = (forwards + 1) / 2  # of the formulas' forward and backward pass
    gather = sum(layer.gather_bytes() for layer in layers) * passes
    counts = [layer.all_to_all_bytes(0) for layer in layers]  # exchanged going forward only
    rows = sum(layer.all_to_all_bytes(layer.expected_rows(tokens)) for layer in layers) - sum(counts)
    return {"gather": accumulation * gather, "all_to_all": accumulation * (rows * passes + sum(counts) * forwards)}


def _crossover(layers: Sequence[LayerShape]) -> float | None:
    """That of the first layer, whose shape all share; None where tokens never travel."""
    crossover = layers[0].crossover() if layers and layers[0].ranks > 1 else math.inf
    return crossover if math.isfinite(crossover) else None


# ---------------------------------------------------------------------------------------------------------------------
# Sizes of a model that is not made


def measure(settings: Settings) -> ModelSizes:
    """The sizes of the model of ``settings``, built on the meta device; bf16 where ``train.bf16`` is not false.

    Pretrained weights are not read: they change no size. Raises ValueError as ``build_model`` does.
    """
    bare = _with_model(settings, pretrained="none")
    with torch.device("meta"):
        model = build_model(bare, select_tasks(settings.data.name, settings.tasks), expert_layer="plain")
    width = BF16 if settings.train.bf16 else FP32
    groups = parameter_groups(model)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    layers = [m.layer_shape() for m in model.modules() if isinstance(m, MoEFFN) and m.shard.routed]
    forward, backward = count_flops(model, groups)
    return ModelSizes(
        frozen=sum(p.numel() for p in model.parameters()) - sum(trained.values()),
        dense=sum(count for name, count in trained.items() if groups[name] != "routed"),
        layers=tuple(replace(layer, element_bytes=width) for layer in layers),
        width=width,
        tokens_per_image=len(model.task_names) * _stream_tokens(model),
        forward_flops=forward,
        backward_flops=backward,
        forwards=1 if settings.model.checkpoint_activations == "none" else 2,
    )


def count_flops(model: MultiTaskViT, groups: Mapping[str, str]) -> tuple[float, float]:
    """FLOPs of one image, forward and backward: two for each use of a weight, and attention's two products.

    Backward is once more for the inputs' gradients, and once for those of trained weights. LoRA experts compute
    densely in rank space, of the feed-forward ones the active k of the routed; biases, norms and gates are left out.
    """
    pixels = _head_pixels(model)
    tasks, tokens = len(model.task_names), _stream_tokens(model)
    forward = backward = 0.0
    for name, parameter in model.named_parameters():
        uses = pixels.get(id(parameter), 0.0)
        if name.startswith("stem.") and parameter.dim() == 4:  # the patch embedding, once for all tasks
            uses = _patches(model)
        elif name.startswith("blocks.") and parameter.dim() >= 2 and not name.endswith("bias"):
            uses = tasks * tokens * _share_used(model, groups[name], tasks)
        products = 2.0 * parameter.numel() * uses
        forward += products
        backward += products * (not name.startswith("stem.")) + products * parameter.requires_grad
    attention = 4.0 * tokens**2 * model.stem.embed_dim * tasks * len(model.blocks)
    return forward + attention, backward + 2 * attention


def _share_used(model: MultiTaskViT, group: str, tasks: int) -> float:
    """Of a block's weights in ``group``, the share that one token meets."""
    if group == "router":
        return 1.0 / tasks
    core = next((m for m in model.modules() if isinstance(m, MoEFFN)), None)
    if core is not None and group == "routed" and core.base is None:  # feed-forward experts
        return core.k / core.shard.routed
    return 1.0


def _head_pixels(model: MultiTaskViT) -> dict[int, float]:
    """By id of a head's weight: at how many places of an image it is used."""
    patches = _patches(model)
    pixels = {id(p): float(patches) for head in model.heads.values() for p in head.parameters() if p.dim() >= 2}
    for head in model.heads.values():
        if isinstance(head, PUPHead):
            convs = [*head.convs, head.last]
            for stage, conv in enumerate(convs):
                pixels[id(conv.weight)] = float(patches * 4 ** min(stage, len(convs) - 2))
    return pixels


def _patches(model: MultiTaskViT) -> int:
    return math.prod(next(iter(model.heads.values())).grid)  # type: ignore[arg-type]


def _stream_tokens(model: MultiTaskViT) -> int:
    return model.prefix + _patches(model)


# ---------------------------------------------------------------------------------------------------------------------
# What can be planned


def default_ep_sizes(settings: Settings, *, world: int, stages: Sequence[int]) -> list[int]:
    """The settings' own size where it is set; else 1 and those of 2, 4 and 8 that divide the world."""
    moe = settings.model.moe
    if not moe.enabled or 3 in stages:
        return [1]
    return [moe.ep_size] if moe.ep_size > 1 else [size for size in (1, 2, 4, 8) if world % size == 0]


def _check(
    settings: Settings, *, world: int, ep_sizes: Sequence[int], stages: Sequence[int], bandwidth: float, flops: float
) -> None:
    if world < 1:
        raise ValueError(f"--world: got {world}, wanted 1 rank or more")
    for name, value in {"--bandwidth": bandwidth, "--flops": flops}.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: got {value:g}, wanted a number above 0")
    for stage in stages:
        if stage not in ZERO_STAGES:
            raise ValueError(f"--zero: got {stage}, wanted stages out of {ZERO_STAGES}")
    for size in ep_sizes:
        if size < 1 or world % size:
            raise ValueError(f"--ep: got {size}, wanted a divisor of the world, {world} ranks")
        if size > 1 and not settings.model.moe.enabled:
            raise ValueError(f"--ep: got {size} without experts; set model.moe.enabled=true, or take 1")


def _resolved(settings: Settings, *, world: int, ep_size: int, stage: int) -> Settings:
    """The settings as a run would have them; ValueError where stage and size do not go together."""
    chosen = _with_model(settings, moe=settings.model.moe.model_copy(update={"ep_size": ep_size}))
    return resolve(chosen, {"zero_optimization": {"stage": stage}}, world=world, native_bf16=True).settings


def _with_model(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update={"model": settings.model.model_copy(update=changes)})


# ---------------------------------------------------------------------------------------------------------------------
# Tables, JSON and the plot

ASSUMPTIONS = (
    "Assumed: ring collectives; gradients travel in the weights' type; nothing overlaps, so step time = FLOPs / "
    "sustained FLOP/s + bytes sent / bandwidth (latency left out); routing is even; Adam in float32; activations, "
    "buffers and padding of ZeRO are not counted."
)


def report(sizes: ModelSizes, plans: Sequence[Plan], *, tokens: int, bandwidth: float, flops: float) -> str:
    """The tables of memory, bytes and time, and one line of what they assume; ``tokens`` per rank and micro-step."""
    routed = sum(layer.routed * layer.expert_values for layer in sizes.layers)
    facts = (
        f"{'bf16' if sizes.width == BF16 else 'fp32'}, {tokens:,} tokens per rank and micro-step, "
        f"{bandwidth / 1e9:g} GB/s and {flops / 1e12:g} TFLOP/s per rank; "
        f"weights: {sizes.frozen:,} frozen, {sizes.dense:,} trained, {routed:,} of routed experts"
    )
    memory = [(p.ep_size, p.zero, p.parameters, p.trained,
               *(size / MB for size in (p.weights, p.gradients, p.optimizer, p.memory))) for p in plans]  # fmt: skip
    wire = [_wire_row(p) for p in plans]
    titles = f"on each of {plans[0].world} ranks (MB)", "sent by each rank per optimiser step (MB), and its time (ms)"
    held = ("EP", "ZeRO", "parameters", "trained", "weights", "gradients", "master+Adam", "sum")
    sent = ("EP", "ZeRO", "dense", "experts' replicas", *DISPATCHES, "auto", "crossover tokens",
            "compute ms", *(f"step ms, {name}" for name in ("local", *DISPATCHES)))  # fmt: skip
    return "\n".join([facts, table(titles[0], held, memory), table(titles[1], sent, wire), ASSUMPTIONS])


def _wire_row(p: Plan) -> list[object]:
    moved = [None if name not in p.wire_dispatch else p.wire_dispatch[name] / MB for name in DISPATCHES]
    times = [None if n not in p.step_seconds else p.step_seconds[n] * 1e3 for n in ("local", *DISPATCHES)]
    return [p.ep_size, p.zero, p.wire_dense / MB, p.wire_replicas / MB, *moved, p.auto, p.crossover,
            p.compute_seconds * 1e3, *times]  # fmt: skip


def as_json(sizes: ModelSizes, plans: Sequence[Plan], **given: object) -> dict[str, Any]:
    """Everything as plain values: what was ``given``, the assumptions, the sizes, the plans."""
    rows = [{**asdict(p), "memory": p.memory} for p in plans]
    return {**given, "assumptions": ASSUMPTIONS, "sizes": asdict(sizes), "plans": rows}


def draw_crossover(sizes: ModelSizes, *, ep_sizes: Sequence[int], tokens: int) -> bytes:
    """A PNG: bytes per rank and micro-step against tokens per rank, both dispatches of each size above 1.

    ``tokens`` of the settings are marked by a line. Raises ValueError where no size is above 1 or no layer has experts.
    """
    shown = sorted({size for size in ep_sizes if size > 1})[: len(COLORS)]
    if not shown or not sizes.layers:
        raise ValueError("--plot: there is nothing to compare without an expert-parallel size above 1; give --ep 2,4")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    top = 4 * max(tokens, *(_crossover(sizes.sharded(size)) or 0 for size in shown))
    counts = [top ** (i / 200) for i in range(201)]
    with rc_context({"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(7.0, 4.4), layout="constrained")  # without pyplot: no display, no global state
        ax = figure.subplots()
        for size, color in zip(shown, COLORS, strict=False):
            _draw_size(ax, sizes, size, counts, color)
        ax.axvline(tokens, color="#666666", linestyle=":", linewidth=1.2)
        ax.annotate(f"this run: {tokens:,}", (tokens, 0.02), xycoords=("data", "axes fraction"), xytext=(-4, 0),
                    textcoords="offset points", ha="right", color="#666666")  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="Tokens per rank (images x tasks x tokens)",
               ylabel="MB sent per rank and micro-step", title="Experts travel or tokens travel")  # fmt: skip
        ax.grid(color="#e4e4e4", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.legend(loc="upper left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _draw_size(ax: Any, sizes: ModelSizes, ep_size: int, counts: Sequence[float], color: str) -> None:
    """Both lines of one size; where they cross stands in the legend, for the points of several sizes lie close."""
    layers = sizes.sharded(ep_size)
    bytes_at = [dispatch_bytes(layers, tokens=count, forwards=sizes.forwards) for count in counts]
    crossover = _crossover(layers)
    note = "" if crossover is None else f", less from {max(1, math.ceil(crossover))} tokens"
    for name, style, text in zip(DISPATCHES, ("--", "-"), (note, ""), strict=True):
        ax.plot(counts, [each[name] / MB for each in bytes_at], color=color, linestyle=style, linewidth=1.6,
                label=f"EP {ep_size}, {name}{text}")  # fmt: skip
    if crossover is not None and crossover >= 1:
        height = dispatch_bytes(layers, tokens=crossover, forwards=sizes.forwards)["gather"] / MB
        ax.plot([crossover], [height], "o", color=color, markersize=6, zorder=3)
