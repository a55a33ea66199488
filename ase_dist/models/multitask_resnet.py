"""The convolutional multi-task models that the paper compares with, behind the interface of ``MultiTaskViT``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ase_dist.config import Settings
from ase_dist.errors import UserError
from ase_dist.models.heads import TaskHead
from ase_dist.models.multitask import ModelOutput, MultiTaskViT, checked_tasks
from ase_dist.models.resnet import STRIDE, build_resnet
from ase_dist.models.seeded import seeded_initialisation
from ase_dist.models.sharing import TRUNKS


class MultiTaskResNet(nn.Module):
    """A ResNet trunk that shares features among tasks as ``model.sharing`` says, and a head per task.

    1. the trunk's features [B, C, H/8, W/8] per task
    2. each task's head on them, read as tokens of 8 x 8 pixels

    ``blocks`` is empty: there are no experts. ``build_resnet_model`` makes one from the settings.
    """

    def __init__(self, trunk: nn.Module, heads: Mapping[str, TaskHead]) -> None:
        super().__init__()
        self.task_names = tuple(heads)
        self.trunk = trunk
        self.blocks = nn.ModuleList()
        self.heads = nn.ModuleDict(heads)

    def forward(self, images_BCHW: Tensor, *, tasks: Sequence[str] | None = None) -> ModelOutput:
        """As ``MultiTaskViT.forward``; the trunk computes all tasks' features, the heads those of ``tasks`` only."""
        names = checked_tasks(tasks, self.task_names)
        dtype = next(self.trunk.parameters()).dtype  # DeepSpeed's bf16 casts weights alone
        features = dict(zip(self.task_names, self.trunk(images_BCHW.to(dtype)), strict=True))
        predictions = {name: self.heads[name](features[name].flatten(2).transpose(1, 2)) for name in names}
        empty = torch.zeros(0, len(names), 0, device=images_BCHW.device)
        return ModelOutput(predictions, empty.sum(), empty.long(), empty)

    def keep_tasks(self, names: Sequence[str]) -> None:
        """Drop the heads of all other tasks, for good; the trunk, which may mix tasks, stays as it is."""
        self.heads = nn.ModuleDict({name: self.heads[name] for name in checked_tasks(names, self.task_names)})


MultiTaskModel = MultiTaskViT | MultiTaskResNet


def build_resnet_model(settings: Settings, heads_for: Callable[[int], Mapping[str, TaskHead]]) -> MultiTaskResNet:
    """The model of ``settings``, with the heads that ``heads_for`` makes for features of a width.

    Raises UserError for settings that only transformers know.
    """
    chosen = settings.model
    check_resnet_settings(settings)
    parts = build_resnet(chosen.backbone, weights=chosen.pretrained, args=chosen.backbone_args, seed=settings.seed)
    heads = heads_for(parts.widths[-1])
    with seeded_initialisation(settings.seed, "sharing"):
        trunk = TRUNKS[chosen.sharing](parts, len(heads))
    return MultiTaskResNet(trunk, heads)


def check_resnet_settings(settings: Settings) -> None:
    """Raise UserError where a setting asks a ResNet for what it has not: experts, LoRA, a frozen backbone."""
    chosen, size = settings.model, settings.data.size
    wanted = {
        "model.moe.enabled": (chosen.moe.enabled, False),
        "model.lora_rank": (chosen.lora_rank, 0),
        "model.tune": (chosen.tune, "full"),
        "model.checkpoint_activations": (chosen.checkpoint_activations, "none"),
        "model.drop_path": (chosen.drop_path, 0.0),
        "model.init_from": (chosen.init_from, None),
    }
    for name, (got, right) in wanted.items():
        if got != right:
            raise UserError(
                f"{name}: got {got} for {chosen.backbone}, wanted {right}: a ResNet is trained whole and has no "
                "experts; the baselines of --baseline set all of this"
            )
    if size % STRIDE:
        raise UserError(f"data.size: got {size}, which {chosen.backbone} at stride {STRIDE} does not divide")
