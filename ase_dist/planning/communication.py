"""The collectives of an optimiser step: how many, among which ranks, and the bytes that a rank sends in each.

Bytes are those of a ring of P ranks: an all-gather and a reduce-scatter of n bytes send (P - 1) / P n, an all-reduce
twice that. So both the number and the bytes stay the same however many ranks there are, but for the experts, whose
bytes grow with the expert-parallel size. ``tests/planning/test_communication.py`` counts the collectives of a step with
DeepSpeed's engine and compares.

Letters: W ranks of the world, P of an expert-parallel group, G micro-steps, L layers with experts, t tasks, N experts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ase_dist.moe.dispatch import Choice, LayerShape
from ase_dist.planning.sizes import FP32, ModelSizes

COUNTS_PER_TASK = 2  # label counts, float32
STATISTICS_PER_TASK = 1  # beside three per expert, float32; see ``ase_dist.moe.router.mean_statistics``
OUTGROWS = (
    "What grows with the world: at the start, at a checkpoint and at a step that is not finite every rank gathers a "
    "sentence or a few names from every other (about 100 bytes each); after a failure each reads every rank's beat."
)


class Collective(NamedTuple):
    """``number`` collectives of a kind per optimiser step among ``ranks``, and the bytes that a rank sends in all.

    A mean over steps where not all steps have them.
    """

    what: str
    kind: str
    ranks: int
    number: float
    sent: float


def step_collectives(
    sizes: ModelSizes,
    *,
    world: int,
    ep_size: int,
    zero: int,
    tokens: float,
    accumulation: int,
    dispatch: Choice | None = None,
    clipping: bool,
) -> list[Collective]:
    """Everything that a rank with ``tokens`` per micro-step takes part in during an optimiser step, at ZeRO 0 to 2.

    ``dispatch`` None is what ``auto`` takes, layer by layer.
    Gradients are taken to fit in one of DeepSpeed's buckets (``reduce_bucket_size``, 500 million elements by default).
    Not for ZeRO 3, which gathers each weight when it is needed: as many all-gathers as there are weights above
    ``stage3_param_persistence_threshold``, forward and backward, and bytes as ``reduction_bytes`` has them.
    """
    replicas = world // ep_size
    layers = sizes.sharded(ep_size)
    routed = sum(layer.slots * layer.expert_values for layer in layers)
    times = accumulation if zero == 2 else 1  # stage 2 divides the gradients, so each micro-step reduces them
    found = [Collective("label counts", "all_reduce", world, 1, ring(2 * COUNTS_PER_TASK * FP32 * sizes.tasks, world))]
    found += router_statistics(sizes, world=world, number=accumulation, full_passes=accumulation)
    found += exchanged(sizes, ep_size=ep_size, tokens=tokens, passes=accumulation, dispatch=dispatch)
    for what, elements, ranks in (("gradients", sizes.dense, world), ("gradients of experts", routed, replicas)):
        if elements and ranks > 1:
            sent = ring(2 * times * elements * sizes.width, ranks)
            found.append(Collective(what, "all_reduce", ranks, times, sent))
    # ZeRO 1 and 2 take the norm and its maximum of each kind of parameter, those of experts partly among the replicas;
    # at ZeRO 0 sharded experts add theirs, and all ranks agree whether the norm is finite
    among = Counter({world: 2 if zero else 1})
    if routed:
        among.update([world, replicas] if zero else [ep_size])
    for ranks, number in among.items():
        if ranks > 1 and number:
            found.append(Collective("norms", "all_reduce", ranks, number, ring(2 * number * FP32, ranks)))
    if zero:
        for what, elements, ranks, groups in (
            ("weights", sizes.dense, world, sizes.optimizer_groups),
            ("weights of experts", routed, replicas, 1),
        ):
            if elements and ranks > 1:
                found.append(Collective(what, "all_gather", ranks, groups, ring(elements * sizes.width, ranks)))
    found.append(Collective("finite, stop, unread", "all_reduce", world, 1, ring(2 * 3 * FP32, world)))
    return found if world > 1 else []


def ring(size: float, ranks: int) -> float:
    """Bytes that a rank sends in an all-gather or a reduce-scatter of ``size`` bytes."""
    return (ranks - 1) / ranks * size


def router_statistics(sizes: ModelSizes, *, world: int, number: int, full_passes: int) -> list[Collective]:
    """The means over tokens in ``number`` forward passes, which have the streams of ``full_passes`` of all tasks.

    One for the layers of a pass together, outside of the blocks that activation checkpointing runs again.
    """
    values = len(sizes.layers) * sizes.tasks * (3 * sizes.num_experts + STATISTICS_PER_TASK)
    sent = ring(2 * full_passes * values * FP32, world)
    return [Collective("router statistics", "all_reduce", world, number, sent)] if values else []


def exchanged(
    sizes: ModelSizes,
    *,
    ep_size: int,
    tokens: float,
    passes: int,
    dispatch: Choice | None,
    training_tokens: float | None = None,
    backward: bool = True,
) -> list[Collective]:
    """What brings ``tokens`` of a pass and experts together; a forward pass that is recomputed sends again.

    ``dispatch`` None: what each layer takes for ``training_tokens``, by default those of the pass.
    """
    G, forwards, found = passes, sizes.forwards, []
    by_choice: dict[Choice, list[LayerShape]] = {}
    for layer in sizes.sharded(ep_size) if ep_size > 1 else ():
        own = (tokens if training_tokens is None else training_tokens) * layer.share
        by_choice.setdefault(dispatch or layer.cheaper(own), []).append(layer)
    if layers := by_choice.get("gather"):
        one_way = G * sum(layer.gather_bytes() for layer in layers) / 2
        count = len(layers) * G
        found.append(Collective("experts", "all_gather", ep_size, count * forwards, one_way * forwards))
        if backward:
            found.append(Collective("gradients of gathered experts", "reduce_scatter", ep_size, count, one_way))
    if layers := by_choice.get("all_to_all"):
        # forward: counts, gates, and rows there and back for each adapted linear; backward: all of it but the counts
        count = len(layers) * G * (forwards * (2 + 2 * sizes.exchanges) + backward * (1 + 2 * sizes.exchanges))
        moved = dispatch_bytes(layers, tokens=tokens, accumulation=G, forwards=forwards, backward=backward)
        found.append(Collective("tokens", "all_to_all", ep_size, count, moved["all_to_all"]))
    return found


def reduction_bytes(elements: int, *, frozen: int = 0, ranks: int, stage: int, width: int, accumulation: int) -> float:
    """Bytes that a rank sends per step to keep ``elements`` trained weights equal on ``ranks`` (ring collectives).

    Stages 0 to 2 all-reduce gradients, stage 2 in every micro-step: DeepSpeed reduces a bucket that holds the gradients
    of several ranks whole (0.19.8, ``use_multi_rank_bucket_allreduce``). Stages 1 and 2 then gather the weights. Stage
    3 (ZeRO, arXiv 1910.02054) scatters what it reduces, and gathers all weights, the ``frozen`` ones too, for every
    forward and backward pass.
    """
    reduced = accumulation * elements if stage == 3 else 2 * elements * (accumulation if stage == 2 else 1)
    gathered = {0: 0, 1: elements, 2: elements, 3: 2 * accumulation * (elements + frozen)}[stage]
    return ring(width * (reduced + gathered), ranks)


def dispatch_bytes(
    layers: Sequence[LayerShape], *, tokens: float, accumulation: int = 1, forwards: int = 1, backward: bool = True
) -> dict[str, float]:
    """Bytes that a rank with ``tokens`` sends per step for its experts, by dispatch; for all_to_all the expected value.

    ``tokens`` are those in the first block, of which a layer sees its ``share``.
    A recomputed forward pass sends its part again.
    """
    if all(layer.ranks == 1 for layer in layers):
        return {"local": 0.0}
    passes = (forwards + backward) / 2  # in units of one forward and one backward pass, as the formulas count
    gather = sum(layer.gather_bytes() for layer in layers) * passes
    counts = [layer.all_to_all_bytes(0) for layer in layers]  # exchanged in forward passes only
    rows = [layer.expected_rows(tokens * layer.share) for layer in layers]
    tokens_sent = sum(layer.all_to_all_bytes(n) for layer, n in zip(layers, rows, strict=True)) - sum(counts)
    return {
        "gather": accumulation * gather,
        "all_to_all": accumulation * (tokens_sent * passes + sum(counts) * forwards),
    }


def crossover(layers: Sequence[LayerShape]) -> float | None:
    """Tokens per rank, in the first block, from which gather is cheaper for all layers together; None without EP."""
    if not layers or layers[0].ranks == 1:
        return None
    tokens = layers[0].crossover()
    if any(layer != layers[0] for layer in layers):  # bytes are linear in the tokens
        fixed = sum(layer.gather_bytes() - layer.all_to_all_bytes(0.0) for layer in layers)
        one_token = sum(layer.all_to_all_bytes(layer.expected_rows(layer.share)) for layer in layers)
        per_token = one_token - sum(layer.all_to_all_bytes(0.0) for layer in layers)
        tokens = fixed / per_token if per_token else math.inf
    return tokens if math.isfinite(tokens) else None
