"""What the tests of the models share: tiny settings, a model with its adapters stirred, tracing on fake devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ase_dist.config import Settings
from ase_dist.models import MultiTaskViT, build_model
from ase_dist.models.heads import Head, Level, LevelsHead
from ase_dist.models.levels import reads_levels
from ase_dist.read_config import build_settings
from ase_dist.registries import HEADS
from ase_dist.tasks import select_tasks

TINY_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def head_of(name: str, dim: int, channels: int, *, grid: tuple[int, int], patch: int, width: int, **args: Any) -> Head:
    """A head of the registry; one on several levels for as many as it asks for, all alike, with a class token."""
    torch.manual_seed(0)
    if count := reads_levels(name):
        return HEADS[name]([Level(dim, grid, patch, prefix=1)] * count, channels, width=width, **args)
    return HEADS[name](dim, channels, grid=grid, patch=patch, width=width, **args)


def ask(head: Head, tokens_BPD: Tensor) -> Tensor:
    """What ``head`` says of tokens; of several levels the others are multiples of them."""
    if not isinstance(head, LevelsHead):
        return head(tokens_BPD)
    return head([tokens_BPD * (-1) ** i + i for i in range(len(head.levels))])


@pytest.fixture
def settings_for() -> Callable[..., Settings]:
    """``settings_for(size=..., moe={...}, tasks=[...], **model)``: a ViT of two blocks, width 32, on 32 pixels."""

    def build(
        *,
        size: int | tuple[int, int] = 32,
        tasks: list[str] | None = None,
        moe: dict[str, Any] | None = None,
        seed: int = 0,
        **model: Any,
    ) -> Settings:
        experts = {"num_experts": 4, "k": 2, "num_shared": 1, "rank": 2, **(moe or {})}
        backbone = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY_VIT, "head_width": 8}
        return build_settings(
            {"seed": seed, "tasks": tasks, "data": {"size": size}, "model": {**backbone, **model, "moe": experts}}
        )

    return build


@pytest.fixture
def model_for(settings_for: Callable[..., Settings]) -> Callable[..., MultiTaskViT]:
    """``model_for(**as settings_for)``: the model with plain MoE layers, as built (``layer='deepspeed'``: ASEMoE)."""

    def build(*, layer: str = "plain", **options: Any) -> MultiTaskViT:
        settings = settings_for(**options)
        return build_model(settings, select_tasks(settings.data.name, settings.tasks), expert_layer=layer)

    return build


@pytest.fixture
def stirred() -> Callable[[nn.Module], nn.Module]:
    """``stirred(model)``: the same model with every trained tensor moved off its start, where LoRA's B is zero."""

    def stir(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model

    return stir


@pytest.fixture
def images() -> Callable[..., Tensor]:
    """``images(count, size)``: random images [count, 3, size, size], the same every time."""

    def draw(count: int = 2, size: int = 32) -> Tensor:
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))

    return draw


@pytest.fixture
def gradients() -> Callable[[nn.Module, Tensor], dict[str, Tensor]]:
    """``gradients(model, loss)``: backward, then the gradients by name; cleared afterwards."""

    def take(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    return take


@pytest.fixture
def shared_weights(shared_data: Path) -> Path:
    """The real DINOv2 weights; the test is skipped where they are not."""
    return shared_data / "weights" / "dinov2_vits14_fp16.safetensors"


@pytest.fixture
def fake_device() -> Callable[[nn.Module, Tensor, str], Any]:
    """``with fake_device(model, images, device) as images:`` both are shapes without data on ``device`` inside.

    Every operation then checks devices as a real one would, with no such device here.
    Without a GPU the autograd engine refuses a backward pass on fake 'cuda' tensors (torch 2.14): there 'meta' stands
    for the accelerator, for which autocast, which does not know that name, is taken as off.
    """

    @contextmanager
    def enter(model: nn.Module, images: Tensor, device: str) -> Iterator[Tensor]:
        mode = FakeTensorMode()
        off = mock.patch.multiple(torch, is_autocast_enabled=lambda *_: False, autocast=lambda *_, **__: nullcontext())

        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                fake = mode.from_tensor(parameter.detach())
                with mode:
                    setattr(module, name, nn.Parameter(fake.to(device), requires_grad=parameter.requires_grad))
        images = mode.from_tensor(images)
        with mode, off if device == "meta" else nullcontext():
            yield images.to(device)

    return enter
