"""Train one vision transformer for many dense-prediction tasks with LoRA mixture-of-experts layers on DeepSpeed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ase_dist import moved

if TYPE_CHECKING:
    from os import PathLike

    import torch

__version__ = "0.1.0"
moved.install()
__all__ = ["__version__", "load"]


def load(path: str | PathLike[str], *, device: torch.device | str = "cpu") -> Any:
    """The model that ``launch/export.py`` has written: an ``ase_dist.deployment.predictor.Predictor``.

    ``path`` is the folder, or ``hf://owner/name[@revision][/folder]`` on the Hugging Face hub.

    Its ``predict(images)`` takes pictures, arrays or paths; called, it takes normalised tensors and gives raw logits.
    Needs no DeepSpeed. Raises UserError where the export is missing, damaged or of a newer version, RunError where the
    hub cannot be reached.
    """
    # by name, and only now: every module imports this one, so that an import here would be an arrow from each to all
    return import_module("ase_dist.deployment.predictor").load(path, device=device)
