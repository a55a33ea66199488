"""Backbone weights: from a local file, from the files shipped with the package, or from timm's hub."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ase_dist.errors import UserError, file_error
from ase_dist.files import replacing
from ase_dist.image_size import ImageSize

FOLDER = Path(__file__).parent / "pretrained"
SHIPPED = "scenes"
CLASSIFIER = ("head.", "head_dist.", "fc_norm.", "attn_pool.", "pre_logits.", "fc.")
BACKBONE = ("stem.", "blocks.", "norm.")
FORMATS = (".safetensors", ".pth", ".pt")
GRID = "patch_grid"  # metadata of a .safetensors file: rows x columns of its position embedding, where not a square
Grid = tuple[int, int]  # patches, rows first


def from_hub(name: str, options: Mapping[str, Any]) -> nn.Module:
    """timm's model with its own weights; UserError with the way out if they cannot be had."""
    try:
        net: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # timm's download raises the types of three HTTP libraries, and RuntimeError
        raise UserError(
            f"model.pretrained: 'hub' could not give the weights of {name} ({type(error).__name__}: "
            f"{_first_line(error)}); with no way to the hub, set model.pretrained=FILE to a local .safetensors or .pth"
        ) from None
    return net


def load(vit: VisionTransformer, source: str, *, name: str) -> None:
    """Copy weights into ``vit``, whose classifier has been removed.

    ``source`` is a .safetensors or .pth file of a timm model (or of one of the formats timm converts), or 'scenes':
    the file shipped for this backbone. Position and patch embeddings are resampled by timm, a classifier's keys are
    dropped. Raises UserError by name for missing and unexpected keys and for other shapes; then nothing is copied.

    Without a note in the file (``save_backbone``) its positions are those of a square.
    """
    path = shipped_file(name) if source == SHIPPED else Path(source)
    weights = read_weights(path)
    positions = _positions(weights, vit, path=path)
    if positions is not None:
        del weights["pos_embed"]
    try:
        with _one_thread():  # timm resamples patch kernels by a pseudo-inverse, whose bits depend on the threads
            converted = checkpoint_filter_fn(weights, vit, adapt_layer_scale=True)
    except Exception as error:  # timm resamples what may have any shape
        raise UserError(f"model.pretrained: {path} does not fit {name}: {_first_line(error)}") from None
    _copy(converted if positions is None else {**converted, "pos_embed": positions}, vit, path=path, name=name)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _positions(weights: Mapping[str, Tensor], vit: VisionTransformer, *, path: Path) -> Tensor | None:
    """The position embedding of ``weights`` resampled to the grid of ``vit``; None where timm's filter does it right.

    It does from a square to a square. Between others it may guess the stored grid from the number of tokens, and take
    14 x 14 for 7 x 28. Files that timm converts first (a ``mask_token``, other names) are left to it.
    """
    stored, wanted = weights.get("pos_embed"), tuple(vit.patch_embed.grid_size)
    if stored is None or stored.ndim != 3 or "mask_token" in weights:
        return None
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    count = stored.shape[1] - prefix
    grid = _stored_grid(path)
    if grid is None:
        if wanted[0] == wanted[1]:
            return None
        side = math.isqrt(max(0, count))
        grid = (side, side) if side * side == count else wanted
    if grid[0] * grid[1] != count:
        raise UserError(
            f"model.pretrained: {path} has positions of {count} patches, which are neither a square nor {grid[0]} x "
            f"{grid[1]}; save the weights with a square input"
        )
    resampled: Tensor = resample_abs_pos_embed(stored, list(wanted), list(grid), num_prefix_tokens=prefix)
    return resampled


def _stored_grid(path: Path) -> Grid | None:
    """The grid that ``save_backbone`` has noted in a file."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", (file.metadata() or {}).get(GRID, ""), re.ASCII)
    return None if found is None else (int(found[1]), int(found[2]))


def patch_grid(size: ImageSize, patch_weight: Tensor) -> Grid:
    """The patches of an image of ``size`` under a patch embedding's weight [D, 3, h, w]."""
    return size.height // patch_weight.shape[-2], size.width // patch_weight.shape[-1]


def load_plain(net: nn.Module, source: str, *, name: str) -> None:
    """As ``load`` for a network that is no ViT: its tensors by timm's own names, none of them converted."""
    path = shipped_file(name) if source == SHIPPED else Path(source)
    _copy(read_weights(path), net, path=path, name=name)


def _copy(weights: Mapping[str, Tensor], net: nn.Module, *, path: Path, name: str) -> None:
    state = {key: value for key, value in weights.items() if not key.startswith(CLASSIFIER)}
    wanted = net.state_dict()
    problems = {
        "missing": wanted.keys() - state.keys(),
        "unexpected": state.keys() - wanted.keys(),
        "of another shape": {
            f"{key} {list(state[key].shape)} for {list(wanted[key].shape)}"
            for key in state.keys() & wanted.keys()
            if state[key].shape != wanted[key].shape
        },
        "of another type": {
            f"{key} {state[key].dtype} for {wanted[key].dtype}"
            for key in state.keys() & wanted.keys()
            if state[key].is_floating_point() != wanted[key].is_floating_point()
        },
    }
    found = []
    for kind, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            found.append(f"{kind}: {', '.join(sorted(keys)[:4])}{more}")
    if found:
        raise UserError(f"model.pretrained: {path} does not fit {name}; {'; '.join(found)}")
    net.load_state_dict(state)


def shipped_file(name: str) -> Path:
    """The weights that come with the package for backbone ``name``; UserError where there are none."""
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        have = sorted(file.stem for file in FOLDER.glob("*.safetensors")) or ["none"]
        raise UserError(
            f"model.pretrained: no weights are shipped for {name} (shipped: {', '.join(have)}); "
            "set model.pretrained to none, hub or a file"
        )
    return path


def save_backbone(trained: Mapping[str, Tensor], path: Path, *, size: ImageSize) -> None:
    """Write the backbone among a fully tuned model's tensors (named as in a checkpoint) in fp16 under timm's names.

    Heads and task embeddings are left out; ``load`` reads the file. The grid of positions that were trained on images
    of ``size`` is noted where it is no square. Raises UserError where there is no backbone.
    """
    backbone = {name.removeprefix("stem."): tensor for name, tensor in trained.items() if name.startswith(BACKBONE)}
    if not backbone:
        raise UserError("save_backbone: the run trained no backbone; it needs model.tune=full")
    half = {name: tensor.half().contiguous() for name, tensor in backbone.items()}
    metadata = {"format": "pt"}
    if not size.is_square:
        rows, columns = patch_grid(size, backbone["patch_embed.proj.weight"])
        metadata[GRID] = f"{rows}x{columns}"
    with replacing(path) as temporary:
        save_file(half, temporary, metadata=metadata)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file by name; a 'model' or 'state_dict' entry is unwrapped.

    Nothing but tensors and plain containers is unpickled. Raises UserError for a file that is missing, broken, of
    another kind, or without tensors; for a tensor of no plain form (sparse, quantised, complex, or larger than its
    file), and for one that is not finite.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"model.pretrained: got {str(path)!r}, wanted none, hub, scenes or a .safetensors or .pth file")
    if not path.is_file():
        raise UserError(f"model.pretrained: there is no file {path}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises errors of any type for a damaged file
        raise file_error(
            error,
            f"model.pretrained: {path} cannot be read as tensors alone ({_first_line(error)}); "
            "if it is whole, save its state dict as .safetensors",
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    pairs = state.items() if isinstance(state, Mapping) else ()
    if not pairs or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in pairs):
        raise UserError(f"model.pretrained: {path} holds no state dict; wanted tensors by name")
    size = path.stat().st_size
    for name, tensor in pairs:
        wrong = ""
        if (
            tensor.layout is not torch.strided
            or tensor.is_quantized
            or tensor.is_complex()
            or tensor.device.type != "cpu"
        ):
            wrong = f"is {str(tensor.layout).removeprefix('torch.')} of {tensor.dtype} on {tensor.device}"
        elif tensor.nbytes > size:  # a few bytes that are said to be repeated
            wrong = f"has {tensor.nbytes:,} bytes, more than the file's {size:,}"
        elif tensor.is_floating_point() and not tensor.float().isfinite().all():
            wrong = "is not finite"
        if wrong:
            raise UserError(f"model.pretrained: {path}: the tensor {name!r:.80} {wrong}; wanted plain finite numbers")
    return {name: tensor.detach() for name, tensor in pairs}


def _first_line(error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    return f"{reason:.200}"
