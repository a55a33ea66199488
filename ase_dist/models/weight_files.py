"""Files of weights, read by what is in them and never by their suffix: safetensors, torch's zip, torch's older pickle.

Nothing is unpickled but tensors and plain containers, so no file can run code. A folder is its one file of weights, or
the shards that its ``*.index.json`` lists. Everything else that is found under such names (a pointer of Git LFS, a web
page, an archive, weights of another framework) is refused by its own name.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ase_dist.errors import RunError, UserError, did_you_mean, file_error
from ase_dist.files import open_regular, read_text
from ase_dist.hub import Fetched, Place, fetch, fetch_any, files_of

HEAD = 4096  # bytes from which the kind of a file is told
MOST_HEADER = 100 << 20  # bytes of a safetensors header, its own limit
MOST_NESTED = 16  # containers in each other
INDEX = ".index.json"
NAMES = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")  # that one file in a folder may have
CONVERT = "write its state dict by safetensors.torch.save_file(STATE_DICT, 'weights.safetensors')"

COPY, UNPACK = "download or copy it again", "unpack it and name the file of weights in it"
OTHER_FRAMEWORK, OTHER_FILE = "take the PyTorch weights of the same model", "name the file of weights"
# Files without weights for torch, by a pattern of their first bytes: what they are, what to do. The first that fits.
FOREIGN = (
    (rb"$", "an empty file of 0 bytes", COPY),
    (
        rb"version https://git-lfs\.github\.com/spec/",
        "a pointer of Git LFS",
        "fetch it by git lfs pull, or download it",
    ),
    (
        rb"(?i)\s*(<!--.*?-->\s*)?<(!doctype|html|head|\?xml|error)",
        "a web page",
        "download the file itself (on the hub by 'resolve' in its address, not 'blob')",
    ),
    (rb"\x1f\x8b", "a gzip archive", UNPACK),
    (rb"BZh", "a bzip2 archive", UNPACK),
    (rb"\xfd7zXZ\0", "an xz archive", UNPACK),
    (rb"\x28\xb5\x2f\xfd", "a zstandard archive", UNPACK),
    (rb"7z\xbc\xaf'\x1c", "a 7z archive", UNPACK),
    (rb"Rar!", "a rar archive", UNPACK),
    (rb".{257}ustar", "a tar archive", UNPACK),
    (rb"\x89HDF", "an HDF5 file, as Keras and TensorFlow write it", OTHER_FRAMEWORK),
    (rb"\x93NUMPY", "one NumPy array", OTHER_FRAMEWORK),
    (rb"GGUF", "a GGUF file, quantised for language models", OTHER_FRAMEWORK),
    (rb"\x89PNG|\xff\xd8\xff", "a picture", OTHER_FILE),
    (rb"%PDF", "a PDF document", OTHER_FILE),
    (rb"\s*[{\[]", "JSON text, but no index of shards", OTHER_FILE),
    (rb"[\t\n\r\x20-\xff]{9,}$", "text", COPY),
    (rb"(?!PK\x03\x04|\x80)", "neither safetensors nor a file of torch.save", OTHER_FILE),
)
# Marks of a folder that holds something else: what it is, what to do
FOLDERS = (
    ("export.json", "an export of a model of this package", "start from it with model.init_from"),
    ("manifest.json", "a checkpoint of a run", "export the run, and start from the export with model.init_from"),
    ("checkpoints", "a run", "export it, and start from the export with model.init_from"),
    (".metadata", "a sharded checkpoint of torch.distributed", "convert it by python -m "
     "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"),
    ("latest", "a checkpoint of DeepSpeed", "convert it by the zero_to_fp32.py in it"),
)  # fmt: skip


def file_of_weights(path: Path) -> Path:
    """``path``, or of a folder the file of weights in it. UserError where it holds something else, or several."""
    if not path.exists():
        names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"model.pretrained: there is no file {path}{did_you_mean(path.name, names)}; wanted none, hub, scenes, "
            "hf://owner/name or a file of weights"
        )
    if not path.is_dir():
        return path
    for mark, what, then in FOLDERS:
        if (path / mark).exists():
            raise UserError(f"model.pretrained: the folder {path} is {what}, no file of weights; {then}")
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if len(files) == 1:
        return files[0]
    there = f"several: {', '.join(file.name for file in files[:5])}" if files else "none"
    raise UserError(f"model.pretrained: {path} is a folder, wanted one file of weights in it, got {there}; name one")


def fetch_weights(name: str) -> Fetched:
    """Fetch a file of weights, shards with their index, from the hub: the file that ``name`` has, or of a repository or
    folder the one file of weights in it.

    Raises UserError, beginning with the setting, and RunError as ``hub.fetch``.
    """
    try:
        place = Place.read(name)
        fetched = fetch_any(place, ("", *NAMES) if place.path else NAMES)
        if fetched is None:
            there = files_of(place)
            weights = [file for file in there if Path(file).suffix.lower() in SUFFIXES and "/" not in file]
            if len(weights) != 1:
                what = "several files of weights" if weights else "no file of weights"
                listed = weights or files_of(place._replace(path=""))
                raise UserError(
                    f"{place} has {what}, the repository has {', '.join(listed[:6]) or 'no files'}; name one as in "
                    "hf://owner/name/file"
                )
            fetched = fetch_any(place, weights)
            assert fetched is not None
        if fetched.path.name.endswith(INDEX):
            names = {file for _, file in _weight_map(fetched.path)}
            folder = PurePosixPath(fetched.pinned.path).parent
            fetch(fetched.pinned._replace(path=str(folder) if folder.name else ""), sorted(names))
    except UserError as error:
        raise UserError(f"model.pretrained: {error}") from None
    return fetched


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights by name, on the CPU; containers in containers joined by dots.

    {"state_dict": {"norm.weight": ...}, "epoch": 3} gives ``state_dict.norm.weight``; what is no tensor is left out.
    Raises UserError for what is missing, cut short, damaged or of another kind, for objects that only an unsafe
    unpickler would make, and where there is no tensor at all.
    """
    try:
        found = dict(_flat(_read(path)))
    except (OSError, zipfile.BadZipFile, SafetensorError) as error:
        raise _unreadable(path, error) from None
    if not found:
        raise UserError(f"model.pretrained: {path} holds no state dict; wanted tensors by name")
    return found


def plain(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """``weights`` as plain tensors; UserError for one that is sparse, quantised, complex, larger than what is on the
    disk, or not finite.
    """
    files = path.parent.iterdir() if path.name.endswith(INDEX) else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    for name, tensor in weights.items():
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
    return {name: tensor.detach() for name, tensor in weights.items()}


def _read(path: Path) -> Any:
    """What is in a file, by its first bytes."""
    with open_regular(path) as file:
        head, size = file.read(HEAD), path.stat().st_size
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{" or length > MOST_HEADER:  # no safetensors
        if head.startswith(b"{") and (shards := _shards(path)):
            return {name: tensor for shard, names in shards.items() for name, tensor in _shard(shard, names)}
        if found := _foreign(head):
            begins = f" (it begins with {head[:32]!r})" if head else ""
            raise UserError(f"model.pretrained: {path} is {found[0]}{begins}, no weights; {found[1]}")
        if head.startswith(b"PK\x03\x04"):
            _refuse_other_zip(path)
        return _unpickled(path)
    with open_regular(path) as file:
        header = file.read(8 + length)[8:]
    wanted = (
        max((int(end) for end in re.findall(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d+)', header)), default=0)
        + 8
        + length
    )
    if size < wanted:
        raise UserError(
            f"model.pretrained: {path} is cut short: it has {size:,} bytes of {wanted:,}; download or copy it again"
        )
    with safe_open(path, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def what_it_is(path: Path) -> str:
    """``is a pointer of Git LFS, ...``: what a file is that holds no weights, and what to do; empty for any other."""
    with open_regular(path) as file:
        found = _foreign(file.read(HEAD))
    return f"is {found[0]}; {found[1]}" if found else ""


def _foreign(head: bytes) -> tuple[str, str] | None:
    """What a file is whose first bytes are of no kind that may hold weights, and what to do."""
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MOST_HEADER:  # safetensors
        return None
    return next(((what, then) for pattern, what, then in FOREIGN if re.match(pattern, head, re.DOTALL)), None)


def _refuse_other_zip(path: Path) -> None:
    """UserError for a zip archive that torch.save has not written, and for one that is cut short."""
    what, then = "", ""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except OSError:
        raise
    except Exception:  # a damaged directory: BadZipFile, UnicodeDecodeError, NotImplementedError, struct.error
        what, then, names = "a zip archive, as torch.save writes them, that is cut short or damaged", COPY, []
    if any("/code/" in name for name in names):
        what, then = "a program of TorchScript", f"load it with torch.jit.load and {CONVERT}"
    elif names and all(name.endswith(".npy") for name in names):
        what, then = "an archive of NumPy arrays, as JAX's ViTs are", "take timm's: model.pretrained=hub, or its file"
    elif names and not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        what, then = f"a zip archive of {len(names)} files, none of torch.save", UNPACK
    if what:
        raise UserError(f"model.pretrained: {path} is {what}; {then}")


def _unpickled(path: Path) -> Any:
    """What torch.save has written, by torch's unpickler for tensors, plain containers and numbers alone.

    Beyond torch's own list it makes numbers of NumPy and an ``argparse.Namespace``, which training scripts save with
    their weights (MAE, DINO); neither runs any code.
    """
    scalar = np.float64(0).__reduce__()[0]  # under the names of NumPy 1 and 2
    known: list[Any] = [
        argparse.Namespace,
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    ]
    known += [np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?"))]
    try:
        with torch.serialization.safe_globals(known), open_regular(path) as file:  # of a path torch minds the suffix
            return torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises errors of any type for a damaged file
        objects = re.findall(r"(?:GLOBAL|[Cc]lass|type) <?([\w.]+\.[\w.]+)", str(error))
        if isinstance(error, OSError) or not isinstance(error, pickle.UnpicklingError) or not objects:
            raise _unreadable(path, error) from None
    with suppress(Exception):  # all of them: of torch's older files it cannot tell, and the first is known
        objects = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    raise UserError(
        f"model.pretrained: {path} cannot be read as tensors alone: it also holds objects of "
        f"{', '.join(objects[:3])}{f' and {len(objects) - 3} more' if len(objects) > 3 else ''}, which are not "
        "unpickled, since that can run any code; where you trust the file, load it once with "
        f"torch.load(FILE, weights_only=False) and {CONVERT}"
    )


def _weight_map(path: Path) -> list[tuple[str, str]]:
    """The names of tensors in an ``*.index.json`` with their files, which lie in its folder; none if it is no index."""
    try:
        tree = json.loads(read_text(path))
    except (ValueError, RecursionError):  # UserError is a ValueError
        return []
    places = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(places, dict):
        return []
    for file in places.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"model.pretrained: {path} names the shard {file!r:.80}, wanted a file beside it")
    return list(places.items())


def _shards(path: Path) -> dict[Path, list[str]]:
    """The files of an ``*.index.json`` with the names of the tensors in each; empty where it is no such index."""
    shards: dict[Path, list[str]] = {}
    for name, file in _weight_map(path):
        shards.setdefault(path.with_name(file), []).append(name)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(
            f"model.pretrained: {path} lists {len(shards)} shards, of which {len(missing)} are missing, first "
            f"{missing[0]}; download them into the same folder"
        )
    return shards


def _shard(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    found = dict(_flat(_read(path)))
    for name in names:
        if name not in found:
            raise UserError(f"model.pretrained: {path} lacks {name!r:.80}, which its index lists; download it again")
        yield name, found[name]


def _flat(tree: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping) and depth < MOST_NESTED:
        for key, value in tree.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key), depth + 1)


def _unreadable(path: Path, error: Exception) -> UserError | RunError:
    if isinstance(error, OSError):
        return file_error(
            error, f"model.pretrained: {path} cannot be read ({error.strerror or error}); name another file"
        )
    reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    if isinstance(error, pickle.UnpicklingError):  # torch's first line only advises to unpickle unsafely
        reason = "its pickle is none of torch.save"
    return file_error(
        error, f"model.pretrained: {path} cannot be read ({reason:.200}); is it damaged or cut short? copy it again"
    )
