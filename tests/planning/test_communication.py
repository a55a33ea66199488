"""The collectives of a step as ``plan`` has them, against those that DeepSpeed's engine makes at worlds of 2 to 16.

A world is one process: torch's fake process group carries nothing, so the numbers that come back are wrong, but how
often, among which ranks and with how many bytes a rank asks for a collective does not depend on them.
"""

import contextlib
import itertools
import json
import os
from collections import Counter
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ase_dist import agreement, collectives
from ase_dist.planning.balancing import balancing_collectives, needs_of
from ase_dist.planning.communication import step_collectives
from ase_dist.planning.plan import make_plans
from ase_dist.planning.sizes import measure
from ase_dist.read_config import override_settings
from ase_dist.training.balancing.balancer import Balancer
from ase_dist.training.ds_config import resolve
from ase_dist.training.loop.components import build
from ase_dist.training.loop.trainer import mean_label_counts, training_loss
from ase_dist.training.process import runtime
from ase_dist.training.process.finite import vote
from tests.training.conftest import start_world
from tests.training.tiny_runs import ds_config, tiny_settings

pytestmark = pytest.mark.single_gpu

KINDS = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter",
         "alltoall_base_": "all_to_all"}  # fmt: skip
FP32 = "train.bf16=false"
RECOMPUTE = "model.checkpoint_activations=recompute"
CASES = {  # world, expert-parallel size, DeepSpeed's JSON, settings
    "2 ranks": (2, 2, "z2", FP32),
    "4 ranks, tokens travel": (4, 2, "z1", "model.moe.dispatch=all_to_all", "train.bf16=true"),
    "8 ranks": (8, 8, "z0", FP32),
    "16 ranks, two micro-steps": (16, 4, "z2", "train.gradient_accumulation_steps=2", FP32),
    "16 ranks, experts everywhere": (16, 1, "z0", "train.bf16=true", RECOMPUTE),
}
BALANCED = ("4 ranks, tokens travel", "16 ranks, two micro-steps")  # cases that try these too
METHODS = (
    *(f"train.balancing.method={name}" for name in ("rlw", "dwa", "uncertainty", "gls", "famo", "gradnorm", "mgda")),
    "train.balancing.method=pcgrad train.balancing.on=representation",
)


class Asked(TorchDispatchMode):
    """``number`` of collectives and ``sent`` bytes of a ring by (kind, ranks); one rank alone needs none."""

    def __init__(self):
        super().__init__()
        self.number, self.sent = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            kind = KINDS[func._schema.name.split("::")[1]]
            ranks = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject))).size()
            first = args[0][0] if isinstance(args[0], list) else args[0]
            whole = args[1] if kind == "reduce_scatter" else first
            if ranks > 1:
                share = (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)
                self.number[f"{kind} {ranks}"] += 1
                self.sent[f"{kind} {ranks}"] += share * whole.numel() * whole.element_size()
        return result


def asked_in_a_step(case, methods, scenes, rank, folder):
    """The second step of a run, as the training loop takes it, in a world that is not there: number and sent.

    With fixed weights, then with each of ``methods`` of balancing, whose settings it has, in the same process.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world, ep_size, zero, *overrides = case
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # fmt: skip
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    own_rows = collectives.start_all_to_all_rows

    def same_objects(value):
        return [value] * world

    def return_own_rows(rows, *, send, receive, group):
        own_rows(rows, send=send, receive=receive, group=group)
        return collectives.Pending(rows.clone(), None)

    with contextlib.ExitStack() as patches:
        for module in (collectives, agreement):
            patches.enter_context(mock.patch.object(module, "gather_objects", same_objects))
        patches.enter_context(mock.patch.object(collectives, "start_all_to_all_rows", return_own_rows))
        settings = tiny_settings(
            scenes, folder / "run", f"model.moe.ep_size={ep_size}", "train.batch_size=1", *overrides
        )
        place = runtime.start(timeout=60, threads=1)
        config = resolve(settings, ds_config(zero), world=world, native_bf16=False)
        parts = build(config, place, beat=lambda doing: None)
        found = []
        for method in ("", *methods):
            tried = override_settings(settings, dict(word.split("=") for word in method.split()))
            balancer = Balancer(tried, parts.tasks, parts.engine.module, place.device)
            for step in (1, 2):
                with Asked() as asked:
                    batches = [next(parts.train_loader) for _ in range(settings.train.gradient_accumulation_steps)]
                    counts = mean_label_counts(batches, parts.tasks, place)
                    balancer.begin_step(step, batches, counts, beat=lambda doing: None)
                    losses = []
                    for batch in batches:
                        output = parts.engine(batch.images)
                        by_task, total = training_loss(output, batch, parts.tasks, counts, balancer)
                        parts.engine.backward(total)
                        parts.engine.step()
                        losses.append({name: loss.detach() for name, loss in by_task.items()})
                    balancer.end_step(step, losses, epoch_ends=False)
                    _ = vote(torch.tensor(True), stop=False).finite
            found.append([asked.number, asked.sent])
        parts.close()
    return found


def planned(case, method=""):
    """The same of the plan."""
    world, ep_size, zero, *overrides = case
    settings = tiny_settings(
        "none", "none", f"model.moe.ep_size={ep_size}", "train.batch_size=1", *overrides, *method.split()
    )
    sizes, needs = measure(settings), needs_of(settings)
    topology = {
        "world": world,
        "ep_size": ep_size,
        "tokens": sizes.tokens_per_image,
        "dispatch": "local" if ep_size == 1 else "gather" if settings.model.moe.dispatch == "auto" else "all_to_all",
        "accumulation": settings.train.gradient_accumulation_steps,
    }
    number, sent = Counter(), Counter()
    for each in (
        *step_collectives(sizes, zero=int(zero[1]), clipping=True, **topology),
        *(balancing_collectives(sizes, needs, **topology) if needs else ()),
    ):
        number[f"{each.kind} {each.ranks}"] += each.number
        sent[f"{each.kind} {each.ranks}"] += each.sent
    return number, sent


def test_the_collectives_of_a_step_are_those_of_the_plan(tmp_path, scenes):
    methods = {name: METHODS if name in BALANCED else () for name in CASES}
    running = {
        name: start_world(partial(asked_in_a_step, case, methods[name], scenes), tmp_path / str(i))
        for i, (name, case) in enumerate(CASES.items())
    }
    for name, wait in running.items():
        world = wait()
        assert world.codes == [0], name
        for method, (asked, sent) in zip(("", *methods[name]), world.results[0], strict=True):
            number, bytes_sent = planned(CASES[name], method)
            assert asked == number, (name, method)
            for place, size in sent.items():
                if "all_to_all" not in place:  # where tokens go depends on what they are
                    assert size == pytest.approx(bytes_sent[place], rel=0.01, abs=16), (name, method, place)


def test_what_balancing_adds_is_a_mean_over_its_steps():
    changes = ("train.balancing.method=mgda", "train.batch_size=1", FP32)
    each, fifth = (tiny_settings("none", "none", *changes, f"train.balancing.every={every}") for every in (1, 5))
    options = {"world": 4, "ep_sizes": [2], "stages": [1], "bandwidth": 1e9, "flops": 1e12}
    fixed = make_plans(tiny_settings("none", "none", *changes[1:]), **options)[1][0]
    (always,), (seldom,) = make_plans(each, **options)[1], make_plans(fifth, **options)[1]
    assert fixed.wire_balancing == 0 < seldom.wire_balancing == pytest.approx(always.wire_balancing / 5)
    extra = [sum(c.number for c in p.collectives) - sum(c.number for c in fixed.collectives) for p in (always, seldom)]
    assert extra[0] == pytest.approx(5 * extra[1])
    assert always.compute_seconds - fixed.compute_seconds == pytest.approx(
        5 * (seldom.compute_seconds - fixed.compute_seconds)
    )
    assert always.step_seconds["gather"] > seldom.step_seconds["gather"] > fixed.step_seconds["gather"]
    assert all(c.what.startswith("balancing: ") for c in always.collectives[len(fixed.collectives) :])


def test_a_step_has_as_many_collectives_and_bytes_at_4096_ranks_as_at_64(tmp_path):
    settings = tiny_settings("none", "none", "train.bf16=true")
    plans = {
        world: make_plans(settings, world=world, ep_sizes=[4], stages=[0, 1, 2], bandwidth=1e9, flops=1e12)[1]
        for world in (64, 512, 4096)
    }
    for small, large in itertools.product(plans[64], plans[4096]):
        if small.zero == large.zero:
            assert [c.number for c in small.collectives] == [c.number for c in large.collectives]
            for few, many in zip(small.collectives, large.collectives, strict=True):
                assert few.sent <= many.sent <= few.sent * 64 / 60  # (P - 1) / P of at least 16 replicas
    for one in itertools.chain(*plans.values()):
        gradients = sum(c.sent for c in one.collectives if c.what in {"gradients", "weights"})
        replicas = sum(c.sent for c in one.collectives if c.what in {"gradients of experts", "weights of experts"})
        experts = sum(c.sent for c in one.collectives if c.what in {"experts", "gradients of gathered experts"})
        assert gradients == pytest.approx(one.wire_dense) and replicas == pytest.approx(one.wire_replicas)
        assert one.auto == "gather" and experts == pytest.approx(one.wire_dispatch["gather"])
    json.dumps([one.collectives for one in plans[64]])


def test_one_rank_needs_no_collective():
    settings = tiny_settings("none", "none", FP32)
    (alone,) = make_plans(settings, world=1, ep_sizes=[1], stages=[2], bandwidth=1e9, flops=1e12)[1]
    assert alone.collectives == []
    three = make_plans(settings, world=8, ep_sizes=[1], stages=[3], bandwidth=1e9, flops=1e12)[1]
    assert [one.collectives for one in three] == [None]
