"""A whole block under torch.compile: one graph for training, one for evaluation, and the numbers of plain calls."""

import shutil
from functools import partial

import pytest
import torch
import torch.distributed as dist
from timm.models.vision_transformer import Block
from torch._dynamo.utils import counters

from ase_dist.models.blocks import TaskBlock
from ase_dist.models.lora import add_lora
from ase_dist.moe import ASEMoE, MoEFFN
from ase_dist.moe.forms import FormCost
from ase_dist.moe.sharding import Shard
from ase_dist.ops import modes
from tests.moe.conftest import randomise
from tests.training.conftest import start_world

TASKS, WIDTH = 3, 16


def make_block(kind=MoEFFN, *, dtype=torch.float64, group=None, **options):
    torch.manual_seed(0)
    block = Block(WIDTH, 2, qkv_bias=True, init_values=0.5)
    add_lora(block.attn, rank=2, alpha=None, seed=0)
    settings = {"num_experts": 5, "k": 2, "num_shared": 1, "rank": 2, "num_tasks": TASKS, "hidden": 8, "seed": 1}
    block = TaskBlock(block, moe=kind(block.mlp, **settings | options))
    if group is not None:
        block.mlp.share_experts(group, "gather")
    randomise(block.mlp)
    return block.to(dtype)


def tokens(*, rank=0, dtype=torch.float64):
    return torch.randn(TASKS, 2, 5, WIDTH, generator=torch.Generator().manual_seed(3 + rank), dtype=dtype)


def train(block, call, x):
    """Output, router losses, statistics and all gradients of a training step."""
    block.train().zero_grad()
    x = x.clone().requires_grad_()
    results = call(x)
    (results[0].square().sum() + results[1]).backward()
    grads = [parameter.grad for parameter in block.parameters() if parameter.requires_grad]
    return [*(result.detach() for result in results), x.grad, *grads]


def evaluate(block, call, x):
    block.eval()
    with torch.no_grad():
        return list(call(x))


def check_compiled(block, x, *, backend, tolerance):
    """The plain block's numbers from one graph for each mode, whatever the order of training and evaluation."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            for run in (train, evaluate):
                have, want = run(block, compiled, x * (step + 1)), run(block, block, x * (step + 1))
                torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.single_gpu
@pytest.mark.parametrize(
    ("form", "kind", "options"),
    [
        ("dense", MoEFFN, {}),
        ("stacked", ASEMoE, {}),
        pytest.param("grouped", MoEFFN, {}, marks=pytest.mark.nightly),
        pytest.param("dense", MoEFFN, {"experts": "ffn"}, marks=pytest.mark.nightly),
    ],
)
def test_a_block_is_one_graph_for_each_mode(form, kind, options, monkeypatch):
    monkeypatch.setattr(modes, "stacks_products", lambda x: form == "stacked")
    if form == "grouped":
        monkeypatch.setattr(FormCost, "cheaper", lambda cost: "grouped")
    check_compiled(make_block(kind, **options), tokens(), backend="aot_eager", tolerance=1e-9)


@pytest.mark.single_gpu
@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductors_code_gives_the_same_numbers():
    block = make_block(dtype=torch.float32)
    check_compiled(block, tokens(dtype=torch.float32), backend="inductor", tolerance=2e-4)


def check_gather(rank, folder, experts):
    """This rank's block with experts of both ranks, compiled against plain; the plain one has tests of its own."""
    group = dist.new_subgroups_by_enumeration([[0, 1]])[0]
    shard = Shard(4, index=rank, count=2)
    block = make_block(experts=experts, shard=shard, sync_statistics=True, group=group)
    check_compiled(block, tokens(rank=rank), backend="aot_eager", tolerance=1e-9)
    return "equal"


@pytest.mark.multi_gpu
@pytest.mark.parametrize("experts", ["lora", pytest.param("ffn", marks=pytest.mark.nightly)])
def test_a_block_whose_experts_are_gathered_is_one_graph_too(experts, tmp_path):
    world = start_world(partial(check_gather, experts=experts), tmp_path, size=2, seconds=240)()
    assert world.codes == [0, 0] and world.results == ["equal", "equal"]
