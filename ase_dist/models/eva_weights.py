"""Weights for DINOv3 and the other models of timm's ``Eva``: timm's own filter, and what it leaves to be done."""

from __future__ import annotations

import re
from collections.abc import Mapping

from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor

BIAS = re.compile(r"blocks\.\d+\.attn\.[qv]_bias")
SCALE = re.compile(r"(blocks\.\d+\.)ls([12])\.gamma")  # what a TaskBlock calls timm's gamma_1 and gamma_2


def convert(weights: Mapping[str, Tensor], model: Eva) -> dict[str, Tensor]:
    """Tensors under timm's names, or a trained backbone's, with position and patch embeddings of the model's shapes.

    Meta's DINOv3 have biases of q and v, which are all 0 in the distilled models; timm has a model with biases and one
    without for each. Those of 0 are left out for a model without; others stay, and do not fit.
    """
    has_biases = any(BIAS.fullmatch(name) or name.endswith("q_proj.bias") for name, _ in model.named_parameters())
    state = {
        SCALE.sub(r"\1gamma_\2", name): tensor
        for name, tensor in weights.items()
        if has_biases or not BIAS.fullmatch(name) or tensor.any()
    }
    return dict(checkpoint_filter_fn(state, model))
