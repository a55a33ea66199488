"""What ``train.balancing`` adds to an optimiser step: passes and collectives, means over the steps of its ``every``.

The passes are those of ``ase_dist.training.balancing``: ``gramian.Measurement`` for methods that look at gradients, and
the forward passes of the whole batch that ``balancer.Balancer`` takes before or after a step.

Letters: G micro-steps, t tasks, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ase_dist.config import Settings
from ase_dist.models.names import trained_entries
from ase_dist.moe import MoEFFN
from ase_dist.moe.dispatch import Choice
from ase_dist.planning.communication import Collective, exchanged, ring, router_statistics
from ase_dist.planning.flops import on_fake_tensors
from ase_dist.planning.sizes import FP32, ModelSizes
from ase_dist.registries import BALANCINGS
from ase_dist.training.balancing.balancer import FIXED
from ase_dist.training.balancing.from_gradients import OnHost


class Needs(NamedTuple):
    """What a method needs in addition to the step itself, with a measurement in each of ``every`` steps.

    ``on_parameters``: a forward and a backward pass of each task for each micro-step, and their gradients added up.
    ``forwards``: forward passes of all tasks, over all micro-steps. ``sums``: all-reduces of a number for each task;
    ``gramians``: of a row for each task. ``sums_always`` come in every step. ``shared`` are the trained elements of
    which gradients are compared, without routed experts.
    """

    every: int
    on_parameters: bool
    forwards: int
    sums: int
    sums_always: int
    gramians: int
    shared: int


def needs_of(settings: Settings) -> Needs | None:
    """Those of ``train.balancing``; None for fixed weights."""
    balancing = settings.train.balancing
    if balancing.method == FIXED:
        return None
    method = BALANCINGS[balancing.method]
    measures, on_parameters = method.uses_gramian, balancing.on == "parameters"
    first = method.uses_losses and not measures  # the losses of the step itself, where it has one micro-step
    extra = first and settings.train.gradient_accumulation_steps > 1
    learns = int(method.learns and not measures and not first)  # from losses that nothing has added up before
    return Needs(
        every=balancing.every,
        on_parameters=measures and on_parameters,
        forwards=(measures and not on_parameters) + extra + method.uses_losses_after,
        sums=first + method.uses_losses_after + issubclass(method, OnHost) + learns * (not method.learns_always),
        sums_always=learns * method.learns_always,
        gramians=int(measures),
        shared=shared_elements(settings) if measures and on_parameters else 0,
    )


def shared_elements(settings: Settings) -> int:
    """Trained elements that the losses of two tasks or more depend on and that no task has a part of, experts apart."""
    with on_fake_tensors(settings) as (model, image):
        routed = {id(p) for m in model.modules() if isinstance(m, MoEFFN) for p in m.routed.parameters()}
        entries = [entry for entry in trained_entries(model) if not entry.task_axes and id(entry.tensor) not in routed]
        users = [0] * len(entries)
        for name in model.task_names:
            total = model(image, tasks=[name]).predictions[name].sum()
            found = torch.autograd.grad(total, [entry.tensor for entry in entries], allow_unused=True)
            users = [count + (gradient is not None) for count, gradient in zip(users, found, strict=True)]
        return sum(entry.tensor.numel() for entry, count in zip(entries, users, strict=True) if count > 1)


def balancing_collectives(
    sizes: ModelSizes,
    needs: Needs,
    *,
    world: int,
    ep_size: int,
    tokens: float,
    accumulation: int,
    dispatch: Choice | None = None,
) -> list[Collective]:
    """What ``needs`` sends, as ``communication.step_collectives`` has the rest of a step."""
    t, G, replicas = sizes.tasks, accumulation, world // ep_size
    once = replace(sizes, forwards=1)  # measurements and passes without gradients recompute nothing
    place: dict[str, Any] = {"ep_size": ep_size, "dispatch": dispatch, "training_tokens": tokens}
    due: list[Collective] = []
    passes = (t * G if needs.on_parameters else 0) + needs.forwards * G
    if passes:
        sent = G * (needs.on_parameters + needs.forwards)
        due += router_statistics(sizes, world=world, number=passes, full_passes=sent)
    if needs.on_parameters:
        due += exchanged(once, tokens=tokens / t, passes=t * G, **place)
        routed = sum(layer.slots * layer.expert_values for layer in sizes.sharded(ep_size))
        for elements, ranks in ((needs.shared, world), (routed, replicas)):
            if elements and ranks > 1:
                due.append(Collective("task gradients", "reduce_scatter", ranks, 1, ring(t * elements * FP32, ranks)))
    if needs.forwards:
        due += exchanged(once, tokens=tokens, passes=needs.forwards * G, backward=False, **place)
    small = [(needs.sums, t), (needs.gramians, t * (t + 1))]
    due += [
        Collective("weights of tasks", "all_reduce", world, n, ring(2 * n * k * FP32, world)) for n, k in small if n
    ]
    always = needs.sums_always
    found = [each._replace(number=each.number / needs.every, sent=each.sent / needs.every) for each in due]
    if always:
        found.append(Collective("weights of tasks", "all_reduce", world, always, ring(2 * always * t * FP32, world)))
    return [each._replace(what=f"balancing: {each.what}") for each in merged(found)] if world > 1 else []


def merged(collectives: Sequence[Collective]) -> list[Collective]:
    """One for all of the same purpose, kind and ranks."""
    found: dict[tuple[str, str, int], Collective] = {}
    for each in collectives:
        place = each[:3]
        have = found.get(place, each._replace(number=0, sent=0.0))
        found[place] = each._replace(number=have.number + each.number, sent=have.sent + each.sent)
    return list(found.values())


def balancing_flops(sizes: ModelSizes, needs: Needs) -> float:
    """FLOPs for an image, on average over the steps; the heads' backward pass on the representation is left out."""
    backward = sizes.forward_flops + sizes.backward_flops if needs.on_parameters else 0.0
    return (backward + needs.forwards * sizes.forward_flops) / needs.every
