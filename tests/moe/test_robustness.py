"""The layer on paths that other code takes: second derivatives, hooks, copies, in-place and random activations."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from timm.layers import GlobalResponseNormMlp
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from ase_dist.errors import UserError
from ase_dist.moe import FFN, ASEMoE, MoEFFN, TaskFFN, deepspeed_compat, global_state, router_loss, set_tasks
from ase_dist.ops import modes
from tests.moe import conftest

pytestmark = pytest.mark.single_gpu


def make(experts="lora", *, base=None, kind=MoEFFN, dtype=torch.float64, **options):
    options = {"num_experts": 6, "k": 2, "num_shared": 1, "rank": 2, "num_tasks": 2, "hidden": 8, **options}
    layer = kind((base or conftest.FFN()).to(dtype), experts=experts, **options)
    conftest.randomise(layer)
    return layer


def tokens(dtype=torch.float64, *, seed=3):
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Second derivatives


def penalty_gradients(layer, x, *, function=lambda result: result.output.square().sum()):
    """The gradients of a gradient penalty: a derivative of a derivative with respect to x and every trained tensor."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(layer(x)), x, create_graph=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    found = torch.autograd.grad(first.square().sum(), leaves, allow_unused=True, materialize_grads=True)
    return first.detach(), found


def plain_copy(layer, monkeypatch):
    """The same layer left to PyTorch's autograd, as in a program that is exported."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    return layer


@pytest.mark.parametrize("adapt", [("fc1", "fc2"), ("fc1",), ("fc2", "bypass")], ids="+".join)
@pytest.mark.parametrize("linear", ["plain", "fallback", "stacked"])
def test_second_derivatives_of_lora_experts_are_those_of_plain_autograd(adapt, linear, monkeypatch):
    layer = make(adapt=adapt)
    monkeypatch.setattr(modes, "stacks_products", lambda x: linear == "stacked")
    if linear == "fallback":  # one linear that is called, one with hand-written autograd
        layer.base.fc1.register_forward_hook(lambda *_: None)
    got = penalty_gradients(layer, tokens())
    want = penalty_gradients(plain_copy(layer, monkeypatch), tokens())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    assert all(gradient.abs().sum() > 0 for gradient in want[1])


def test_second_derivatives_of_ffn_experts_are_those_of_plain_autograd(monkeypatch):
    layer = make("ffn")
    got = penalty_gradients(layer, tokens())
    want = penalty_gradients(plain_copy(layer, monkeypatch), tokens())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("experts", ["lora", "ffn"])
def test_the_weights_of_gradnorm_get_the_right_gradient(experts, monkeypatch):
    """Gradient norms of weighted losses on a shared tensor, differentiated by the weights (Chen et al. 2018)."""

    def gradient_by_weights(layer):
        weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
        losses = layer(tokens()).output.square().mean(dim=(1, 2))
        trained = layer.shared.tensors()["fc1.A" if experts == "lora" else "fc1.weight"]
        norms = [
            torch.autograd.grad(w * loss, trained, create_graph=True)[0].norm()
            for w, loss in zip(weights, losses, strict=True)
        ]
        return torch.autograd.grad((norms[0] - 2 * norms[1]).abs(), weights)[0]

    layer = make(experts)
    got = gradient_by_weights(layer)
    torch.testing.assert_close(got, gradient_by_weights(plain_copy(layer, monkeypatch)), rtol=1e-9, atol=1e-12)
    assert got.abs().min() > 0


@pytest.mark.parametrize("form", ["cpu", "accelerator"])
def test_second_derivatives_are_those_of_finite_differences(form, monkeypatch):
    monkeypatch.setattr(modes, "stacks_products", lambda x: form == "accelerator")
    layer = make()
    x = tokens()[:, :1].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x).output, (x,), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What runs twice


class RandomScale(nn.Module):
    def forward(self, x):
        return x * (1 + torch.rand_like(x)) if self.training else x


@pytest.mark.parametrize(
    "act",
    [nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), nn.RReLU(), RandomScale(), nn.Dropout(0.01),
     lambda x: nn.functional.dropout(nn.functional.gelu(x), 0.3)],
)  # fmt: skip
@pytest.mark.parametrize("train", [True, False])
def test_an_activation_that_differs_when_it_runs_again_is_refused(act, train):
    if isinstance(act, nn.Module):
        act.train(train)
    base = FFN(nn.Linear(12, 20), act, nn.Linear(20, 12))
    with pytest.raises(ValueError, match=r"^act: .*runs again.*take the dropout"):
        MoEFFN(base, num_experts=4, k=1, num_tasks=2)
    if isinstance(act, nn.Module):
        assert act.training is train


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(dim=0)


@pytest.mark.parametrize("act", [Centred(), nn.BatchNorm1d(20)])
def test_an_activation_that_mixes_tokens_is_refused(act):
    with pytest.raises(ValueError, match=r"^act: .*not elementwise"):
        MoEFFN(FFN(nn.Linear(12, 20), act, nn.Linear(20, 12)), num_experts=4, k=1, num_tasks=2)


class Doubled(conftest.FFN):
    def forward(self, x):
        return 2 * super().forward(x)


class Mixed(conftest.FFN):
    def forward(self, x):
        return super().forward(x - x.mean(dim=-2, keepdim=True))


def normed():
    base = GlobalResponseNormMlp(12, 20)  # its norm is called grn, and goes over tokens
    nn.init.normal_(base.grn.weight)
    return base


@pytest.mark.parametrize("base", [Doubled, Mixed, normed])
def test_a_base_that_computes_more_than_its_parts_is_refused(base):
    with pytest.raises(UserError, match=r"computes something else than fc2\(norm\(act\(fc1\(x\)\)\)\) of its parts"):
        MoEFFN(base(), num_experts=4, k=1, num_tasks=2)


def test_no_random_number_is_drawn_by_the_trial():
    base = conftest.FFN()
    before = torch.get_rng_state()
    MoEFFN(base, num_experts=4, k=1, num_tasks=2, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("act", [nn.GELU(), nn.PReLU(), nn.PReLU(20), nn.Dropout(0.0), nn.Sequential(nn.ReLU()),
                                 torch.tanh, nn.Identity()])  # fmt: skip
def test_other_activations_are_taken(act):
    MoEFFN(FFN(nn.Linear(12, 20), act, nn.Linear(20, 12)), num_experts=4, k=1, num_tasks=2)


@pytest.mark.parametrize("experts", ["lora", "ffn"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.LeakyReLU])
@pytest.mark.parametrize("adapt", [("fc1", "fc2"), ("fc2",)], ids="+".join)
def test_an_in_place_activation_trains_as_the_other(act, experts, adapt):
    layers = [
        make(experts, base=FFN(nn.Linear(12, 20), act(inplace=inplace), nn.Linear(20, 12)), adapt=adapt)
        for inplace in (True, False)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    results = []
    for layer in layers:
        x = tokens().requires_grad_()
        output = layer(x).output
        results.append([output.detach(), *torch.autograd.grad(
            output.square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)], allow_unused=True,
            materialize_grads=True)])  # fmt: skip
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Hooks


def halve(module, arguments, output):
    return output / 2


def test_the_hooks_of_a_base_linear_run():
    layer, wanted = make(adapt=("fc1", "bypass")), make(adapt=("fc1", "bypass"))
    with torch.no_grad():
        wanted.base.fc2.weight.div_(2)
        wanted.base.fc2.bias.div_(2)
    layer.base.fc2.register_forward_hook(halve)
    torch.testing.assert_close(layer(tokens()).output, wanted(tokens()).output, rtol=1e-12, atol=1e-12)
    seen = []
    layer.base.fc1.register_forward_pre_hook(lambda module, arguments: seen.append("fc1"))
    layer.base.fc1.register_full_backward_hook(lambda *_: seen.append("back"))
    layer(tokens().requires_grad_()).output.sum().backward()
    assert seen == ["fc1", "back"]


def test_pruned_parametrised_and_replaced_linears_are_called():
    for change, weight_of in (
        (lambda fc: prune.l1_unstructured(fc, "weight", 0.5), lambda fc: fc.weight),
        (lambda fc: parametrize.register_parametrization(fc, "weight", nn.Tanh()), lambda fc: fc.weight),
    ):
        layer, wanted = make(), make()
        change(layer.base.fc1)
        with torch.no_grad():
            layer.base.fc1(tokens())  # pruning sets the weight when the module is called
            wanted.base.fc1.weight.copy_(weight_of(layer.base.fc1))
        torch.testing.assert_close(layer(tokens()).output, wanted(tokens()).output, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            original = next(p for name, p in layer.base.fc1.named_parameters() if "orig" in name)
            before = layer(tokens()).output
            original.mul_(-1)
        assert not torch.allclose(layer(tokens()).output, before)
    layer = make()
    layer.base.fc2.forward = lambda x: nn.functional.linear(x, torch.zeros(12, 20, dtype=x.dtype))
    shifted = make()
    with torch.no_grad():
        shifted.base.fc2.weight.zero_()
        shifted.base.fc2.bias.zero_()
    torch.testing.assert_close(layer(tokens()).output, shifted(tokens()).output, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Copies


def tags(layer):
    return [getattr(p, "group_name", None) for p in layer.routed.parameters() if deepspeed_compat.is_routed(p)]


@pytest.mark.parametrize("how", ["built", "deepcopy", "pickle", "torch.save", "assign", "double", "new parameters"])
def test_the_tags_of_experts_survive(how):
    layer = nn.Sequential(make(kind=ASEMoE))
    if how == "deepcopy":
        layer = copy.deepcopy(layer)
    elif how == "pickle":
        layer = pickle.loads(pickle.dumps(layer))
    elif how == "torch.save":
        torch.save(layer, buffer := io.BytesIO())
        layer = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    elif how == "assign":
        layer.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()}, assign=True)
    elif how == "double":
        layer = layer.float().double()
    elif how == "new parameters":
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            layer = layer.float()
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert tags(layer[0]) == ["ep_size_1"] * 4
    assert not any(deepspeed_compat.is_routed(p) for p in layer[0].shared.parameters())
    groups = [{"name": "trained", "params": [p for p in layer.parameters() if p.requires_grad]}]
    found = {group["name"]: group.get("moe", False) for group in deepspeed_compat.optimizer_groups(groups)}
    assert sorted(found.values()) == [False, True]


def test_a_copy_is_the_same_function_with_tensors_of_its_own():
    layer = make(kind=ASEMoE)
    other = copy.deepcopy(layer)
    torch.testing.assert_close(other(tokens())[0], layer(tokens())[0], rtol=0, atol=0)
    with torch.no_grad():
        other.router.weight.zero_()
    assert layer.router.weight.abs().sum() > 0


def test_what_the_first_version_wrote_is_read():
    layer, other = make(kind=ASEMoE), ASEMoE(conftest.FFN().double(), 6, k=2, rank=2, num_tasks=2, seed=5)
    other.load_state_dict({f"moe.{name}": tensor for name, tensor in layer.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))
    assert layer.moe is layer


def task_ffn():
    return TaskFFN(MoEFFN(conftest.FFN(), num_experts=4, k=1, num_tasks=2))


def test_the_last_batch_is_in_no_copy_and_in_no_pickle():
    model = nn.Sequential(task_ffn())

    def size():
        torch.save(model, buffer := io.BytesIO())
        return len(buffer.getvalue())

    set_tasks(model, [0, 1])
    before = size()
    model(torch.randn(2, 500, 12)).sum().backward()
    assert size() <= before + 64
    assert copy.deepcopy(model)[0].last is None and model[0].last is not None
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_router_loss_without_a_graph_is_an_error(reentrant):
    model = task_ffn()
    set_tasks(model, [0, 1])
    x = torch.randn(2, 6, 12, requires_grad=True)
    output = checkpoint(model, x, use_reentrant=reentrant)
    if not reentrant:
        (output.sum() + router_loss(model)).backward()
        assert model.layer.router.weight.grad.abs().sum() > 0
        return
    with pytest.raises(ValueError, match="use_reentrant=False"):
        router_loss(model)
    with torch.no_grad():
        assert router_loss(model).isfinite()
        model(x)
    with pytest.raises(ValueError, match="kept no graph"):
        router_loss(model)
    model.eval()
    assert router_loss(model).isfinite()  # of a validation, for the log


# ---------------------------------------------------------------------------------------------------------------------
# Tasks and devices


def test_tasks_may_be_numbers_of_any_library():
    layer = make()
    want = layer(tokens()[1], task=1)
    for task in (np.int64(1), np.array(1), torch.tensor(1)):
        got = layer(tokens()[1], task=task)
        assert torch.equal(got.output, want.output) and got.expert_counts.shape == (6,)
    for tasks in (np.array([1, 0]), torch.tensor([1, 0]), (np.int64(1), 0)):
        assert torch.equal(layer(tokens(), task=tasks).output, layer(tokens(), task=[1, 0]).output)
    for task in ("1", 1.5, [0.5, 1]):
        with pytest.raises(ValueError, match="wanted the number of a task"):
            layer(tokens(), task=task)


@pytest.mark.parametrize("tasks", [[], [5], [-1], [0, 2]])
def test_tasks_that_a_layer_does_not_have_are_refused_at_once(tasks):
    with pytest.raises(ValueError, match=r"set_tasks: got .*wanted one or more numbers from 0 to 1"):
        set_tasks(task_ffn(), tasks)


def test_a_task_ffn_follows_the_tasks_that_are_kept():
    model = task_ffn()
    x = torch.randn(2, 3, 12)
    want = model.layer(x, task=[1, 1]).output
    model.layer.keep_tasks([1])
    assert model.tasks == (0,)
    torch.testing.assert_close(model(x), want)


def test_the_layer_runs_on_meta_tensors():
    layer = make().to("meta")
    result = layer(tokens().to("meta").requires_grad_())
    result.output.sum().backward()
    assert result.output.shape == (2, 5, 12)


def test_a_base_of_convolutions_or_with_parts_of_other_names_is_one_sentence():
    convolutions = FFN(nn.Conv2d(12, 20, 1), nn.GELU(), nn.Conv2d(20, 12, 1))
    with pytest.raises(ValueError, match=r"fc1 of FFN is a Conv2d, wanted a linear.*nn\.Linear"):
        MoEFFN(convolutions)
    with pytest.raises(ValueError, match=r"has no fc1, act, fc2; .*ase_dist\.moe\.FFN"):
        MoEFFN(nn.Sequential(nn.Linear(3, 3)))


def test_global_state_is_the_same_for_both_kinds():
    plain, deepspeed = make(), make(kind=ASEMoE)
    assert isinstance(deepspeed, MoEFFN)
    for name, tensor in global_state(plain).items():
        assert torch.equal(tensor, deepspeed.global_state()[name])
    assert plain.state_dict().keys() == deepspeed.state_dict().keys()
