"""manifest.json: the files of a checkpoint with sizes and hashes. A folder without one is not a checkpoint.

    {"format": "ase_dist checkpoint", "format_version": 1, "step": 500, "sequence": 3, "world_size": 4,
     "versions": {"torch": "2.14.1", ...}, "files": [{"name": "weights.safetensors", "bytes": 1, "sha256": "..."}, ...],
     "meta": {what the caller gave}, "sha256": "of everything above"}

``sequence`` counts the saves into a folder of checkpoints: the newest is the one that was saved last, also where a run
was resumed from an earlier step. The manifest's own hash is that of its canonical JSON (sorted keys, no spaces).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from ase_dist.errors import ExitCode, RunError, UserError, describe, exit_code_of, first_problem
from ase_dist.files import read_bytes
from ase_dist.json_files import json_digest, parse_json

MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
FORMAT_VERSION = 1

# A file in this folder: no path, no hidden file, no other format than safetensors.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors$", max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Record):
    """One safetensors file of a checkpoint."""

    name: FileName
    bytes: int = Field(ge=0)
    sha256: Sha256


class Manifest(_Record):
    """The contents of manifest.json, without its own hash."""

    format: Literal["ase_dist checkpoint"] = "ase_dist checkpoint"
    format_version: Literal[1] = 1
    step: int = Field(ge=0)
    sequence: int = Field(ge=0)
    world_size: int = Field(ge=1)
    versions: dict[str, str]
    files: list[FileEntry]
    meta: dict[str, JsonValue]

    def to_bytes(self) -> bytes:
        """The file's bytes. Raises UserError where meta holds NaN or an infinity, which JSON does not have."""
        body = self.model_dump()
        return json.dumps({**body, "sha256": json_digest(body)}, indent=1, allow_nan=False).encode() + b"\n"

    @property
    def digest(self) -> str:
        """The manifest's own hash: the same on all ranks that read the same checkpoint."""
        return json_digest(self.model_dump())


def make_manifest(
    *,
    step: int,
    sequence: int,
    world_size: int,
    versions: dict[str, str],
    files: list[FileEntry],
    meta: Mapping[str, Any],
) -> Manifest:
    """A manifest of these parts. Raises UserError, which names the key, where meta is not plain JSON."""
    try:
        manifest = Manifest(
            step=step, sequence=sequence, world_size=world_size, versions=versions, files=files, meta=dict(meta)
        )
        manifest.to_bytes()
    except ValidationError as error:
        raise UserError(f"the checkpoint's {_clause(error)}") from None
    except ValueError as error:
        raise UserError(f"the checkpoint's meta is not plain JSON: {error}") from None
    return manifest


def file_entry(name: str, *, size: int, sha256: str) -> FileEntry:
    """The entry of a file. Raises UserError for a name that is not one plain ``*.safetensors``."""
    try:
        return FileEntry(name=name, bytes=size, sha256=sha256)
    except ValidationError:
        raise UserError(
            f"{name!r} is not a plain file name; wanted letters, digits, '_', '-' and '.' before {SUFFIX}"
        ) from None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder.

    Raises UserError with one clause that begins with the file's name where it is missing or damaged, and RunError of
    exit code 71 where it cannot be read at the moment.
    """
    path = folder / MANIFEST
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{MANIFEST}: missing") from None
    except OSError as error:
        if exit_code_of(error) is ExitCode.IO_ERROR:
            sentence = f"{path}: cannot be read at the moment ({describe(error)})"
            raise RunError(sentence, exit_code=ExitCode.IO_ERROR) from error
        raise UserError(f"{MANIFEST}: cannot be read ({error.strerror})") from None
    try:
        tree = parse_json(data)
    except UserError as error:
        raise UserError(f"{MANIFEST}: {error} ({len(data)} bytes)") from None
    if not isinstance(tree, dict):
        raise UserError(f"{MANIFEST}: holds no JSON object")
    version = tree.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(f"{MANIFEST}: written in format {version}, this version reads up to {FORMAT_VERSION}")
    if tree.pop("sha256", None) != json_digest(tree):
        raise UserError(f"{MANIFEST}: its own SHA-256 does not agree with its contents")
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{MANIFEST}: {_clause(error)}") from None
    if len({entry.name for entry in manifest.files}) != len(manifest.files):
        raise UserError(f"{MANIFEST}: names a file twice")
    return manifest


def _clause(error: ValidationError) -> str:
    problem = first_problem(error)
    return f"{problem.where}: {problem.why} (got {problem.got!r:.80})"
