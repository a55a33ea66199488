"""Weights of DINOv3 and the other models of timm's ``Eva``, in timm's names, in Meta's, and in those of a TaskBlock."""

from __future__ import annotations

import re
from collections.abc import Mapping

from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor

from ase_dist.errors import UserError

QKV_BIAS = re.compile(r"blocks\.\d+\.attn\.qkv\.bias")
SCALE = re.compile(r"(blocks\.\d+\.)ls([12])\.gamma")


def convert(weights: Mapping[str, Tensor], model: Eva) -> dict[str, Tensor]:
    """The tensors of a file by timm's names, position and patch embeddings resampled: timm's own filter, and before it

    - Meta's DINOv3 has one bias for q, k and v, of which a mask makes k's 0. timm's filter takes those of q and v where
      its model has them (``..._qkvb``) and else drops them; here one that is not 0 is refused then.
    - The layer scales of a ``TaskBlock`` are called ``ls1.gamma``, which timm reads in Meta's files alone.

    Raises UserError for a bias that ``model`` has no place for.
    """
    state, own = {}, {name for name, _ in model.named_parameters()}
    for name, tensor in weights.items():
        if QKV_BIAS.fullmatch(name) and name not in own and name.replace("qkv.bias", "q_bias") not in own:
            query, _, value = tensor.chunk(3)
            if query.any() or value.any():
                raise UserError(f"{name} is not 0 and this model has none; take the timm model of this name and _qkvb")
            continue  # timm's filter would print that it leaves it out
        state[SCALE.sub(r"\1gamma_\2", name)] = tensor
    return dict(checkpoint_filter_fn(state, model))
