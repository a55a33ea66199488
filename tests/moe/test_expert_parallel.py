"""Sharded layers against one process: every dispatch, gating mode and group size, routing extremes, bytes on the wire.

One world of four processes checks the whole grid; each rank returns what differed, as sentences.
"""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from timm.layers import SwiGLU
from torch.utils.checkpoint import checkpoint

from ase_dist.collectives import count_traffic
from ase_dist.moe import MoEFFN, global_state
from ase_dist.moe.dispatch import LayerShape
from ase_dist.moe.forms import FormCost
from ase_dist.moe.sharding import Shard
from tests.moe.conftest import FFN, randomise
from tests.training.conftest import start_world
from tests.waits import HostWaits

pytestmark = pytest.mark.multi_gpu

TASKS, DIM = 3, 12
MODES = [("ase", 3, 1), ("naive", 2, 1), ("topk", 4, 0), ("dense", 0, 1), ("ase", 15, 1), ("ase", 1, 2)]


def build(gating, k, S, experts, adapt, *, shard=None, base=None):
    options = {"num_experts": 16, "k": k, "num_shared": S, "rank": 2, "num_tasks": TASKS, "gating": gating, "hidden": 8}
    layer = MoEFFN(base or FFN(), experts=experts, adapt=adapt, shard=shard, aux_losses={"mutual_information": 1.0},
                   **options)  # fmt: skip
    return layer.double()


def sharded(group, size, dispatch, *options, base=None):
    whole = build(*options)
    randomise(whole)
    shard = Shard(whole.shard.routed, index=dist.get_rank(group), count=size)
    layer = build(*options, shard=shard, base=base)
    layer.share_experts(group, dispatch)
    layer.sync_statistics = True
    randomise(layer)
    return whole, layer


def tokens_of(counts, *, seed=0):
    """The global batch [tasks, sum(counts), D] and this rank's part of it; ranks may have different numbers."""
    x = torch.randn(TASKS, sum(counts), DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = sum(counts[: dist.get_rank()])
    return x, x[:, start : start + counts[dist.get_rank()]]


def step(layer, x, direction, *, scale=1.0):
    """Output and gradients by name of <output, direction> + scale * aux; scale compensates for averaging over ranks."""
    x = x.clone().requires_grad_()
    result = layer(x)
    ((result.output * direction).sum() + scale * result.aux_loss).backward()
    named = {"x": x.grad, "router": layer.router.weight.grad, "aux": result.aux_loss.detach()}
    named |= {f"routed.{name}": t.grad for name, t in layer.routed.tensors().items()}
    named |= {f"shared.{name}": t.grad for name, t in layer.shared.tensors().items()} if layer.shared else {}
    return result.output.detach(), named


def differences(label, whole, layer, counts, size):
    """What this rank's part of the sharded step has that differs from the step of one process."""
    x, mine = tokens_of(counts)
    direction, _ = tokens_of(counts, seed=1)
    start = sum(counts[: dist.get_rank()])
    part = slice(start, start + counts[dist.get_rank()])
    output, wanted = step(whole, x, direction)
    # data parallelism averages gradients: the sum over ranks of 1/W of the auxiliary loss's
    got_output, got = step(layer, mine, direction[:, part], scale=1 / dist.get_world_size())
    pairs = {"output": (got_output, output[:, part]), "x": (got["x"], wanted["x"][:, part]),
             "aux": (got["aux"], wanted["aux"])}  # fmt: skip
    replicas = dist.new_subgroups_by_enumeration(
        [[r for r in range(dist.get_world_size()) if r % size == i] for i in range(size)])[0]  # fmt: skip
    for name in wanted:
        if name.startswith("routed"):
            total = got[name].clone()
            dist.all_reduce(total, group=replicas)
            pairs[name] = (total[: layer.shard.real], layer.shard.own(wanted[name]))
            if total[layer.shard.real :].any():
                yield f"{label}: padding of {name} has a gradient"
        elif name not in pairs:
            total = got[name].clone()
            dist.all_reduce(total)
            pairs[name] = (total, wanted[name])
    for name, (have, want) in pairs.items():
        error = (have - want).norm().item() if have.shape == want.shape else float("inf")
        if error > 1e-9 * max(1.0, want.norm().item()):
            yield f"{label}: {name} differs by {error:.1e}"


def groups_of(size):
    world = dist.get_world_size()
    return dist.new_subgroups_by_enumeration([list(range(i, i + size)) for i in range(0, world, size)])[0]


def check_grid(rank, folder):
    found = []
    for size in (2, 4):
        group = groups_of(size)
        adapts = itertools.cycle([("fc1", "fc2"), ("fc1",), ("fc2", "bypass")])
        for (gating, k, S), dispatch, experts in itertools.product(MODES, ("gather", "all_to_all"), ("lora", "ffn")):
            options = (gating, k, S, experts, next(adapts))
            label = f"{dispatch} over {size}, {options}"
            whole, layer = sharded(group, size, dispatch, *options)
            found += differences(label, whole, layer, [5, 5, 5, 5], size)
            state, wanted = global_state(layer), global_state(whole)
            if any(not torch.equal(state[name], wanted[name]) for name in wanted):
                found.append(f"{label}: global_state differs")
    return found


def check_extremes(rank, folder):
    """Ranks without tokens, one token in all, all tokens to one expert, equal logits."""
    found = []
    group = groups_of(4)
    for dispatch, experts in itertools.product(("gather", "all_to_all"), ("lora", "ffn")):
        options = ("ase", 3, 1, experts, ("fc1", "fc2"))
        for counts in ([0, 7, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [9, 0, 0, 0]):
            whole, layer = sharded(group, 4, dispatch, *options)
            found += differences(f"{dispatch}, {experts}, {counts} tokens", whole, layer, counts, 4)
        for name, favour in (("one expert", 14), ("equal logits", None)):
            whole, layer = sharded(group, 4, dispatch, "ase", 1, 1, experts, ("fc1", "fc2"))
            for each in (whole, layer):
                with torch.no_grad():
                    each.router.weight.zero_()
                    if favour is not None:
                        each.router.weight[:, favour] = 50.0
            found += differences(f"{dispatch}, {experts}, {name}", whole, layer, [4, 4, 4, 4], 4)
    return found


def check_base_of_another_kind(rank, folder):
    """A base that is no plain nn.Linear, and autocast, take the unfused path through the same dispatch."""

    class Other(torch.nn.Linear):
        pass

    found = []
    group = groups_of(2)
    for dispatch in ("gather", "all_to_all"):
        base = FFN()
        base.fc1.__class__ = base.fc2.__class__ = Other
        whole, layer = sharded(group, 2, dispatch, "ase", 3, 1, "lora", ("fc1", "fc2"), base=base)
        found += differences(f"{dispatch}, other base", whole, layer, [5, 5, 5, 5], 2)
    return found


def check_trained_base(rank, folder):
    """A base that is trained too (full fine-tuning) gets the gradient of one process."""
    found = []
    group = groups_of(2)
    for dispatch in ("gather", "all_to_all"):
        whole, layer = sharded(group, 2, dispatch, "ase", 3, 1, "lora", ("fc1", "fc2"))
        x, mine = tokens_of([5, 5, 5, 5])
        for each, part in ((whole, x), (layer, mine)):
            each.base.requires_grad_(True)
            each(part).output.square().sum().backward()
        for (name, want), have in zip(whole.base.named_parameters(), layer.base.parameters(), strict=True):
            total = torch.zeros_like(want) if have.grad is None else have.grad.clone()
            dist.all_reduce(total)
            if (total - want.grad).norm() > 1e-9 * want.grad.norm():
                found.append(f"{dispatch}: the gradient of {name} differs by {(total - want.grad).norm():.1e}")
    return found


def check_second_derivatives(rank, folder):
    """A gradient penalty on x has the gradients of one process, or there is an error that says what to do."""

    def penalty(layer, x):
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(x).output.square().sum(), x, create_graph=True)
        first.square().sum().backward()
        return x.grad, next(iter(layer.routed.tensors().values())).grad

    found = []
    group = groups_of(4)
    for dispatch, experts in itertools.product(("gather", "all_to_all"), ("lora", "ffn")):
        whole, layer = sharded(group, 4, dispatch, "ase", 3, 1, experts, ("fc1", "fc2"))
        x, mine = tokens_of([5, 5, 5, 5])
        if dispatch == "gather":
            (want_x, want_routed), (have_x, have_routed) = penalty(whole, x), penalty(layer, mine)
            pairs = [(have_x, want_x[:, 5 * rank : 5 * rank + 5]),
                     (have_routed[: layer.shard.real], layer.shard.own(want_routed))]  # fmt: skip
            if any((have - want).norm() > 1e-9 * want.norm() for have, want in pairs):
                found.append(f"{dispatch}, {experts}: the penalty's gradients differ")
        try:
            leaves = [mine.clone().requires_grad_(), *layer.routed.parameters()]
            torch.autograd.grad(layer(leaves[0]).output.sum(), leaves, create_graph=True)
            found.append(f"{dispatch}, {experts}: no error")
        except NotImplementedError as error:
            if "ep_size=1" not in str(error):
                found.append(f"{dispatch}, {experts}: {error}")
    return found


def check_traffic(rank, folder):
    """Bytes at the collectives: the formula exactly for gather, to the routing for all_to_all."""
    found = []
    group = groups_of(4)
    for experts in ("lora", "ffn"):
        options = ("ase", 3, 1, experts, ("fc1", "fc2"))
        _, layer = sharded(group, 4, "gather", *options)
        _, mine = tokens_of([6, 6, 6, 6])
        with count_traffic() as traffic:
            step(layer, mine, mine)
        if traffic.total != layer.layer_shape().gather_bytes():
            found.append(f"gather, {experts}: {traffic.total} bytes, formula {layer.layer_shape().gather_bytes()}")
        _, layer = sharded(group, 4, "all_to_all", *options)
        active = layer.gates(mine)[..., :15] > 0
        owner = torch.arange(15) // layer.shard.slots
        rows = sum(int(active[..., owner == p].any(-1).sum()) for p in range(4) if p != dist.get_rank(group))
        with count_traffic() as traffic:
            step(layer, mine, mine)
        totals = torch.tensor([traffic.total, layer.layer_shape().all_to_all_bytes(rows)], dtype=torch.float64)
        dist.all_reduce(totals)
        excess = 8 - 4  # in this test gates are float64, too
        gates = torch.tensor(2.0 * rows * layer.shard.slots * excess, dtype=torch.float64)
        dist.all_reduce(gates)
        if totals[0] != totals[1] + gates:
            found.append(f"all_to_all, {experts}: {totals[0]} bytes on all ranks, formula {totals[1] + gates}")
    return found


def check_prefetch(rank, folder):
    """Three layers in a row fetch ahead from the second pass on, and never use weights of before an update."""
    found = []
    group = groups_of(4)
    pairs = [sharded(group, 4, "gather", "ase", 3, 1, "lora", ("fc1", "fc2")) for _ in range(3)]
    x, mine = tokens_of([5, 5, 5, 5])
    start = sum([5, 5, 5, 5][:rank])
    one_layer = pairs[0][1].layer_shape().gather_bytes() // 2
    for round_number in range(3):
        want, have = x, mine
        for position, (whole, layer) in enumerate(pairs):
            with count_traffic() as traffic:
                have = layer(have).output
            want = whole(want).output
            # the first layer's own experts and the second's, then the next one's each time
            ahead = [2, 1, 0][position] if round_number else 1
            if traffic.bytes["all_gather"] != ahead * one_layer:
                found.append(f"pass {round_number}: layer {position} fetched {traffic.bytes} for {one_layer}")
        error = (have - want[:, start : start + 5]).norm().item()
        if error > 1e-9:
            found.append(f"pass {round_number}: outputs differ by {error:.1e}")
        have.sum().backward()
        for whole, layer in pairs:
            for each in (whole, layer):
                with torch.no_grad():
                    for tensor in each.routed.parameters():
                        tensor.mul_(1.5)
    return found


def check_recomputation(rank, folder):
    """Activation checkpointing around the layer: the collectives of the second forward pass and the same gradients."""
    found = []
    group = groups_of(4)
    for dispatch, experts in itertools.product(("gather", "all_to_all"), ("lora", "ffn")):
        _, layer = sharded(group, 4, dispatch, "ase", 3, 1, experts, ("fc1", "fc2"))
        _, mine = tokens_of([5, 2, 5, 0])
        runs = []
        for wrap in (lambda x, layer=layer: layer(x), lambda x, layer=layer: checkpoint(layer, x, use_reentrant=False)):
            layer.zero_grad()
            x = mine.clone().requires_grad_()
            result = wrap(x)
            (result[0].square().sum() + result[1]).backward()
            runs.append([x.grad] + [p.grad.clone() for p in layer.parameters() if p.requires_grad])
        if any(not torch.equal(one, two) for one, two in zip(*runs, strict=True)):
            found.append(f"{dispatch}, {experts}: gradients with recomputation differ")
    return found


def check_bf16(rank, folder):
    """In bf16 the sharded layer differs from one process in bf16 by rounding only."""
    found = []
    group = groups_of(4)
    for dispatch, experts in itertools.product(("gather", "all_to_all"), ("lora", "ffn")):
        whole, layer = (each.bfloat16() for each in sharded(group, 4, dispatch, "ase", 3, 1, experts, ("fc1", "fc2")))
        x, mine = tokens_of([5, 5, 5, 5])
        want = step(whole, x.bfloat16(), x.bfloat16())[0][:, 5 * rank : 5 * rank + 5]
        have = step(layer, mine.bfloat16(), mine.bfloat16())[0]
        error = ((have - want).float().norm() / want.float().norm()).item()
        if error > 1e-2:
            found.append(f"{dispatch}, {experts}: differs by {error:.1e}")
    return found


def check_grouped(rank, folder):
    """LoRA experts computed for a token's own experts only: any number of them on a rank, and ranks without tokens."""
    found = []
    FormCost.cheaper = lambda cost: "grouped" if cost.active else "dense"  # in this process, which ends with the check
    for size in (2, 4):
        group = groups_of(size)
        adapts = itertools.cycle([("fc1", "fc2"), ("fc2", "bypass")])
        for (gating, k, S), dispatch in itertools.product(MODES, ("gather", "all_to_all")):
            whole, layer = sharded(group, size, dispatch, gating, k, S, "lora", next(adapts))
            found += differences(f"{dispatch} over {size}, {gating}", whole, layer, [5, 0, 7, 1], size)
        whole, layer = sharded(group, size, "all_to_all", "ase", 1, 1, "lora", ("fc1", "fc2"))
        for each in (whole, layer):
            with torch.no_grad():
                each.router.weight.zero_()
                each.router.weight[:, 14] = 50.0
        found += differences(f"one expert over {size}", whole, layer, [4, 4, 4, 4], size)
    return found


def check_waits(rank, folder):
    """A layer reads the counts of its exchange, once, in the forward pass; where experts are gathered nothing at all.

    The ends of groups are read on a CPU only.
    """
    found = []
    group = groups_of(4)
    for form, dispatch, experts in itertools.product(("dense", "grouped"), ("gather", "all_to_all"), ("lora", "ffn")):
        FormCost.cheaper = lambda cost, form=form: form
        _, layer = sharded(group, 4, dispatch, "ase", 3, 1, experts, ("fc1", "fc2"))
        x = tokens_of([5, 2, 5, 0])[1].clone().requires_grad_()
        with HostWaits() as waits:
            result = layer(x)
            (result.output.sum() + result.aux_loss).backward()
        lines = [line for line in waits.lines.elements() if "ops/grouped.py" not in line.split(" < ")[0]]
        if len(lines) != int(dispatch == "all_to_all"):
            found.append(f"{dispatch}, {experts}, {form}: {lines}")
    return found


def check_gated_base(rank, folder):
    """A gated FFN under the experts, on gate and up together and apart, and as the experts; dense and grouped."""
    found = []
    group = groups_of(2)
    cases = itertools.product(
        ("gather", "all_to_all"),
        (("lora", ("gate", "up", "fc2"), "dense"), ("lora", ("fc1", "fc2"), "grouped"), ("ffn", ("fc1",), "dense")),
    )
    for dispatch, (experts, adapt, form) in cases:
        FormCost.cheaper = lambda cost, form=form: form
        torch.manual_seed(0)
        base = SwiGLU(DIM, 20)
        whole = build("ase", 3, 1, experts, adapt, base=copy.deepcopy(base))
        layer = build("ase", 3, 1, experts, adapt, base=base, shard=Shard(15, index=dist.get_rank(group), count=2))
        layer.share_experts(group, dispatch)
        layer.sync_statistics = True
        randomise(whole)
        randomise(layer)
        found += differences(f"{dispatch}, {experts} on {adapt}, {form}", whole, layer, [5, 0, 7, 1], 2)
    return found


def check_many_ranks(rank, folder):
    """More ranks than cores: 15 routed experts over 4, 8 or 16 ranks, uneven; half of the ranks have no tokens."""
    found = []
    world = dist.get_world_size()
    counts = [3, 0, 1, 0, 0, 2, 0, 1] * (world // 8)
    for size in [size for size in (4, 8, 16) if size <= world]:
        group = groups_of(size)
        for dispatch, experts in itertools.product(("gather", "all_to_all"), ("lora", "ffn")):
            options = ("ase", 3, 1, experts, ("fc1", "fc2"))
            whole, layer = sharded(group, size, dispatch, *options)
            found += differences(f"{dispatch} over {size} of {world}, {experts}", whole, layer, counts, size)
    return found


def run_all(rank, folder):
    checks = (check_grid, check_extremes, check_base_of_another_kind, check_trained_base,
              check_second_derivatives, check_traffic, check_prefetch,
              check_recomputation, check_bf16, check_grouped, check_waits, check_gated_base)  # fmt: skip
    return {check.__name__: check(rank, folder) for check in checks}


def test_a_sharded_layer_is_the_same_function_as_one_process(tmp_path):
    world = start_world(run_all, tmp_path, size=4, seconds=240)()
    assert world.codes == [0] * 4, world.codes
    found = [f"rank {rank}, {name}: {text}" for rank, result in enumerate(world.results)
             for name, texts in result.items() for text in texts]  # fmt: skip
    assert not found, "\n".join(found[:40])


@pytest.mark.parametrize("size", [8, pytest.param(16, marks=pytest.mark.nightly)])
def test_worlds_of_more_ranks_than_cores_give_the_numbers_of_one_process(tmp_path, size):
    world = start_world(check_many_ranks, tmp_path, size=size, seconds=240)()
    assert world.codes == [0] * size, world.codes
    assert not (found := [text for texts in world.results for text in texts]), "\n".join(found[:40])


@pytest.mark.single_gpu
def test_the_cost_formulas_by_hand():
    shape = LayerShape(routed=15, active=3, slots=2, ranks=8, values_per_token=2 * (768 + 3072),
                       expert_values=2 * 4 * (768 + 3072), element_bytes=2)  # fmt: skip
    assert shape.gather_bytes() == 2 * 7 * 2 * 2 * 4 * 3840 * 2  # about (P-1)/P of 1.84 MB, with a padded slot
    assert 2.2 < shape.expected_rows(1.0) < 2.5  # q of the reference: 2.3
    assert shape.cheaper(8) == "all_to_all" and shape.cheaper(64) == "gather"
    assert 10 < shape.crossover() < 40


@pytest.mark.single_gpu
def test_expected_rows_are_the_mean_over_random_routing():
    shape = LayerShape(routed=15, active=3, slots=4, ranks=4, values_per_token=1, expert_values=1, element_bytes=4)
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(15) // 4
    picks = torch.rand(20000, 15, generator=generator).topk(3).indices
    rows = sum((owner[picks] == p).any(-1).float().mean().item() for p in range(1, 4))
    assert shape.expected_rows(1.0) == pytest.approx(rows, rel=0.02)


@pytest.mark.single_gpu
def test_shards_cover_all_experts_once():
    for routed, count in itertools.product((1, 5, 15, 16), (1, 2, 3, 4, 7)):
        shards = [Shard(routed, index=i, count=count) for i in range(count)]
        held = [i for shard in shards for i in shard.ids[: shard.real]]
        assert held == list(range(routed))
        assert len({shard.slots for shard in shards}) == 1
