"""The model of an export, for inference. No DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike

import torch
from torch import Tensor, nn

from ase_dist.config import DataSettings, Settings
from ase_dist.errors import UserError, describe
from ase_dist.models.build import build_model
from ase_dist.models.export_file import CARD, Card, Export, open_export
from ase_dist.models.multitask import ModelOutput
from ase_dist.models.multitask_resnet import MultiTaskModel
from ase_dist.models.names import named_tensors


class ExportedModel(nn.Module):
    """A trained model for inference; ``load`` makes one, in eval mode and without gradients.

    ``tasks`` have their channels and class names; ``image`` is the input that it needs; ``metrics``
    {task: {metric: value}} is what the run's evaluation found, empty where there was none; ``card`` is everything.
    """

    def __init__(self, model: MultiTaskModel, card: Card) -> None:
        super().__init__()
        self.model, self.card = model, card
        self.tasks, self.image = card.tasks, card.image
        self.metrics = {
            task: {name: math.nan if value is None else value for name, value in values.items()}
            for task, values in (card.metrics or {}).items()
        }

    def forward(self, images_B3HW: Tensor, *, tasks: Sequence[str] | None = None) -> ModelOutput:
        """Raw logits for normalised images: ``forward(images).predictions[task]`` [B, C, h, w]; see MultiTaskViT."""
        return self.model(images_B3HW, tasks=tasks)


def load(path: str | PathLike[str], *, device: torch.device | str = "cpu") -> ExportedModel:
    """The model in the folder that ``launch/export.py`` has written, or ``hf://owner/name``, converted to float32.

    Needs neither DeepSpeed nor any other file; of a folder no network. It takes normalised tensors and gives raw
    logits; ``ase_dist.load`` gives one that takes pictures too (``ase_dist.deployment.predictor``). Raises UserError
    where the export is missing, damaged or of a newer version.
    """
    export = open_export(path)
    settings = Settings(data=DataSettings(size=export.card.image.size), model=export.card.model)
    try:
        model = build_model(settings, export.card.tasks, expert_layer="plain")
    except UserError as error:
        raise UserError(f"{export.folder / CARD}: {error}; export again with this version") from None
    except Exception as error:
        if export.card.version > 1:  # its hash is right, so the card is as it was written and this is a bug
            raise
        raise UserError(
            f"{export.folder / CARD}: its model cannot be built ({describe(error)}); export again"
        ) from None
    fill(model, export)
    return ExportedModel(model.requires_grad_(False), export.card).to(device).eval()


def fill(model: MultiTaskModel, export: Export) -> None:
    """Copy every tensor of ``export`` into the model. UserError, and nothing copied, unless names and shapes agree."""
    targets = named_tensors(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    got = export.shapes()
    odd = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    if odd:
        raise UserError(
            f"{export.folder}: {len(odd)} tensors are not those of the model in {CARD}, the first, {odd[0]!r}, is "
            f"{got.get(odd[0], 'missing')} for {wanted.get(odd[0], 'none')}; export again with this version"
        )
    for name, tensor in export.tensors():
        targets[name].copy_(tensor)
