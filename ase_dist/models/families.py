"""The families of timm's vision transformers that become a backbone: what differs between them is said here alone.

Letters: B images, H W pixels, P tokens (prefix and patches), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from timm.models import swin_transformer, swin_transformer_v2, vision_transformer
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ase_dist.models import eva_weights, mini


class Embedding(NamedTuple):
    """What the blocks get: ``tokens_BPD``, and for each block its rotary positions, None where it has none.

    Rotary positions are timm's sines and cosines side by side, [patches, 2 * head width], or [heads, patches, 2 * head
    width] where each block has its own.
    """

    tokens_BPD: Tensor
    ropes: list[Tensor | None]


class Family(NamedTuple):
    """A class of timm's models, ``modules`` of timm that make them, and what is done differently for them.

    ``embed(stem, images_BCHW, blocks)`` is the model's own forward pass up to the first of so many blocks.
    ``convert(weights, model)`` brings a file's tensors to timm's names and the model's shapes.
    """

    model: type[nn.Module]
    modules: tuple[str, ...]
    embed: Callable[[Any, Tensor, int], Embedding]
    convert: Callable[[Mapping[str, Tensor], Any], Mapping[str, Tensor]]


def _embed_vit(stem: VisionTransformer, images_BCHW: Tensor, blocks: int) -> Embedding:
    return Embedding(stem.forward_features(images_BCHW), [None] * blocks)  # its own blocks and norm have been taken out


def _embed_eva(stem: Eva, images_BCHW: Tensor, blocks: int) -> Embedding:
    tokens_BPD, rope = stem._pos_embed(stem.patch_embed(images_BCHW))
    ropes = list(rope.unbind(0)) if stem.rope_mixed and rope is not None else [rope] * blocks
    return Embedding(stem.norm_pre(tokens_BPD), ropes)


def _embed_swin(stem: SwinTransformer | SwinTransformerV2, images_BCHW: Tensor, blocks: int) -> Embedding:
    return Embedding(stem.patch_embed(images_BCHW).flatten(1, 2), [None] * blocks)


FAMILIES = (
    Family(
        VisionTransformer,
        ("vision_transformer", "deit", mini.__name__.rsplit(".", 1)[-1]),
        _embed_vit,
        partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True),
    ),
    Family(Eva, ("eva",), _embed_eva, eva_weights.convert),
    Family(SwinTransformer, ("swin_transformer",), _embed_swin, swin_transformer.checkpoint_filter_fn),
    Family(SwinTransformerV2, ("swin_transformer_v2",), _embed_swin, swin_transformer_v2.checkpoint_filter_fn),
)


def family_of(model: nn.Module) -> Family | None:
    """The family of a timm model, None where it has none here."""
    return next((family for family in FAMILIES if isinstance(model, family.model)), None)


def embed(stem: nn.Module, images_BCHW: Tensor, *, blocks: int) -> Embedding:
    """What the first of so many ``blocks`` gets of normalised images, by a backbone's ``stem``."""
    family = family_of(stem)
    assert family is not None
    return family.embed(stem, images_BCHW, blocks)
