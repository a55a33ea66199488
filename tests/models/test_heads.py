"""The heads: shapes, the exchange of convolution and upsampling, no statistic across images."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from ase_dist.models.heads import LinearHead, PUPHead
from ase_dist.ops.doubled_conv import Doubled, double
from ase_dist.registries import HEADS
from tests.models.conftest import ask, head_of

pytestmark = pytest.mark.single_gpu


def tokens(count=2, grid=(3, 3), dim=12):
    return torch.randn(count, grid[0] * grid[1], dim, generator=torch.Generator().manual_seed(0))


def pup(**options):
    torch.manual_seed(0)
    return PUPHead(12, 5, **{"grid": (3, 3), "patch": 16, "width": 8, **options})


@pytest.mark.parametrize(
    ("name", "patch", "factor"),
    [
        ("pup", 16, 16),
        ("pup", 14, 16),
        ("pup", 8, 8),
        ("pup", 32, 16),
        ("linear", 16, 4),
        ("linear", 8, 4),
        ("linear", 2, 1),
        ("dpt", 16, 16),
        ("dpt", 14, 16),
        ("dpt", 8, 8),
        ("dpt", 32, 32),
        ("hrnet", 16, 4),
        ("hrnet", 4, 1),
        ("multi_level", 14, 4),
        ("multi_level", 2, 1),
    ],
)
def test_shapes(name, patch, factor):
    head = head_of(name, 12, 5, grid=(2, 3), patch=patch, width=8)
    assert ask(head, tokens(grid=(2, 3))).shape == (2, 5, 2 * factor, 3 * factor)


def test_pup_is_the_published_function():
    """conv, norm, ReLU, x2 for each stage, then the 1x1 convolution, in plain channels-first memory."""
    head = pup()
    x = head.norm(tokens()).transpose(1, 2).reshape(2, 12, 3, 3).contiguous()
    for conv, norm in zip(head.convs, head.norms, strict=True):
        x = F.conv2d(x, conv.weight, conv.bias, padding=1)
        groups = x.reshape(2, norm.num_groups, -1)
        normal = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = F.relu(normal.reshape(x.shape) * norm.weight[:, None, None] + norm.bias[:, None, None])
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    expected = F.conv2d(x, head.last.weight, head.last.bias)
    torch.testing.assert_close(head(tokens()), expected, rtol=1e-4, atol=1e-5)


def test_memory_format_changes_neither_values_nor_gradients(monkeypatch):
    last, first = pup(), pup()
    channels_last = {"memory_format": torch.channels_last}
    assert last.grid_tokens(tokens()).is_contiguous(**channels_last) and last(tokens()).is_contiguous(**channels_last)
    assert all(parameter.is_contiguous() for parameter in last.parameters())
    grid_tokens = first.grid_tokens
    monkeypatch.setattr(first, "grid_tokens", lambda x: grid_tokens(x).contiguous())
    torch.testing.assert_close(last(tokens()), first(tokens()), rtol=1e-5, atol=1e-5)
    for head in (last, first):
        head(tokens()).square().mean().backward()
    for a, b in zip(last.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 3), (5, 8)])
def test_the_gradient_of_doubling_without_atomics(size, memory_format):
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(2, 3, 2 * size[0], 2 * size[1], dtype=torch.float64)
    (expected,) = torch.autograd.grad((double(x) * weight).sum(), x)  # torch's own on a CPU
    (found,) = torch.autograd.grad((Doubled.apply(x) * weight).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradgradcheck(Doubled.apply, x)


def test_the_gradient_of_doubling_in_bf16_is_rounded_once():
    weight = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(2, 3, 8, 8).double().requires_grad_()
    (exact,) = torch.autograd.grad((double(x) * weight.double()).sum(), x)
    half = x.detach().bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(Doubled.apply(half), half, weight)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all()


def test_on_an_accelerator_nothing_is_doubled_with_atomics():
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        assert double(x).grad_fn.name() == "DoubledBackward"
        assert double(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_doubling_is_the_same_in_every_run(device, dtype):
    x = torch.randn(2, 64, 28, 28, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, 64, 56, 56, device=device, dtype=dtype)
    found = [torch.autograd.grad(Doubled.apply(x), x, weight)[0] for _ in range(5)]
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("name", list(HEADS))
def test_an_image_does_not_see_the_others_of_its_batch(name):
    head = head_of(name, 12, 5, grid=(3, 3), patch=16, width=8).train()
    alone = torch.cat([ask(head, tokens()[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(ask(head, tokens()), alone, rtol=1e-5, atol=1e-5)
    assert not list(head.buffers())


def test_the_linear_head_puts_a_patch_where_it_was():
    head = LinearHead(12, 2, grid=(3, 3), patch=16, width=8)
    x = tokens(1).requires_grad_()
    head(x)[0, :, 4:8, 8:12].sum().backward()
    touched = x.grad[0].abs().sum(-1).view(3, 3) > 0
    assert touched.nonzero().tolist() == [[1, 2]]
    expected = nn.functional.linear(head.norm(x[0, 5]), head.linear.weight, head.linear.bias).view(2, 4, 4)
    torch.testing.assert_close(head(x)[0, :, 4:8, 8:12], expected)


@pytest.mark.parametrize(("patch", "side"), [(16, 48), (8, 24), (2, 6)])
def test_the_combined_head_is_the_sum_of_its_paths(patch: int, side: int) -> None:
    head = HEADS["pup_linear"](12, 5, grid=(3, 3), patch=patch, width=8)
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
    linear = nn.functional.interpolate(head.linear(x), size=(side, side), mode="bilinear")
    torch.testing.assert_close(head(x), linear + head.pup(x))
    wide, x = head.double(), x.double()
    linear = nn.functional.interpolate(wide.linear(x), size=(side, side), mode="bilinear")
    torch.testing.assert_close(wide(x), linear + wide.pup(x), rtol=1e-12, atol=1e-12)
