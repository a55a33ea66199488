"""LoRA on a linear: against peft, against the merged weight, and independent of the order of construction."""

import pytest
import torch
from torch import nn

from ase_dist.models.lora import LoRALinear, Streams, add_lora, merge_lora

pytestmark = pytest.mark.single_gpu


def linear(seed=0, dim_in=6, dim_out=10, bias=True):
    torch.manual_seed(seed)
    return nn.Linear(dim_in, dim_out, bias=bias)


@pytest.fixture
def x():
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(3), requires_grad=True)


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_peft_in_output_and_gradients(alpha, bias, x):
    tuners = pytest.importorskip("peft.tuners.lora")
    ours = LoRALinear(linear(bias=bias), rank=3, alpha=alpha, seed=1)
    theirs = tuners.Linear(linear(bias=bias), "a", config=_config(rank=3, alpha=alpha or 3), r=3, lora_alpha=alpha or 3)
    with torch.no_grad():
        ours.lora_B.normal_(generator=torch.Generator().manual_seed(4))
        theirs.lora_A["a"].weight.copy_(ours.lora_A)
        theirs.lora_B["a"].weight.copy_(ours.lora_B)
    other = x.detach().clone().requires_grad_()
    weights = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(5))
    (ours(x) * weights).sum().backward()
    (theirs(other) * weights).sum().backward()
    torch.testing.assert_close(ours(x), theirs(other))
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(ours.lora_A.grad, theirs.lora_A["a"].weight.grad)
    torch.testing.assert_close(ours.lora_B.grad, theirs.lora_B["a"].weight.grad)
    assert ours.base.weight.grad is None


def _config(rank, alpha):
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha)


def test_starts_as_its_base_bit_for_bit(x):
    base = linear()
    assert torch.equal(LoRALinear(base, rank=4, seed=0)(x), base(x))


def test_the_merged_weight_computes_the_same(x):
    layer = LoRALinear(linear(), rank=2, alpha=5.0, seed=0)
    nn.init.normal_(layer.lora_B)
    merged = nn.functional.linear(x, layer.merged_weight(), layer.base.bias)
    torch.testing.assert_close(layer(x), merged)
    assert not layer.merged_weight().requires_grad


def test_a_trained_base_gets_its_gradient_too(x):
    layer = LoRALinear(linear(), rank=2, seed=0).requires_grad_(True)
    nn.init.normal_(layer.lora_B)
    layer(x).square().sum().backward()
    rows = layer(x).detach().flatten(0, 1)
    torch.testing.assert_close(layer.base.weight.grad, 2 * rows.T @ x.detach().flatten(0, 1))


def test_initialisation_follows_from_seed_and_name_alone():
    def build(order):
        module = nn.ModuleDict({name: linear() for name in order})
        torch.rand(len(order))  # the global generator is of no account
        add_lora(module, rank=2, alpha=None, seed=7)
        return {name: module[name].lora_A for name in order}

    first, second = build(["qkv", "proj"]), build(["proj", "qkv"])
    assert torch.equal(first["qkv"], second["qkv"]) and torch.equal(first["proj"], second["proj"])
    assert not torch.equal(first["qkv"], first["proj"])
    bound = 6**-0.5
    assert 0 < first["qkv"].abs().max() <= bound


def test_add_lora_takes_only_the_named_linears_and_none_at_rank_0():
    module = nn.ModuleDict({"fc1": linear(), "act": nn.GELU(), "fc2": linear()})
    add_lora(module, rank=0, alpha=None, seed=0)
    assert not any(isinstance(child, LoRALinear) for child in module.values())
    add_lora(module, rank=1, alpha=None, seed=0, only=["fc2"])
    assert isinstance(module["fc2"], LoRALinear) and not isinstance(module["fc1"], LoRALinear)
    assert set(module.state_dict()) >= {"fc2.base.weight", "fc2.base.bias", "fc2.lora_A", "fc2.lora_B"}


def test_refuses_rank_0():
    with pytest.raises(ValueError, match="rank: got 0, wanted 1 or more"):
        LoRALinear(linear(), rank=0, seed=0)


def test_merged_models_compute_the_same_with_plain_linears(x):
    model = nn.Sequential(nn.Sequential(linear(), nn.GELU()), linear(1, 10, 6, bias=False))
    add_lora(model[0], rank=3, alpha=6.0, seed=1)
    add_lora(model, rank=2, alpha=None, seed=2)
    for layer in (model[0][0], model[1]):
        nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(4))
    wanted = model(x)
    merge_lora(model)
    assert type(model[0][0]) is nn.Linear and type(model[1]) is nn.Linear and model[1].bias is None
    torch.testing.assert_close(model(x), wanted)


# ---------------------------------------------------------------------------------------------------------------------
# A pair for each task beside the shared one


def with_task_pairs(*, alpha=None, num_tasks=3):
    """A LoRA linear whose pairs are all off their start, and its streams."""
    module, streams = nn.Sequential(linear()), Streams()
    add_lora(module, rank=2, alpha=alpha, seed=1, task_rank=4, num_tasks=num_tasks, streams=streams)
    drawn = torch.Generator().manual_seed(4)
    for pair in (module[0].lora_B, module[0].lora_tasks.B):
        nn.init.normal_(pair, generator=drawn)
    return module, streams


def task_by_task(layer, x, tasks):
    """The slow version: the base and two plain low-rank maps for each stream."""
    scale, own = layer.scale, layer.lora_tasks
    streams = []
    for x_TD, task in zip(x.chunk(len(tasks)), tasks, strict=True):
        y = layer.base(x_TD) + scale * (x_TD @ layer.lora_A.T) @ layer.lora_B.T
        streams.append(y + own.scale * (x_TD @ own.A[task].T) @ own.B[task].T)
    return torch.cat(streams)


@pytest.mark.parametrize("tasks", [None, [0, 1, 2], [2], [2, 0]])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_each_stream_gets_the_shared_pair_and_its_tasks_own(alpha, tasks):
    module, streams = with_task_pairs(alpha=alpha)
    streams.tasks, count = tasks, 3 if tasks is None else len(tasks)
    module.double()
    x, weights = (
        torch.randn(4 * count, 5, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
        for width in (6, 10)
    )
    x.requires_grad_()
    wanted = task_by_task(module[0], x, range(3) if tasks is None else tasks)
    torch.testing.assert_close(module(x), wanted)
    trained = [x, *(p for p in module.parameters() if p.requires_grad)]
    assert len(trained) == 5
    for got, right in zip(
        torch.autograd.grad((module(x) * weights).sum(), trained),
        torch.autograd.grad((wanted * weights).sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


def test_tasks_kept_compute_as_before_and_one_alone_is_merged(x):
    module, streams = with_task_pairs(alpha=6.0)
    streams.tasks = [2, 0]
    wanted = module(torch.cat([x, x])).detach()
    module[0].lora_tasks.keep([2, 0])
    assert not module[0].lora_tasks.A.requires_grad
    streams.tasks = [0, 1]
    torch.testing.assert_close(module(torch.cat([x, x])), wanted)
    merge_lora(module)
    assert isinstance(module[0], LoRALinear), "several tasks are not one linear"
    module[0].lora_tasks.keep([1])
    merge_lora(module)
    assert type(module[0]) is nn.Linear
    torch.testing.assert_close(module(x), wanted[3:])


def test_pairs_of_tasks_start_as_nothing_and_each_from_its_own_number(x):
    module, _ = with_task_pairs()
    few, _ = with_task_pairs(num_tasks=2)
    nn.init.zeros_(module[0].lora_tasks.B)
    shared = LoRALinear(linear(), rank=2, seed=0)
    shared.load_state_dict({name: p for name, p in module[0].state_dict().items() if "tasks" not in name})
    assert torch.equal(module(x), shared(x))
    assert torch.equal(module[0].lora_tasks.A[:2], few[0].lora_tasks.A)
    assert not torch.equal(module[0].lora_tasks.A[0], module[0].lora_tasks.A[1])
