"""The names of tensors in files of weights: under which prefix a network's own stand, and other families' names.

A file may hold them under any words: ``module.`` of DDP, ``backbone.`` of a detector, ``teacher`` and ``student`` of
self-supervised training, ``state_dict`` and ``model_ema`` of a training script, in any order. The prefix is found by
the network's own names, so no list of such words is needed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # of torch, anywhere
# A name of each family whose names are converted: of transformers, of OpenAI's CLIP, AIMv2 and RADIO (by timm)
ANCHORS = frozenset(
    (
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embeddings.weight",
        "visual.class_embedding",
        "preprocessor.patchifier.proj.weight",
        "radio_model.model.patch_generator.embedder.weight",
    )
)
BEST = re.compile(r"(^|[._])(ema|teacher|target_encoder)([._]|$)")  # of several copies what their authors evaluate
WORST = re.compile(r"(^|[._])(student|momentum_encoder|encoder_k|key_encoder)([._]|$)")
NO_WEIGHTS = re.compile(r"(^|[._])(optim|optimizers?|exp_avg|exp_avg_sq|momentum_buffer|grads?|gradients)([._]|$)")
# Parts that are trained beside an encoder and that no dense prediction has: MAE, BEiT, DINO, iBOT, MoCo
PRETRAINING = re.compile(
    r"(decoder\w*|mask_token|mask_embed|dino_head|ibot_head|projector|projection_head|predictor|prototypes|lm_head"
    r"|queue\w*|mim_head|logit_scale|optimizer\w*|scheduler|scaler|epoch|step|global_step|loss\w*)(\.|$)"
)
SAME = 0.9  # share of the best prefix's names from which another one is a copy of the same network


class Found(NamedTuple):
    """A network's tensors under their own names; ``copies`` are other prefixes with the same network under them, and
    ``left`` the names that were left out as no part of it.
    """

    weights: dict[str, Tensor]
    prefix: str
    copies: tuple[str, ...]
    left: tuple[str, ...]


def find_network(weights: Mapping[str, Tensor], wanted: Collection[str]) -> Found:
    """The tensors of the network with the names ``wanted`` among all that a file has.

    Of several copies (student and teacher, weights and their moving average) the teacher's, the moving average and the
    target encoder's are taken, a student's and a momentum encoder's never where there is another.
    """
    weights = {WRAPPERS.sub("", name): tensor for name, tensor in weights.items()}
    counts = _count_prefixes(weights, wanted)
    if max(counts.values(), default=0) < max(1, len(wanted) // 5):
        counts = _count_prefixes(weights, ANCHORS) or Counter({"": 1})
    copies = [prefix for prefix, count in counts.items() if count >= SAME * max(counts.values())]
    prefix = min(copies, key=lambda prefix: (_rank(prefix), -counts[prefix]))
    copies.remove(prefix)
    inside = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    for name in wanted - inside.keys():  # a prefix that only a part of the names has
        if name in weights:
            inside[name] = weights[name]
    within = tuple(copy.removeprefix(prefix) for copy in copies if copy.startswith(prefix))
    left = [
        name
        for name in inside
        if name not in wanted
        and (PRETRAINING.match(name) or NO_WEIGHTS.search(name) or name.startswith(within or "\0"))
    ]
    return Found({name: inside[name] for name in inside if name not in left}, prefix, tuple(copies), tuple(left))


def _count_prefixes(names: Iterable[str], wanted: Collection[str]) -> Counter[str]:
    """How many of ``names`` are one of ``wanted`` after a prefix, which is empty or ends with a dot; by prefix."""
    counts: Counter[str] = Counter()
    modules: dict[str, set[str]] = {}
    for name in names:
        for start in (0, *(found.end() for found in re.finditer(r"\.", name))):
            if (own := name[start:]) in wanted and not NO_WEIGHTS.search(prefix := name[:start]):
                counts[prefix] += 1
                modules.setdefault(prefix, set()).add(own.partition(".")[0])
    # blocks alone under a prefix are a part of another network: layers.0.blocks.1 of a Swin
    is_part = {prefix: own == {"blocks"} for prefix, own in modules.items()}
    return Counter({prefix: count for prefix, count in counts.items() if not is_part[prefix]})


def _rank(prefix: str) -> int:
    return 2 if WORST.search(prefix) else 0 if BEST.search(prefix) else 1


# ---------------------------------------------------------------------------------------------------------------------
# Names of other families: one function each, which gives timm's names, or the same where they are not of the family


def to_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` under timm's names."""
    names = dict(weights)
    for convert in FAMILIES:
        names = convert(names)
    return names


def from_dinov2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's DINOv2: the position of the class token is added to it where there are registers, w12 and w3 are fc1, fc2.

    As timm's ``_convert_dinov2``.
    """
    if "register_tokens" in weights:
        weights = {**weights, "reg_token": weights["register_tokens"]}
        del weights["register_tokens"]
        if "pos_embed" in weights and "cls_token" in weights:
            weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, 0]
            weights["pos_embed"] = weights["pos_embed"][:, 1:]
    renamed = {r"^(blocks\.\d+\.mlp\.)w12\.": r"\1fc1.", r"^(blocks\.\d+\.mlp\.)w3\.": r"\1fc2."}
    is_packed = any(re.match(r"blocks\.\d+\.mlp\.w12\.", name) for name in weights)
    return {_renamed(name, renamed if is_packed else {}): tensor for name, tensor in weights.items()}


DINOV3 = {
    r"^storage_tokens$": "reg_token",
    r"^(blocks\.\d+\.)ls([12])\.gamma$": r"\1gamma_\2",
    r"^(blocks\.\d+\.mlp\.)w1\.": r"\1fc1_g.",
    r"^(blocks\.\d+\.mlp\.)w2\.": r"\1fc1_x.",
    r"^(blocks\.\d+\.mlp\.)w3\.": r"\1fc2.",
}
DINOV3_UNUSED = re.compile(r"(rope_embed|local_cls_norm|projectors|mask_token)(\.|$)|.*\.bias_mask$")


def from_dinov3(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's DINOv3: storage tokens are registers, and q, k and v have one bias, of which a mask makes that of k 0.

    As timm's filter of ``Eva``. Sapiens2, which has storage tokens too, is left to it.
    """
    if "storage_tokens" not in weights or "blocks.0.attn.wq.weight" in weights:
        return weights
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if DINOV3_UNUSED.match(name):
            continue
        if bias := re.fullmatch(r"(blocks\.\d+\.attn\.)qkv\.bias", name):
            found[f"{bias[1]}q_bias"], _, found[f"{bias[1]}v_bias"] = tensor.chunk(3)
        else:
            found[_renamed(name, DINOV3)] = tensor
    return found


TRANSFORMERS = {
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.cls_token$": "cls_token",
    r"^embeddings\.register_tokens$": "register_tokens",
    r"^encoder\.layer\.(\d+)\.": r"blocks.\1.",
    r"^(blocks\.\d+\.)layernorm_before\.": r"\1norm1.",
    r"^(blocks\.\d+\.)layernorm_after\.": r"\1norm2.",
    r"^(blocks\.\d+\.)attention\.output\.dense\.": r"\1attn.proj.",
    r"^(blocks\.\d+\.)intermediate\.dense\.": r"\1mlp.fc1.",
    r"^(blocks\.\d+\.)output\.dense\.": r"\1mlp.fc2.",
    r"^(blocks\.\d+\.)mlp\.weights_in\.": r"\1mlp.fc1.",
    r"^(blocks\.\d+\.)mlp\.weights_out\.": r"\1mlp.fc2.",
    r"^(blocks\.\d+\.)layer_scale(\d)\.lambda1$": r"\1ls\2.gamma",
    r"^layernorm\.": "norm.",
}


def from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """ViT, DeiT and DINOv2 of the library transformers: queries, keys and values apart, other names, a pooler."""
    if "embeddings.patch_embeddings.projection.weight" not in weights or not any(
        name.startswith("encoder.layer.") for name in weights
    ):
        return weights
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if re.match(r"(pooler|classifier|embeddings\.mask_token)(\.|$)", name):
            continue
        if part := re.fullmatch(r"(encoder\.layer\.\d+\.)attention\.attention\.(query|key|value)\.(weight|bias)", name):
            parts = [
                weights.get(f"{part[1]}attention.attention.{which}.{part[3]}") for which in ("query", "key", "value")
            ]
            whole = [tensor for tensor in parts if tensor is not None]
            found[_renamed(f"{part[1]}attn.qkv.{part[3]}", TRANSFORMERS)] = torch.cat(whole)
        else:
            found[_renamed(name, TRANSFORMERS)] = tensor
    return found


TRANSFORMERS_DINOV3 = {
    r"^embeddings\.patch_embeddings\.": "patch_embed.proj.",
    r"^embeddings\.cls_token$": "cls_token",
    r"^embeddings\.register_tokens$": "reg_token",
    r"^(?:model\.)?layer\.(\d+)\.": r"blocks.\1.",
    r"^(blocks\.\d+\.)attention\.o_proj\.": r"\1attn.proj.",
    r"^(blocks\.\d+\.)attention\.([qv])_proj\.bias$": r"\1attn.\2_bias",
    r"^(blocks\.\d+\.)layer_scale(\d)\.lambda1$": r"\1gamma_\2",
    r"^(blocks\.\d+\.mlp\.)gate_proj\.": r"\1fc1_g.",
    r"^(blocks\.\d+\.mlp\.)down_proj\.": r"\1fc2.",
}


def from_transformers_dinov3(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv3 of the library transformers: queries, keys and values apart, other names."""
    if "embeddings.patch_embeddings.weight" not in weights:
        return weights
    is_gated = any(name.endswith(".mlp.gate_proj.weight") for name in weights)
    rules = {**TRANSFORMERS_DINOV3, r"^(blocks\.\d+\.mlp\.)up_proj\.": r"\1fc1_x." if is_gated else r"\1fc1."}
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if re.match(r"(embeddings\.mask_token|rope_embeddings)(\.|$)", name):
            continue
        if part := re.fullmatch(r"(.+\.attention\.)([qkv])_proj\.weight", name):
            parts = [weights.get(f"{part[1]}{which}_proj.weight") for which in "qkv"]
            own = _renamed(part[1], rules).replace(".attention.", ".attn.")
            found[f"{own}qkv.weight"] = torch.cat([tensor for tensor in parts if tensor is not None])
        else:
            found[_renamed(name, rules)] = tensor
    return found


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    for pattern, new in rules.items():
        name = re.sub(pattern, new, name)
    return name


# In this order: transformers' DINOv2 keeps Meta's registers and positions
FAMILIES = (from_transformers, from_transformers_dinov3, from_dinov2, from_dinov3)
