"""The heads on several levels against their publications: transformers' DPT, HRNet's and InvPT's formulas."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ase_dist.models.heads import Level
from ase_dist.registries import HEADS
from tests.models.conftest import head_of

pytestmark = pytest.mark.single_gpu

D, C, W = 16, 5, 8
PYRAMID = [Level(8, (9, 5), 4), Level(12, (5, 3), 8), Level(16, (3, 2), 16), Level(24, (2, 1), 32)]  # of a Swin


def tokens_of(levels, count=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = [(count, level.prefix + level.grid[0] * level.grid[1], level.width) for level in levels]
    return [torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in sizes]


def made(name, levels, **args):
    torch.manual_seed(0)
    head = HEADS[name](levels, C, width=W, **args).double()
    with torch.no_grad():
        for parameter in head.parameters():  # norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def same(head, found, wanted, tokens):
    """Values and gradients, on tokens and weights."""
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    leaves = [*tokens, *head.parameters()]
    got = torch.autograd.grad((found * direction).sum(), leaves, retain_graph=True)
    expected = torch.autograd.grad((wanted * direction).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def images_of(head, tokens):
    """Each level after its norm as an image, channels first."""
    found = []
    for level, norm, x in zip(head.levels, head.norms, tokens, strict=True):
        found.append(norm(x).transpose(1, 2).reshape(len(x), level.width, *level.grid).contiguous())
    return found


def at(image, size):
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False)


LEVELS = [
    pytest.param([Level(D, (4, 8), 16)] * 4, (16, 32), id="vit"),
    pytest.param([Level(D, (3, 5), 14)] * 3, (12, 20), id="odd"),
    pytest.param([Level(D, (3, 5), 8)] * 4, (6, 10), id="patches of 8"),
    pytest.param(PYRAMID, (9, 5), id="pyramid"),
]


def enlarged(image, level, levels, size):
    """Once to the cells of the finest level, without the padding of a pyramid; then doubled until it has the size."""
    fine = min(levels, key=lambda level: level.stride)
    x = at(image, [n * level.stride // fine.stride for n in level.grid])[..., : fine.grid[0], : fine.grid[1]]
    while tuple(x.shape[-2:]) != size:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return x


@pytest.mark.parametrize(("levels", "size"), LEVELS)
def test_hrnet_is_two_convolutions_on_all_levels_side_by_side(levels, size):
    head, tokens = made("hrnet", levels), tokens_of(levels)
    together = torch.cat(
        [enlarged(image, level, levels, size) for image, level in zip(images_of(head, tokens), levels, strict=True)],
        dim=1,
    )
    weight = torch.cat([linear.weight for linear in head.linears], dim=1)[..., None, None]
    x = F.conv2d(together, weight, head.linears[-1].bias)
    wanted = F.conv2d(F.relu(head.norm(x)), head.last.weight, head.last.bias)
    same(head, head(tokens), wanted, tokens)


@pytest.mark.parametrize(("levels", "size"), LEVELS)
def test_multi_level_is_a_linear_map_of_each_and_a_convolution_over_all(levels, size):
    head, tokens = made("multi_level", levels), tokens_of(levels)
    maps = [
        F.conv2d(image, linear.weight[..., None, None], linear.bias)
        for image, linear in zip(images_of(head, tokens), head.linears, strict=True)
    ]
    together = torch.cat(
        [enlarged(image, level, levels, size) for image, level in zip(maps, levels, strict=True)], dim=1
    )
    x = F.conv2d(together, head.fuse.weight, head.fuse.bias, padding=1)
    wanted = F.conv2d(F.relu(head.norm(x)), head.last.weight, head.last.bias)
    same(head, head(tokens), wanted, tokens)


# --- DPT -------------------------------------------------------------------------------------------------------------


def plain_unit(unit, x):
    y = unit.norm1(F.conv2d(F.relu(x), unit.conv1.weight, padding=1))
    return x + unit.norm2(F.conv2d(F.relu(y), unit.conv2.weight, padding=1))


@pytest.mark.parametrize("levels", [[Level(D, (3, 5), 14)] * 4, [Level(D, (2, 3), 8)] * 4, PYRAMID,
                                    [Level(D, (1, 1), 32)] * 4])  # fmt: skip
def test_dpt_on_any_grid_fuses_at_the_size_of_the_next_level(levels):
    head, tokens = made("dpt", levels), tokens_of(levels)
    images = []
    for i, image in enumerate(images_of(head, tokens)):
        stage = head.reassemble[i]
        linear = stage.project
        mapped = F.conv2d(image, linear.weight[..., None, None], linear.bias) if list(linear.parameters()) else image
        images.append(F.conv2d(stage.resample(mapped), head.convs[i].weight, padding=1))
    x = images[3]
    for i in (3, 2, 1, 0):
        if i < 3:
            x = x + plain_unit(head.skips[i], images[i])
        rows, columns = images[i - 1].shape[-2:] if i else (None, None)
        x = at(plain_unit(head.units[i], x), [2 * side for side in x.shape[-2:]])[..., :rows, :columns]
        x = F.conv2d(x, head.projections[i].weight, head.projections[i].bias)
    x = F.relu(head.norm(F.conv2d(x, head.conv.weight, head.conv.bias, padding=1)))
    wanted = F.conv2d(x, head.last.weight, head.last.bias)
    wanted = F.interpolate(wanted, scale_factor=2, mode="bilinear", align_corners=False)
    same(head, head(tokens), wanted, tokens)


def test_a_pyramid_goes_to_dpts_fusion_as_it_is():
    stages = made("dpt", [Level(D << i, (16 >> i, 8 >> i), 4 << i) for i in range(4)]).reassemble
    assert all(not list(stage.parameters()) for stage in stages)


@pytest.mark.parametrize("readout", ["ignore", "add", "project"])
def test_dpt_is_transformers(readout):
    """Its neck and segmentation head with our weights, BatchNorm replaced, and cells enlarged between their centres."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.dpt.modeling_dpt import DPTNeck, DPTSemanticSegmentationHead

    grid = (4, 8)
    levels = [Level(D, grid, 16, prefix=1)] * 4
    head = made("dpt", levels, readout=readout)
    config = transformers.DPTConfig(
        hidden_size=D, num_hidden_layers=4, num_attention_heads=2, neck_hidden_sizes=[D // 8, D // 4, D // 2, D],
        reassemble_factors=[4, 2, 1, 0.5], fusion_hidden_size=W, readout_type=readout, num_labels=C,
        use_batch_norm_in_fusion_residual=True, semantic_classifier_dropout=0.0, is_hybrid=False,
        backbone_out_indices=[0, 1, 2, 3], hidden_act="gelu",
    )  # fmt: skip
    neck, top = DPTNeck(config).double(), DPTSemanticSegmentationHead(config).double()
    own = copy.deepcopy(head)
    for i, layer in enumerate(neck.reassemble_stage.layers):
        linear, stage = own.reassemble[i].project, own.reassemble[i]
        layer.projection = nn.Conv2d(D, linear.out_features, 1).double()
        layer.projection.weight, layer.projection.bias = conv1x1(linear.weight), linear.bias
        layer.resize = stage.resample
        neck.convs[i] = own.convs[i]
        if readout == "project":
            module = neck.reassemble_stage.readout_projects[i][0]
            module.weight = nn.Parameter(
                torch.cat([own.readouts[i].cell.weight, own.readouts[i].readout.weight], dim=1)
            )
            module.bias = own.readouts[i].cell.bias
    for i, layer in enumerate(neck.fusion_stage.layers):
        layer.align_corners, number = False, 3 - i
        layer.projection = own.projections[number]
        for residual, unit in ((layer.residual_layer1, own.skips[number] if i else None),
                               (layer.residual_layer2, own.units[number])):  # fmt: skip
            if unit is not None:
                residual.convolution1, residual.batch_norm1 = unit.conv1, unit.norm1
                residual.convolution2, residual.batch_norm2 = unit.conv2, unit.norm2
    top.head[0], top.head[1], top.head[4] = own.conv, own.norm, own.last
    top.head[5].align_corners = False
    tokens = tokens_of(levels)
    if readout == "ignore":  # the head gets no class token then
        given = [x[:, 1:] for x in tokens]
        states = [torch.cat([x[:, :1], norm(x[:, 1:])], dim=1) for norm, x in zip(own.norms, tokens, strict=True)]
    else:
        given, states = tokens, [norm(x) for norm, x in zip(own.norms, tokens, strict=True)]
    wanted = top(neck(states, *grid))
    found = head(given)
    assert found.shape == (2, C, 64, 128)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    got = torch.autograd.grad((found * direction).sum(), tokens)
    expected = torch.autograd.grad((wanted * direction).sum(), tokens)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def conv1x1(weight):
    return nn.Parameter(weight.detach()[..., None, None])


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpt", "hrnet", "multi_level"])
def test_under_bf16_autocast_it_is_the_same_to_rounding(name):
    head = head_of(name, D, C, grid=(3, 4), patch=14, width=32)
    tokens = [x.detach().requires_grad_() for x in tokens_of([Level(D, (3, 4), 14)] * 4, dtype=torch.float32)]
    wanted = head(tokens)
    exact = torch.autograd.grad(wanted.square().mean(), tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(tokens)
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    for a, b in zip(torch.autograd.grad(found.float().square().mean(), tokens), exact, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.95  # a ReLU near 0 may go the other way
    half = copy.deepcopy(head).bfloat16()
    assert (half([x.detach().bfloat16() for x in tokens]).float() - wanted).norm() < 0.05 * wanted.norm()
