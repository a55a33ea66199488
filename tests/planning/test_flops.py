"""FLOPs counted against sums by hand, forward and backward, for every kind of layer that torch's counter misses."""

import pytest
import torch

from ase_dist.planning.flops import FlopCounter, count_flops
from ase_dist.tasks import select_tasks

pytestmark = pytest.mark.single_gpu

D, H, TOKENS, TASKS, BLOCKS = 32, 128, 5, 5, 2  # of conftest's tiny ViT on 32 pixels


def products(*sides):
    result = 2
    for side in sides:
        result *= side
    return result


def test_lora_experts_and_routers_cost_their_products(settings_for):
    bare = count_flops(settings_for(moe={"enabled": False}, lora_rank=0))
    lora = count_flops(settings_for(lora_rank=0, moe={"num_experts": 4, "rank": 2}))
    rows = TOKENS * TASKS * BLOCKS
    pairs = 2 * products(rows, 8, D + H)  # fc1 and fc2, N * r = 8 columns each
    router = products(rows, D, 4)
    assert lora.forward - bare.forward == pairs + router
    assert lora.backward - bare.backward == 2 * (pairs + router)


def test_feed_forward_experts_cost_those_that_are_active(settings_for):
    bare = count_flops(settings_for(moe={"enabled": False}, lora_rank=0))
    ffn = count_flops(settings_for(
        lora_rank=0, moe={"experts": "ffn", "hidden": 64, "num_experts": 8, "k": 2, "num_shared": 0, "gating": "topk"}
    ))  # fmt: skip
    rows = TOKENS * TASKS * BLOCKS
    base, active = 2 * products(rows, D, H), 2 * products(2 * rows, D, 64)
    router, bias1, bias2 = products(rows, D, 8), products(2 * rows, 1, 64), products(rows, 8, D)
    assert ffn.forward - bare.forward == active + router + bias1 + bias2 - base
    assert ffn.backward - bare.backward == 2 * (active + router + bias2) + bias1 - base


def test_a_resnet_without_sharing_costs_tasks_nothing_but_heads(settings_for):
    plain = {"backbone": "resnet18", "backbone_args": {}, "tune": "full", "lora_rank": 0, "moe": {"enabled": False}}
    one, five = (count_flops(settings_for(tasks=tasks, head="linear", **plain)) for tasks in (["edge"], None))
    heads = {task.name: products(16, 512, 16 * task.channels) for task in select_tasks("scenes")}
    assert five.forward - one.forward == sum(heads.values()) - heads["edge"]


@pytest.mark.parametrize("wide", [{}, {"out_dtype": torch.float32}])
def test_products_cost_the_same_whatever_the_type_of_their_output(wide):
    a, b = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((3, 5, 7), (3, 7, 11)))
    with FlopCounter() as one:
        torch.bmm(a, b, **wide)
    with FlopCounter() as other:
        torch.mm(a[0], b[0], **wide)
    assert one.total == 2 * 3 * 5 * 7 * 11 and other.total == 2 * 5 * 7 * 11
