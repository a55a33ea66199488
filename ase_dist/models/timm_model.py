"""timm's models by name: what its constructors refuse becomes a sentence about the setting, a bug stays a bug."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import nn

from ase_dist.errors import UserError, did_you_mean

RESERVED_ARGS = {
    "img_size": "data.size",
    "drop_path_rate": "model.drop_path",
    "output_stride": "the heads",
    "num_classes": "the heads",
    "in_chans": "the images, which are RGB",
    "pretrained": "model.pretrained",
    "checkpoint_path": "model.pretrained",
}


def create(name: str, args: Mapping[str, Any], **fixed: Any) -> nn.Module:
    """timm's ``name`` without its weights, built with the user's ``args`` and our ``fixed`` ones.

    Raises UserError for a tag of weights that timm does not know, for args that follow from other settings, and for
    args without which the model can be built. Every other exception is a bug and passes.
    """
    for key in args:
        if key in RESERVED_ARGS:
            raise UserError(f"model.backbone_args.{key}: this follows from {RESERVED_ARGS[key]}, leave it out here")
    architecture, _, tag = name.partition(".")
    if tag:
        try:
            get_pretrained_cfg(name, allow_unregistered=False)
        except RuntimeError:
            tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
            raise UserError(
                f"model.backbone: timm has no weights {tag!r} of {architecture}, wanted the name alone or with one "
                f"of {tags}{did_you_mean(tag, tags)}"
            ) from None
    try:
        model: nn.Module = timm.create_model(name, **args, **fixed)
    except Exception as error:
        if not _is_refusal(error, name, args, fixed):
            raise
        raise UserError(
            f"model.backbone_args: got {dict(args)}, which {name} does not take ({type(error).__name__}: "
            f"{' '.join(str(error).split()) or 'no reason given'}); change them or leave them out"
        ) from error
    return model


def is_of_timm(name: str) -> bool:
    """Whether timm itself brings the model, not a user who has registered it."""
    return str(model_entrypoint(name).__module__).startswith("timm.")


def _is_refusal(error: Exception, name: str, args: Mapping[str, Any], fixed: Mapping[str, Any]) -> bool:
    """Whether ``args`` are at fault: timm's own model can be built without them, or one does not exist at all."""
    if isinstance(error, TypeError) and any(f"unexpected keyword argument '{key}'" in str(error) for key in args):
        return True
    if not args or not is_of_timm(name):
        return False
    try:
        timm.create_model(name, **fixed)
    except Exception:
        return False
    return True
