"""The layer under torch.compile, torch.func and forward-mode autograd: the same numbers as by plain calls."""

import pytest
import torch
from torch import nn

from ase_dist.moe import ASEMoE, MoEFFN
from ase_dist.ops import modes
from tests.moe import conftest

pytestmark = pytest.mark.single_gpu


def make(kind=MoEFFN, *, act=None, **options):
    base = conftest.FFN()
    base.act = act or base.act
    layer = kind(base.double(), num_experts=5, k=2, rank=2, num_tasks=2, hidden=8, **options)
    conftest.randomise(layer)
    return layer


def tokens():
    return torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def step(layer, call):
    layer.zero_grad()
    x = tokens().requires_grad_()
    result = call(x)
    (result[0].square().sum() + result[1]).backward()
    return [result[0].detach(), result[1].detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


@pytest.mark.parametrize("form", ["cpu", "accelerator"])
@pytest.mark.parametrize("options", [{}, {"act": nn.Mish()}, {"experts": "ffn"}, {"kind": ASEMoE}], ids=str)
def test_compiles_as_one_graph_once_for_each_mode(options, form, monkeypatch):
    monkeypatch.setattr(modes, "stacks_products", lambda x: form == "accelerator")
    layer = make(**options)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(layer, compiled), step(layer, layer), rtol=1e-9, atol=1e-11)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mode in (True, False, True):
            layer.train(mode)
            torch.testing.assert_close(step(layer, compiled), step(layer, layer), rtol=1e-9, atol=1e-11)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("experts", ["lora", "ffn"])
def test_torch_func_gives_autograds_numbers(experts):
    layer = make(experts=experts)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (tokens(),)).output.square().sum()

    want = torch.autograd.grad(layer(tokens()).output.square().sum(), list(trained.values()))
    torch.testing.assert_close(tuple(torch.func.grad(loss)(trained).values()), want, rtol=1e-9, atol=1e-11)
    batched = torch.func.vmap(lambda x: layer(x).output)(torch.stack([tokens(), 2 * tokens()]))
    torch.testing.assert_close(batched[1], layer(2 * tokens()).output)
    _, tangent = torch.func.jvp(lambda x: layer(x).output, (tokens(),), (tokens(),))
    difference = layer(tokens() * (1 + 1e-6)).output - layer(tokens() * (1 - 1e-6)).output
    torch.testing.assert_close(tangent, difference / 2e-6, rtol=1e-5, atol=1e-6)


def test_jit_trace_is_refused_in_one_sentence():
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace .*use torch\.export"):
        torch.jit.trace(make(), tokens())
