"""The feed-forward network as one step of autograd against the same formula left to autograd, in bands of any size."""

import itertools

import pytest
import torch
from torch import nn

from ase_dist.ops import products
from ase_dist.ops.lowrank import AdaptedLinear, add_lowrank, gated_ffn

pytestmark = pytest.mark.single_gpu

T, D, H, O, N, R = 13, 6, 10, 5, 3, 6


def draws():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def adapted(draw, width_in, width_out, *, bias, pair):
    weight, bias_O = draw(width_out, width_in), draw(width_out) if bias else None
    pairs = (draw(R, width_in), draw(width_out, R)) if pair else (None, None)
    return AdaptedLinear(weight, bias_O, *pairs)


def reference(x, fc1, fc2, gates, activation):
    for fc, act in ((fc1, None), (fc2, activation)):
        x = x if act is None else act(x)
        y = nn.functional.linear(x, fc.weight_OD, fc.bias_O)
        x = y if fc.a_RD is None else add_lowrank(y, x, fc.a_RD, fc.b_OR, gates=gates)
    return x


@pytest.mark.parametrize("chunk_values", [1, 37, 2**40])
@pytest.mark.parametrize(("first", "second", "bias"), list(itertools.product([True, False], repeat=3)))
def test_equals_the_formula_with_every_gradient(first, second, bias, chunk_values, monkeypatch):
    monkeypatch.setattr(products, "CHUNK_VALUES", (chunk_values, chunk_values))
    draw = draws()
    fc1, fc2 = adapted(draw, D, H, bias=bias, pair=first), adapted(draw, H, O, bias=bias, pair=second)
    x, gates, direction = draw(T, D), draw(T, N), draw(T, O)
    leaves = [x, gates, *(pair for fc in (fc1, fc2) for pair in fc[2:] if pair is not None)]
    for leaf in leaves:
        leaf.requires_grad_()
    want = reference(x, fc1, fc2, gates, nn.functional.gelu)
    got = gated_ffn(x, fc1, fc2, gates_TN=gates, activation=nn.functional.gelu)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    options = {"grad_outputs": direction, "allow_unused": True, "materialize_grads": True}
    for mine, theirs in zip(torch.autograd.grad(got, leaves, **options), torch.autograd.grad(want, leaves, **options),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_an_input_without_gradient_gets_none_and_the_pairs_get_theirs():
    draw = draws()
    fc1, fc2 = adapted(draw, D, H, bias=True, pair=True), adapted(draw, H, O, bias=True, pair=True)
    fc1.a_RD.requires_grad_()
    x, gates = draw(T, D), draw(T, N)
    want = torch.autograd.grad(reference(x, fc1, fc2, gates, torch.tanh).sum(), fc1.a_RD)[0]
    gated_ffn(x, fc1, fc2, gates_TN=gates, activation=torch.tanh).sum().backward()
    torch.testing.assert_close(fc1.a_RD.grad, want, rtol=1e-11, atol=1e-11)
    assert x.grad is None


def test_of_the_hidden_width_only_fc1s_output_is_kept():
    draw = draws()
    fc1, fc2 = adapted(draw, D, H, bias=True, pair=True), adapted(draw, H, O, bias=True, pair=True)
    x, gates = draw(T, D).requires_grad_(), draw(T, N)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_ffn(x, fc1, fc2, gates_TN=gates, activation=nn.functional.gelu)
    rows = [tuple(tensor.shape) for tensor in kept if tensor.shape[0] == T]
    assert sorted(rows) == sorted([(T, D), (T, N), (T, H), (T, R), (T, R)])
