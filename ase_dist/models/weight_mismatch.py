"""Why a file of weights does not fit a vision transformer: what it has, what the model wants, what to set."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import timm
from torch import Tensor

SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1408: "giant", 1536: "giant"}  # timm's
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
LISTED = 4  # names of tensors that a sentence lists


class Facts(NamedTuple):
    """What tells one vision transformer from another, as far as the names and shapes of its tensors say."""

    width: int | None
    depth: int
    patch: int | None
    channels: int | None
    registers: int
    hidden: int | None  # width of the FFN: of a gated one both halves
    parts: frozenset[str]  # which of ``PARTS`` it has

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Facts:
        """Those of a state dict under timm's names."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        inside = [found for name in shapes if (found := BLOCK.fullmatch(name))]
        patches = shapes.get("patch_embed.proj.weight", ())
        norm = next((shape for name, shape in shapes.items() if name.endswith("norm1.weight")), ())
        fc1 = next((shape for name, shape in shapes.items() if name.endswith("mlp.fc1.weight")), ())
        names = {found[2] for found in inside} | {name for name in shapes if not BLOCK.fullmatch(name)}
        names |= {ALIASES[name] for name in names & ALIASES.keys()}
        return cls(
            width=patches[0] if patches else norm[0] if norm else None,
            depth=1 + max((int(found[1]) for found in inside), default=-1),
            patch=patches[-1] if len(patches) == 4 else None,
            channels=patches[1] if len(patches) == 4 else None,
            registers=shapes["reg_token"][1] if len(shapes.get("reg_token", ())) == 3 else 0,
            hidden=fc1[0] if fc1 else None,
            parts=frozenset(part for part in PARTS if part in names),
        )


# Parts that a vision transformer may have or not, by a name of one of their tensors: what they are, and how timm's
# constructor is told to have them and not to (None: only another model has them).
PARTS: Mapping[str, tuple[str, str | None, str | None]] = {
    "ls1.gamma": ("layer scales", "init_values: 1e-5", "init_values: null"),
    "attn.qkv.bias": ("biases of queries, keys and values", "qkv_bias: true", "qkv_bias: false"),
    "attn.q_norm.weight": ("norms of queries and keys", "qk_norm: true", "qk_norm: false"),
    "norm_pre.weight": ("a norm before the blocks", "pre_norm: true", "pre_norm: false"),
    "cls_token": ("a class token", None, "class_token: false, global_pool: avg"),
    "pos_embed": ("learned positions", None, "pos_embed: none"),
    "norm.weight": ("a norm after the blocks", None, "global_pool: avg"),
    "attn.relative_position_bias_table": ("relative positions", None, None),
}

ALIASES = {"gamma_1": "ls1.gamma", "attn.q_bias": "attn.qkv.bias", "attn.q_proj.bias": "attn.qkv.bias"}  # timm's Eva


def explain(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, name: str) -> str:
    """One clause or more on why the tensors ``got`` do not fit the model ``name``, whose own are ``wanted``."""
    if any(".lora_" in key for key in got):
        return "it is of a model with adapters; if it is one of this package's, export it and use model.init_from"
    has, wants = Facts.of(got), Facts.of(wanted)
    if not has.depth and wants.depth:
        return f"it has no blocks.0 and is of another kind of network ({_listed(got, LISTED)}); take weights of {name}"
    differ: list[str] = []
    tries: list[str] = []

    def differs(what: str, one: object, other: object, *, then: str = "") -> None:
        if one is not None and other is not None and one != other:
            differ.append(f"has {what} {one} where the model has {other}")
            tries.extend([then] if then else [])

    of_size = f"set model.backbone to one of that size{_such_as(has)}"
    differs("width", has.width, wants.width, then=of_size)
    differs("depth", has.depth, wants.depth, then=of_size)
    differs("images of", has.channels, wants.channels, then="take weights for RGB images")
    registers = f"set model.backbone to one with {has.registers or 'no'} registers{_such_as(has)}"
    differs("register tokens", has.registers, wants.registers, then=registers)
    if has.width == wants.width and has.hidden != wants.hidden:
        differs(
            "FFNs of", has.hidden, wants.hidden, then="set model.backbone to one with such FFNs (mlp_ratio, SwiGLU)"
        )
    for part in PARTS:
        if (part in has.parts) == (part in wants.parts) or (part == "pos_embed" and has.width != wants.width):
            continue
        what, to_have, to_lack = PARTS[part]
        argument = to_have if part in has.parts else to_lack
        differ.append(f"has {what} where the model has none" if part in has.parts else f"lacks {what}")
        tries.append(
            f"set model.backbone_args={{{argument}}}" if argument else "set model.backbone to the one that it is of"
        )
    if not differ:
        return ""
    if of_size in tries:  # another model has other parts
        tries = [of_size]
    return f"it {', '.join(differ)}; {' and '.join(dict.fromkeys(tries)) or 'take other weights'}"


def differences(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, listed: int = LISTED) -> str:
    """The tensors that are missing, unexpected, of another shape or type, ``listed`` of each by name; '' for none."""

    def both(odd: Callable[[Tensor, Tensor], bool]) -> list[str]:
        return sorted(key for key in got.keys() & wanted.keys() if odd(got[key], wanted[key]))

    shapes = both(lambda one, other: one.shape != other.shape)
    types = both(lambda one, other: one.is_floating_point() != other.is_floating_point())
    found = {
        "missing": wanted.keys() - got.keys(),
        "unexpected": got.keys() - wanted.keys(),
        "of another shape": [f"{key} {list(got[key].shape)} for {list(wanted[key].shape)}" for key in shapes],
        "of another type": [f"{key} {got[key].dtype} for {wanted[key].dtype}" for key in types],
    }
    return "; ".join(f"{kind}: {_listed(names, listed)}" for kind, names in found.items() if names)


def _listed(names: Collection[str], count: int) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(sorted(names)[:count])}{more}"


def _such_as(has: Facts) -> str:
    """timm's models of these facts, as the tail of an advice: those of the same registers and with layer scales first.

    Without one of that width, the arguments of timm's constructor that make such a model.
    """
    size = SIZES.get(has.width or 0)
    if size is None or has.patch is None:
        return f" (model.backbone_args={{embed_dim: {has.width}, depth: {has.depth}, num_heads: ...}})"
    names = [
        name for name in timm.list_models(f"vit_{size}_patch{has.patch}_*") if ("reg" in name) == bool(has.registers)
    ]
    names.sort(key=lambda name: (("dinov2" in name) != ("ls1.gamma" in has.parts), len(name), name))
    return f", such as {names[0]}" if names else ""
