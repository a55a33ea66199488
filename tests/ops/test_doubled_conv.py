"""The convolution of a doubled image by taps: the same function, gradients too, as doubling and then convolving."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ase_dist.ops.doubled_conv import BLOCK, DoubledConv, doubled_conv

pytestmark = pytest.mark.single_gpu


def inputs(*, images=1, grid=(5, 3), channels=(4, 6), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, channels[0], *grid, generator=generator, dtype=dtype)
    weight = torch.randn(channels[1], channels[0], 3, 3, generator=generator, dtype=dtype)
    bias = torch.randn(channels[1], generator=generator, dtype=dtype)
    return tuple(tensor.requires_grad_() for tensor in (x, weight, bias))


def doubled_first(x, weight, bias):
    large = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return F.conv2d(large, weight, bias, padding=1)


def conv(width, **options):
    torch.manual_seed(0)
    return nn.Conv2d(width, width, 3, padding=1, **options)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (5, 3), (BLOCK, BLOCK), (2 * BLOCK + 3, 3 * BLOCK - 1)])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_the_convolution_of_the_doubled_image(grid, images, memory_format):
    given = inputs(images=images, grid=grid)
    results = []
    for function in (DoubledConv.apply, doubled_first):
        y = function(given[0].contiguous(memory_format=memory_format), *given[1:])
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        results.append((y, *torch.autograd.grad(y, given, direction)))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-11)


def sizes_kept(function):
    """How many numbers each tensor has that is kept for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        function()
    return kept


def test_the_wide_convolution_goes_by_taps_and_the_narrow_one_does_not():
    for width, by_taps in ((64, True), (32, False)):
        x = torch.randn(2, width, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
        layer = conv(width)
        y = doubled_conv(x, layer)
        keeps_large = 4 * x.numel() in sizes_kept(lambda x=x, layer=layer: doubled_conv(x, layer))
        assert keeps_large is not by_taps
        torch.testing.assert_close(y, doubled_first(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_other_types_and_autocast_take_the_plain_form():
    x, wide = torch.randn(1, 64, 4, 4), conv(64, dtype=torch.float64)
    assert 4 * x.numel() in sizes_kept(lambda: doubled_conv(x.double(), wide))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert doubled_conv(x, conv(64)).dtype == torch.bfloat16


def test_no_large_image_is_kept_for_the_backward_pass():
    x, layer = torch.randn(1, 64, 8, 8, requires_grad=True), conv(64)
    kept = sizes_kept(lambda: doubled_conv(x, layer))
    assert sorted(kept) == [64, x.numel(), 64 * 64 * 9]  # bias, image, weights


def test_traced_and_fake_tensors_take_the_plain_form():
    """What is traced here may run on another device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = conv(64)
    program = torch.export.export(_Doubled(layer), (torch.randn(1, 64, 4, 4),))
    assert any("conv2d" in str(node.target) for node in program.graph.nodes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert doubled_conv(torch.empty(1, 64, 4, 4), layer).shape == (1, 64, 8, 8)


class _Doubled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return doubled_conv(x, self.layer)


def test_second_derivatives_are_those_of_the_convolution_of_the_doubled_image():
    given = inputs(grid=(3, 2))
    results = []
    for function in (DoubledConv.apply, doubled_first):
        first = torch.autograd.grad(function(*given).pow(3).sum(), given, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        results.append(torch.autograd.grad(penalty, given))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
