"""The small backbone of the default config, in timm's registry: ``vit_mini_patch8_128``.

timm's ViT-Ti made smaller: width 160, 8 blocks of 5 heads, patch 8, 128 pixels. The hidden width is 3.75 times the
width, so that its 2.44 M parameters are a file of 4.9 MB in half precision, small enough to ship with the package.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from ase_dist import imagenet

default_cfgs = generate_default_cfgs(
    {
        "vit_mini_patch8_128": {
            "input_size": (3, 128, 128),
            "mean": imagenet.MEAN,
            "std": imagenet.STD,
            "num_classes": 1000,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def vit_mini_patch8_128(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """timm's entry point, with its keyword arguments; RuntimeError for ``pretrained``, since no hub has the weights."""
    shape = {"img_size": 128, "patch_size": 8, "embed_dim": 160, "depth": 8, "num_heads": 5, "mlp_ratio": 3.75}
    return build_model_with_cfg(
        VisionTransformer,
        "vit_mini_patch8_128",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**shape, **kwargs},
    )
