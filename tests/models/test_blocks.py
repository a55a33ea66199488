"""A block over task streams: timm's block for each stream where nothing is adapted, each stream for itself."""

import copy

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ase_dist.models.blocks import BlockOutput, TaskBlock
from ase_dist.models.lora import add_lora
from ase_dist.moe import MoEFFN
from ase_dist.ops.modes import SHORT

pytestmark = pytest.mark.single_gpu


def timm_block(**options):
    torch.manual_seed(0)
    return Block(16, 2, qkv_bias=True, init_values=0.5, **options)


def moe(base):
    return MoEFFN(base, num_experts=4, k=2, num_shared=1, rank=2, num_tasks=3, seed=1)


@pytest.fixture
def x():
    return torch.randn(3, 2, 5, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ffn", ["plain", "lora", "moe"])
def test_untouched_adapters_leave_timms_block(ffn, x):
    expected = torch.stack([timm_block()(stream) for stream in x])
    block = timm_block()
    layer = moe(block.mlp) if ffn == "moe" else None
    if ffn != "plain":
        add_lora(block.attn, rank=2, alpha=None, seed=0)
    if ffn == "lora":
        add_lora(block.mlp, rank=2, alpha=None, seed=0)
    output = BlockOutput(*TaskBlock(block, moe=layer)(x))
    torch.testing.assert_close(output.x_tBPD, expected, rtol=1e-6, atol=1e-6)
    experts = 4 if ffn == "moe" else 0
    assert output.expert_counts.shape == output.mean_gates.shape == (3, experts)
    assert output.expert_counts.dtype == torch.int64 and output.aux_loss.shape == ()


def test_streams_do_not_mix_and_can_be_chosen(x, stirred):
    block = timm_block()
    add_lora(block.attn, rank=2, alpha=None, seed=0)
    stirred(block := TaskBlock(block, moe=moe(block.mlp)))
    together = BlockOutput(*block(x))
    for task in range(3):
        alone = BlockOutput(*block(x[task : task + 1], [task]))
        torch.testing.assert_close(alone.x_tBPD[0], together.x_tBPD[task])
        assert torch.equal(alone.expert_counts[0], together.expert_counts[task])
    picked = BlockOutput(*block(x[[2, 0]], [2, 0]))
    torch.testing.assert_close(picked.x_tBPD, together.x_tBPD[[2, 0]])


def test_returns_a_plain_tuple_of_tensors(x):
    output = TaskBlock(timm_block())(x)
    assert type(output) is tuple and all(isinstance(value, torch.Tensor) for value in output)


def test_drop_path_drops_whole_tokens_of_one_stream_and_image(x):
    torch.manual_seed(0)
    block = TaskBlock(timm_block(drop_path=0.5)).train()
    nn.init.zeros_(block.ls1.gamma)  # the attention branch adds nothing
    torch.manual_seed(4)
    delta = BlockOutput(*block(x)).x_tBPD - x
    block.eval()
    full = BlockOutput(*block(x)).x_tBPD - x
    kept = delta.flatten(2).abs().sum(-1) > 0
    assert kept.any() and not kept.all()
    torch.testing.assert_close(delta[kept], 2 * full[kept])


def test_has_no_parameters_of_its_own():
    assert not list(TaskBlock(timm_block()).parameters(recurse=False))


def test_autocast_is_what_it_is_told(x):
    block = TaskBlock(copy.deepcopy(timm_block()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = block(x, None, torch.bfloat16)[0]
        off = block(x)[0]
    assert torch.equal(block(x, None, torch.bfloat16)[0], inside)
    assert torch.equal(block(x)[0], off) and not torch.equal(off, inside)


class Called(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("tokens", "dtype", "training", "fused"),
    [
        (5, torch.bfloat16, True, False),
        (SHORT - 1, torch.bfloat16, True, False),
        (SHORT, torch.bfloat16, True, True),
        (5, torch.bfloat16, False, True),
        (5, torch.float32, True, True),
    ],
)
def test_short_attention_is_trained_unfused_in_bf16_on_a_cpu(tokens, dtype, training, fused):
    x = torch.randn(2, 1, tokens, 16, dtype=dtype, generator=torch.Generator().manual_seed(2)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    with Called() as called:
        y = TaskBlock(timm_block().to(dtype)).train(training)(x)[0]
        y.float().square().sum().backward()
    assert any("flash_attention" in name for name in called.names) == fused
    expected = TaskBlock(timm_block().double()).train(training)(exact)[0]
    expected.square().sum().backward()
    for found, wanted in ((y, expected), (x.grad, exact.grad)):
        assert (found.double() - wanted).norm() <= 1e-2 * wanted.norm()
