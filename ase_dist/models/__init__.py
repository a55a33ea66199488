"""Vision transformers from timm with a stream of tokens per task: backbone, adapters, heads and their sizes."""

from ase_dist.models.build import build_model, fetch_from_hub
from ase_dist.models.multitask import ModelOutput, MultiTaskViT
from ase_dist.models.multitask_resnet import MultiTaskModel
from ase_dist.models.parameters import ParameterTable, parameter_groups, parameter_table
from ase_dist.registries import HEADS

__all__ = [
    "HEADS",
    "ModelOutput",
    "MultiTaskModel",
    "MultiTaskViT",
    "ParameterTable",
    "build_model",
    "fetch_from_hub",
    "parameter_groups",
    "parameter_table",
]
