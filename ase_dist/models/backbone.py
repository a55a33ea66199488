"""A vision transformer of timm by name, built for one image size and taken apart into stem, blocks and norm."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import timm
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ase_dist.errors import UserError
from ase_dist.image_size import ImageSize
from ase_dist.models import pretrained, swin, timm_model
from ase_dist.models.blocks import TASK_BLOCKS, WHY_NOT, TaskBlock
from ase_dist.models.families import FAMILIES, family_of
from ase_dist.models.heads import Level
from ase_dist.models.seeded import seeded_initialisation
from ase_dist.models.timm_model import is_of_timm


class Backbone(NamedTuple):
    """A vision transformer in parts.

    ``stem`` is the timm model without its blocks, final norm and classifier: ``families.embed`` makes tokens
    [B, prefix + patches, stem_width] of images with it, and rotary positions. ``blocks`` have timm's parts, and
    ``norm`` (an identity where the model has none before its pooling) is timm's own; ``block_tokens`` says how many
    tokens, prefix included, leave each block. ``levels`` are what heads can read, every block of a ViT and every stage
    of a Swin, and ``level_blocks`` the numbers, from 1, of the blocks that they leave.
    """

    stem: VisionTransformer | Eva | SwinTransformer | SwinTransformerV2
    blocks: list[TaskBlock]
    norm: nn.Module
    stem_width: int
    block_tokens: tuple[int, ...]
    levels: tuple[Level, ...]
    level_blocks: tuple[int, ...]

    @property
    def width(self) -> int:
        """Of the last tokens."""
        return self.levels[-1].width

    @property
    def prefix(self) -> int:
        """Tokens that stand before those of the patches."""
        return self.levels[-1].prefix

    @property
    def grid(self) -> tuple[int, int]:
        """The last tokens, rows first."""
        return self.levels[-1].grid

    @property
    def patch(self) -> int:
        """Pixels of a side that each of the last tokens stands for."""
        return self.levels[-1].stride


def build_backbone(
    name: str,
    *,
    size: ImageSize | int,
    weights: str = "none",
    args: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    seed: int = 0,
) -> Backbone:
    """Build timm's ``name`` for images of ``size`` with the weights that ``pretrained.load`` knows.

    Position embeddings are resampled by timm, once, here. Raises UserError, naming the setting, for a model of no
    family here or with other blocks than those of ``TASK_BLOCKS`` or no linear patch embedding, for a size that its
    patch does not divide, for unknown ``args`` and for weights that do not fit.
    """
    _check_name(name)
    size = ImageSize.read(size)
    fixed = {"img_size": tuple(size), "drop_path_rate": drop_path, "num_classes": 0}
    with seeded_initialisation(seed, "backbone"):
        vit: Any = timm_model.create(name, args or {}, **fixed)
    _check_structure(name, vit, size)
    if weights == "hub":
        with seeded_initialisation(seed, "backbone"):
            vit = pretrained.from_hub(name, {**(args or {}), **fixed})
    for unused in ("head", "head_dist", "fc_norm", "head_drop"):  # of a classifier: no parameter without a purpose
        if hasattr(vit, unused):
            setattr(vit, unused, nn.Identity())
    vit.attn_pool = None
    if weights not in {"none", "hub"}:
        pretrained.load(vit, weights, name=name)
    patch, grid = int(vit.patch_embed.patch_size[0]), vit.patch_embed.grid_size
    blocks: list[TaskBlock]
    if isinstance(vit, swin.SWINS):
        depths, stages = [len(stage.blocks) for stage in vit.layers], swin.take_blocks(vit)
        ends = list(accumulate(depths))
        levels = [Level(stages[end - 1].width, stages[end - 1].grid, patch << i) for i, end in enumerate(ends)]
        blocks, tokens = [*stages], [block.grid[0] * block.grid[1] for block in stages]
    else:
        blocks = [TASK_BLOCKS[type(block)](block) for block in vit.blocks]
        level = Level(int(vit.embed_dim), (int(grid[0]), int(grid[1])), patch, int(vit.num_prefix_tokens))
        levels, ends = [level] * len(blocks), list(range(1, len(blocks) + 1))
        tokens = [level.prefix + level.grid[0] * level.grid[1]] * len(blocks)
        vit.blocks = nn.Sequential()
    norm, vit.norm = vit.norm, nn.Identity()
    return Backbone(
        stem=vit,
        blocks=blocks,
        norm=norm,
        stem_width=int(vit.patch_embed.proj.out_channels),
        block_tokens=tuple(tokens),
        levels=tuple(levels),
        level_blocks=tuple(ends),
    )


def _check_name(name: str) -> None:
    """UserError, with similar names, unless timm has a ViT ``name``; a user's own model may be any module's."""
    modules = [module for family in FAMILIES for module in family.modules]
    known = timm.is_model(name)
    if known and (timm.models.is_model_in_modules(name, modules) or not is_of_timm(name)):
        return
    names = [model for module in modules for model in timm.list_models(module=module)]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or ["vit_base_patch16_224"]
    problem = "is not a plain vision transformer" if known else "is no model that timm knows"
    raise UserError(f"model.backbone: {name!r} {problem}, wanted a ViT of timm such as {', '.join(near)}")


def _check_structure(name: str, vit: Any, size: ImageSize) -> None:
    """UserError for a model that ``Backbone`` and ``TaskBlock`` do not support, and for a size that does not fit it."""
    if family_of(vit) is None:
        wanted = " or ".join(family.model.__name__ for family in FAMILIES)
        raise UserError(f"model.backbone: {name!r} is a {type(vit).__name__}, wanted timm's {wanted}")
    if type(vit.patch_embed) is not PatchEmbed:
        raise UserError(f"model.backbone: {name!r} has a {type(vit.patch_embed).__name__} stem, wanted plain patches")
    for block in getattr(vit, "blocks", ()):
        if type(block) not in TASK_BLOCKS:
            wanted = ", ".join(known.__name__ for known in TASK_BLOCKS)
            raise UserError(
                f"model.backbone: {name!r} has {type(block).__name__}s, {WHY_NOT.get(type(block), 'unknown here')}; "
                f"wanted one of timm's {wanted}"
            )
    if isinstance(vit, swin.SWINS):
        swin.check_stages(name, vit)
    if not isinstance(getattr(vit, "patch_drop", None), (nn.Identity, type(None))):
        raise UserError("model.backbone_args.patch_drop_rate: every patch needs a prediction, leave it at 0")
    rows, columns = vit.patch_embed.patch_size
    if rows != columns:
        raise UserError(f"model.backbone: {name!r} has patches of {rows}x{columns} pixels, wanted square ones")
    size.require_divisible(rows, what=f"the {rows}-pixel patches of {name}")
