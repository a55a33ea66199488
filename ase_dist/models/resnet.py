"""ResNets of timm, dilated to stride 8 and taken apart into stem and stages: for the convolutional baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ase_dist.models import pretrained, timm_model
from ase_dist.models.seeded import seeded_initialisation

RESNETS = ("resnet18", "resnet34", "resnet50")
STRIDE = 8  # of the last stage, as in the public multi-task code bases


class ResNetParts(NamedTuple):
    """``stem`` [B, 3, H, W] -> [B, 64, H/4, W/4], then four ``stages`` of ``widths`` channels, the last at H/8, W/8."""

    stem: nn.Sequential
    stages: list[nn.Sequential]
    widths: tuple[int, ...]


class ChannelAffine(nn.Module):
    """y = weight * x + bias per channel: a BatchNorm whose pretrained statistics are folded into it, trainable."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        self.weight = nn.Parameter(scale)
        self.bias = nn.Parameter(norm.bias.detach() - norm.running_mean * scale)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        return x_BCHW * self.weight[:, None, None] + self.bias[:, None, None]


def is_resnet(name: str) -> bool:
    """Whether ``model.backbone`` names one of the ResNets."""
    return name in RESNETS


def build_resnet(name: str, *, weights: str, args: Mapping[str, Any], seed: int) -> ResNetParts:
    """Build timm's ``name`` with the weights that ``model.pretrained`` names ('none', 'hub' or a file).

    No statistic ever crosses images, so that neither the batch nor the number of ranks changes a result: without
    weights BatchNorm becomes GroupNorm, with weights its statistics are folded (``ChannelAffine``). Raises UserError
    for arguments that timm does not take and weights that do not fit.
    """
    fixed = {"output_stride": STRIDE, "num_classes": 0}
    with seeded_initialisation(seed, "backbone"):
        net: Any = timm_model.create(name, args, **fixed)
    if weights == "hub":
        with seeded_initialisation(seed, "backbone"):
            net = pretrained.from_hub(name, {**args, **fixed})
    if weights not in {"none", "hub"}:
        pretrained.load_plain(net, weights, name=name)
    _replace_norms(net, group=weights == "none")
    stages = [getattr(net, f"layer{i}") for i in range(1, 5)]
    widths = tuple(int(info["num_chs"]) for info in net.feature_info[1:])
    return ResNetParts(nn.Sequential(net.conv1, net.bn1, net.act1, net.maxpool), stages, widths)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of up to 32 groups."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _replace_norms(module: nn.Module, *, group: bool) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            if not group:
                setattr(module, name, ChannelAffine(child))
                continue
            new = group_norm(child.num_features)
            with torch.no_grad():  # timm's start of the BatchNorm: zero in the last of each residual branch
                new.weight.copy_(child.weight)
                new.bias.copy_(child.bias)
            setattr(module, name, new)
        else:
            _replace_norms(child, group=group)
