"""An export of a tiny untrained model, and pictures in every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ase_dist.deployment.export import write_export
from ase_dist.deployment.predictor import Predictor, load
from ase_dist.models import build_model
from ase_dist.read_config import build_settings
from ase_dist.tasks import select_tasks
from tests.models.conftest import images, model_for, settings_for, shared_weights, stirred  # noqa: F401

SETTINGS: dict[str, dict[str, Any]] = {
    "data": {"size": 32},
    "model": {
        "backbone": "vit_tiny_patch16_224",
        "backbone_args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
        "head": "linear",
        "moe": {"num_experts": 4, "k": 2, "rank": 2},
    },
}


def make_export(out: Path, *, data: str = "scenes", tasks: list[str] | None = None, **changed: Any) -> Path:
    """An export of a model whose every trained tensor was moved off its start, so that tasks and images differ.

    ``changed`` are settings of the model.
    """
    tree = {"data": {"size": 32, "name": data}, "model": {**SETTINGS["model"], **changed}, "tasks": tasks}
    settings = build_settings(tree)
    chosen = select_tasks(data, settings.tasks)
    model = build_model(settings, chosen, expert_layer="plain")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    write_export(out, model, settings, chosen, dtype="fp32", facts={"step": 7, "metrics": None, "backbone": {}})
    return out


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("export") / "out")


@pytest.fixture(scope="session")
def model(export: Path) -> Predictor:
    return load(export)


def photo(height: int = 40, width: int = 56, *, seed: int = 0) -> np.ndarray:
    """A smooth coloured picture, uint8 [H, W, 3]."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    waves = np.stack([np.sin(9 * x + p) * np.cos(7 * y - p) for p in phase], axis=-1)
    return np.rint(127.5 + 127.5 * waves).astype(np.uint8)
