"""Backbone weights: from a local file, from the files shipped with the package, or from timm's hub."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ase_dist.errors import UserError
from ase_dist.files import replacing
from ase_dist.hub import is_hub
from ase_dist.image_size import ImageSize
from ase_dist.models.families import family_of
from ase_dist.models.swin import timm_names
from ase_dist.models.weight_files import fetch_weights, file_of_weights, plain, read_tensors
from ase_dist.models.weight_mismatch import differences, explain
from ase_dist.models.weight_names import Found, find_network, to_timm

LOGGER = logging.getLogger("ase_dist")
FOLDER = Path(__file__).parent / "pretrained"
SHIPPED = "scenes"
CLASSIFIER = ("head.", "head_dist.", "fc_norm.", "attn_pool.", "pre_logits.", "fc.")
BACKBONE = ("stem.", "blocks.", "norm.")
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


def load(vit: Any, source: str, *, name: str) -> None:
    """Copy weights into ``vit``, whose classifier has been removed.

    ``source`` is a file of weights (``weight_files.read_tensors``) of a timm model or of one of the families that
    ``weight_names.to_timm`` and timm's own filter know, or 'scenes': the file shipped for this backbone. The network is
    found among what the file has (``weight_names.find_network``). Position and patch embeddings are resampled by timm,
    a classifier and parts of the pretraining are left out; the log says all of this. Raises UserError by name for
    missing and unexpected tensors and for other shapes; then nothing is copied.

    Without a note in the file (``save_backbone``) its positions are those of a square.
    """
    path, family = _file_of(source, name), family_of(vit)
    assert family is not None, type(vit)
    found = find_network(read_tensors(path), vit.state_dict().keys())
    weights = to_timm(plain(found.weights, path))
    shapes = {key: weights[key].shape for key in ("patch_embed.proj.weight", "pos_embed") if key in weights}
    positions = _positions(weights, vit, path=path, name=name)
    given = {key: tensor for key, tensor in weights.items() if positions is None or key != "pos_embed"}
    try:
        with _one_thread():  # timm resamples patch kernels by a pseudo-inverse, whose bits depend on the threads
            converted = dict(family.convert(given, vit))
    except Exception as error:  # timm resamples what may have any shape
        why = explain(weights, vit.state_dict(), name=name) or _first_line(error)
        raise UserError(f"model.pretrained: {path} does not fit {name}: {why}") from None
    whole = converted if positions is None else {**converted, "pos_embed": positions}
    resampled = [
        f"{key} from {list(shape)} to {list(whole[key].shape)}"
        for key, shape in shapes.items()
        if key in whole and whole[key].shape != shape
    ]
    _copy(whole, vit, path=path, name=name, found=found, stored=weights, resampled=resampled)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _positions(weights: Mapping[str, Tensor], vit: Any, *, path: Path, name: str) -> Tensor | None:
    """The position embedding of ``weights`` resampled to the grid of ``vit``; None where timm's filter does it right.

    It does from a square to a square. Between others it may guess the stored grid from the number of tokens, and take
    14 x 14 for 7 x 28. Files that timm converts first have other names.
    """
    stored, wanted = weights.get("pos_embed"), tuple(vit.patch_embed.grid_size)
    if stored is None or stored.ndim != 3 or getattr(vit, "pos_embed", None) is None:
        return None
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    count = stored.shape[1] - prefix
    side = math.isqrt(max(0, count))
    grid = _stored_grid(path) or ((side, side) if side * side == count else wanted)
    if grid[0] * grid[1] != count:
        why = explain(weights, vit.state_dict(), name=name)
        why = why or (
            f"it has positions of {count} patches, which are neither a square nor {grid[0]} x {grid[1]}; save the "
            "weights with a square input"
        )
        raise UserError(f"model.pretrained: {path} does not fit {name}: {why}")
    if grid[0] == grid[1] and wanted[0] == wanted[1]:
        return None
    resampled: Tensor = resample_abs_pos_embed(stored, list(wanted), list(grid), num_prefix_tokens=prefix)
    return resampled


def _stored_grid(path: Path) -> Grid | None:
    """The grid that ``save_backbone`` has noted in a file."""
    try:
        with safe_open(path, framework="pt") as file:
            found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", (file.metadata() or {}).get(GRID, ""), re.ASCII)
    except (SafetensorError, OSError):  # of another kind
        return None
    return None if found is None else (int(found[1]), int(found[2]))


def patch_grid(size: ImageSize, patch_weight: Tensor) -> Grid:
    """The patches of an image of ``size`` under a patch embedding's weight [D, 3, h, w]."""
    return size.height // patch_weight.shape[-2], size.width // patch_weight.shape[-1]


def load_plain(net: nn.Module, source: str, *, name: str) -> None:
    """As ``load`` for a network that is no ViT: its tensors by timm's own names, none of them converted."""
    path = _file_of(source, name)
    found = find_network(read_tensors(path), net.state_dict().keys())
    weights = plain(found.weights, path)
    _copy(weights, net, path=path, name=name, found=found, stored=weights)


def _file_of(source: str, name: str) -> Path:
    if source == SHIPPED:
        return shipped_file(name)
    return fetch_weights(source).path if is_hub(source) else file_of_weights(Path(source))


def _copy(
    weights: Mapping[str, Tensor],
    net: nn.Module,
    *,
    path: Path,
    name: str,
    found: Found,
    stored: Mapping[str, Tensor],
    resampled: Sequence[str] = (),
) -> None:
    """Copy ``weights`` into ``net`` and log what of the file was not taken as it stands; ``stored`` are as in it."""
    wanted = net.state_dict()
    classifier = [key for key in weights if key.startswith(CLASSIFIER) and key not in wanted]
    state = {key: value for key, value in weights.items() if key not in classifier}
    if odd := differences(state, wanted):
        shard = re.search(r"-(\d+)-of-(\d+)", path.name)
        why = f"it is one of {int(shard[2])} shards; name their folder or their index.json" if shard else ""
        why = why or explain(stored, wanted, name=name)
        why = f": {why} ({differences(state, wanted, listed=1)})" if why else f"; {odd}"
        raise UserError(f"model.pretrained: {path} does not fit {name}{why}")
    net.load_state_dict(state)
    said = [f"took what is under {found.prefix!r}"] if found.prefix else []
    said += [f"not under {', '.join(map(repr, found.copies))}, copies of the same network"] if found.copies else []
    left = [*found.left, *classifier]
    parts = dict.fromkeys(key.partition(".")[0] for key in left)
    said += [f"left out {len(left)} tensors of {', '.join(parts)}"] if left else []
    said += [f"resampled {', '.join(resampled)}"] if resampled else []
    if said:
        LOGGER.info("model.pretrained %s: %s", path, "; ".join(said))


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
    half = {name: tensor.half().contiguous() for name, tensor in timm_names(backbone).items()}
    metadata = {"format": "pt"}
    if not size.is_square:
        rows, columns = patch_grid(size, backbone["patch_embed.proj.weight"])
        metadata[GRID] = f"{rows}x{columns}"
    with replacing(path) as temporary:
        save_file(half, temporary, metadata=metadata)


def _first_line(error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    return f"{reason:.200}"
