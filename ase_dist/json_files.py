"""JSON that this process did not write: what Python's reader lets pass and what breaks later is refused here.

Refused are text that is not UTF-8, a key that stands twice, nesting that would exhaust the stack of whoever walks the
tree, halves of surrogate pairs, which no file or terminal can take, whole numbers of more than 64 bits, and NaN and
infinities, which are no JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from ase_dist.errors import UserError
from ase_dist.files import SMALL, read_bytes

DEEPEST = 64  # lists and objects in each other
LARGEST = 2**64  # whole numbers stay below it


def read_json(path: str | Path, *, max_bytes: int = SMALL, allow_nan: bool = False) -> Any:
    """The tree in a JSON file. Raises UserError, which names the file, where it is none; OSError as ``open``."""
    try:
        return parse_json(read_bytes(path, max_bytes=max_bytes), allow_nan=allow_nan)
    except UserError as error:
        sentence = str(error)
        raise UserError(sentence if str(path) in sentence else f"{path}: {sentence}; put back a whole copy") from None


def read_object(path: str | Path, *, max_bytes: int = SMALL, allow_nan: bool = False) -> dict[str, Any]:
    """As ``read_json``; UserError where the file holds anything else than an object."""
    tree = read_json(path, max_bytes=max_bytes, allow_nan=allow_nan)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {kind_of(tree)}, wanted an object {{...}}")
    return tree


def parse_json(data: bytes | str, *, allow_nan: bool = False) -> Any:
    """The tree of a JSON text; UserError with a clause where it is none.

    ``allow_nan`` lets NaN and infinities pass, which Python's own writer puts into files.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        tree = json.loads(text, object_pairs_hook=_without_double_keys)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise UserError(f"nested more than {DEEPEST} deep") from None
    except ValueError as error:  # json's own, and Python's for a number of thousands of digits
        raise UserError(f"not JSON ({error!s:.120})" if data else "the file is empty") from None
    check_plain(tree, allow_nan=allow_nan)
    return tree


def check_plain(tree: Any, *, allow_nan: bool = False) -> None:
    """Raise UserError with a clause where a tree is too deep to be walked, or has a value that cannot be written."""
    level, depth = [tree], 0
    while level:
        if depth > DEEPEST:
            raise UserError(f"nested more than {DEEPEST} deep")
        following: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                following += value.keys()
                following += value.values()
            elif isinstance(value, list):
                following += value
            elif isinstance(value, float):
                if not allow_nan and not math.isfinite(value):
                    raise UserError(f"the number {value} is not finite")
            elif isinstance(value, int):
                if not -LARGEST < value < LARGEST:
                    raise UserError(f"a whole number of {value.bit_length()} bits, more than 64")
            elif isinstance(value, str) and not value.isascii():
                try:
                    value.encode(errors="surrogateescape")  # which stand for bytes in names of files
                except UnicodeEncodeError:
                    raise UserError(f"text with half a surrogate pair ({value!a:.40})") from None
        level, depth = following, depth + 1


def json_digest(tree: Any) -> str:
    """SHA-256 of a tree's canonical JSON (sorted keys, no spaces), which does not depend on how a file is laid out."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _without_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise UserError(f"the key {twice!r:.80} stands twice in one object")
    return found
