"""The accelerator's form of the layer, forced on this device, against the form of a CPU; and what a stack remembers."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from ase_dist.moe import ASEMoE, MoEFFN
from ase_dist.ops import modes
from ase_dist.ops.stacked import Linear, WeightStack, stacked
from tests.moe.conftest import FFN, randomise

pytestmark = pytest.mark.single_gpu


def forms(monkeypatch):
    """A context in which the form is the accelerator's (True) or a CPU's."""

    def choose(form):
        monkeypatch.setattr(modes, "stacks_products", lambda x: form)

    return choose


def make(dtype=torch.float64, **options):
    options = {"num_experts": 6, "k": 2, "num_shared": 1, "rank": 2, "num_tasks": 3, **options}
    layer = MoEFFN(FFN().to(dtype), **options)
    randomise(layer)
    return layer


def tokens(dtype=torch.float64, *, seed=3):
    return torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def step(layer, x, *, direction=None):
    """The output, the losses and every gradient."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    result = layer(x)
    direction = tokens(x.dtype, seed=4) if direction is None else direction
    torch.autograd.backward([result.output, result.aux_loss], [direction, None])
    trained = [p.grad for p in layer.parameters() if p.requires_grad]
    return [result.output.detach(), result.aux_loss.detach(), result.mean_gates, result.expert_counts, x.grad, *trained]


@pytest.mark.parametrize("adapt", [("fc1", "fc2"), ("fc1",), ("fc2",), ("fc1", "bypass")], ids="+".join)
@pytest.mark.parametrize("num_shared", [1, 0])
@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(inplace=True), nn.SiLU(), nn.Mish(), nn.Tanh()])
def test_both_forms_are_one_function(adapt, num_shared, act, monkeypatch):
    layer = make(adapt=adapt, num_shared=num_shared, gating="ase" if num_shared else "topk", alpha=3.0)
    layer.base.act = act
    layer._form._copies_first = isinstance(act, nn.ReLU)
    choose = forms(monkeypatch)
    choose(form=False)
    want = step(layer, tokens())
    choose(form=True)
    torch.testing.assert_close(step(layer, tokens()), want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(step(layer, tokens()), want, rtol=1e-10, atol=1e-12)  # with the stack of the first


@pytest.mark.parametrize("experts", ["lora", "ffn"])
def test_bf16_differs_by_rounding(experts, monkeypatch):
    exact, layer = make(experts=experts, hidden=8), make(torch.bfloat16, experts=experts, hidden=8)
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    choose = forms(monkeypatch)
    choose(form=False)
    want = step(exact, tokens(torch.bfloat16).double(), direction=tokens(torch.bfloat16, seed=4).double())
    choose(form=True)
    got = step(layer, tokens(torch.bfloat16))
    assert torch.equal(got[3], want[3])  # the same experts: logits are float32
    for mine, theirs in zip(got, want, strict=True):
        assert (mine.double() - theirs).abs().max() <= 0.03 * theirs.abs().max()


@pytest.mark.parametrize("form", [True, False])
def test_strides_of_any_kind_give_the_same(form, monkeypatch):
    forms(monkeypatch)(form=form)
    layer = make()
    want = step(layer, tokens(), direction=torch.ones(3, 7, 12, dtype=torch.float64))
    wide = torch.randn(3, 7, 20, dtype=torch.float64)
    wide[..., 4:16] = tokens()
    views = [wide[..., 4:16], tokens().transpose(0, 2).contiguous().transpose(0, 2), tokens()]
    directions = [torch.ones(3, 12, 7, dtype=torch.float64).mT, wide.new_ones(()).expand(3, 7, 12), None]
    for view, direction in zip(views, directions, strict=True):
        direction = torch.ones(3, 7, 24, dtype=torch.float64)[..., ::2] if direction is None else direction  # noqa: PLW2901
        torch.testing.assert_close(step(layer, view, direction=direction), want, rtol=1e-10, atol=1e-12)


def test_a_backward_pass_after_other_forward_passes_has_its_own_weights(monkeypatch):
    forms(monkeypatch)(form=True)
    layer = make()
    want = step(layer, tokens())[5:]
    layer.zero_grad()
    first = layer(tokens())
    values = [p.data.clone() for p in layer.routed.parameters()]
    for parameter in layer.routed.parameters():
        parameter.data += 1.0  # as optimisers of flat buffers do it, unseen by autograd
    layer(tokens())
    for parameter, value in zip(layer.routed.parameters(), values, strict=True):
        parameter.data.copy_(value)
    torch.autograd.backward([first.output, first.aux_loss], [tokens(seed=4), None])
    trained = [p.grad for p in layer.parameters() if p.requires_grad]
    torch.testing.assert_close(trained, want, rtol=1e-10, atol=1e-12)


def changed(layer, how):
    """The layer with other weights in its base."""
    if how == "in place":
        with torch.no_grad():
            layer.base.fc1.weight.mul_(2)
            layer.base.fc2.bias.add_(1)
    elif how == "loaded":
        layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})
    elif how == "assigned":
        layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()}, assign=True)
    elif how == "new":
        layer.base.fc1.weight = nn.Parameter(layer.base.fc1.weight * 2, requires_grad=False)
    elif how == "data, then train()":
        layer.base.fc1.weight.data.mul_(2)
        layer.train()
    elif how == "float and back":
        layer.float().double()
    elif how == "deepcopy":
        layer = copy.deepcopy(layer)
        layer.base.fc1.weight.data.mul_(2)
    elif how == "pickle":
        layer = pickle.loads(pickle.dumps(layer))
        layer.base.fc1.weight.data.mul_(2)
    return layer


@pytest.mark.parametrize(
    "how",
    ["in place", "loaded", "assigned", "new", "data, then train()", "float and back", "deepcopy", "pickle"],
)
def test_other_weights_of_the_base_are_seen(how, monkeypatch):
    choose = forms(monkeypatch)
    choose(form=True)
    layer = make()
    layer(tokens())
    layer = changed(layer, how)
    got = step(layer, tokens())
    choose(form=False)
    torch.testing.assert_close(got, step(layer, tokens()), rtol=1e-10, atol=1e-12)


def test_a_stack_is_in_no_state_dict_and_in_no_file(monkeypatch):
    forms(monkeypatch)(form=True)
    layer = make(torch.float32)

    def size():
        torch.save(layer, buffer := io.BytesIO())
        return len(buffer.getvalue())

    before, names = size(), list(layer.state_dict())
    layer(tokens(torch.float32))
    assert size() == before and list(layer.state_dict()) == names


def test_the_frozen_part_is_copied_once():
    linear = Linear(torch.randn(5, 4), torch.randn(5))
    routed, shared = torch.randn(3, 5, 2), torch.randn(1, 5, 2)
    stack = WeightStack()
    found, _ = stack.fill(linear, (routed, shared), beside=True)
    torch.testing.assert_close(found, stacked(linear, (routed, shared), beside=True))
    pointer = found.weight_OD.data_ptr()
    found.weight_OD[:, :4] = 7  # were it copied again, this would be gone
    routed += 1
    found, number = stack.fill(linear, (routed, shared), beside=True)
    assert found.weight_OD.data_ptr() == pointer and bool((found.weight_OD[:, :4] == 7).all())
    assert torch.equal(found.weight_OD[:, 4:], stacked(linear, (routed, shared), beside=True).weight_OD[:, 4:])
    found.weight_OD[:, 4:] = 7
    assert bool((stack.refill(number, linear, (routed, shared), beside=True).weight_OD == 7).all())
    assert not bool((stack.refill(number - 1, linear, (routed, shared), beside=True).weight_OD[:, 4:] == 7).any())
    linear.weight_OD.add_(1)
    assert torch.equal(
        stack.fill(linear, (routed, None), beside=True)[0].weight_OD, stacked(linear, (routed, None), beside=True)[0]
    )


def test_inference_mode_and_deepspeeds_layer_take_the_same_form(monkeypatch):
    choose = forms(monkeypatch)
    with torch.inference_mode():
        layer = ASEMoE(FFN(), 6, k=2, num_tasks=3)
        randomise(layer)
        choose(form=False)
        want = layer(tokens(torch.float32))
        choose(form=True)
        torch.testing.assert_close(layer(tokens(torch.float32)), want)


def test_accelerators_and_the_meta_device_stack_and_a_cpu_does_not():
    found = {device: modes.stacks_products(torch.empty(1, device=device)) for device in ("cpu", "meta")}
    assert found == {"cpu": False, "meta": True}
