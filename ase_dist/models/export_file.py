"""The files of an exported model: its tensors and its card.

An export is a folder with ``model.safetensors`` (every tensor of the model, experts one by one under the names that
they have in a checkpoint) and ``export.json`` (the card: tasks, image size, settings, metrics, SHA-256).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ase_dist.config import ModelSettings
from ase_dist.description import DataSetDescription
from ase_dist.errors import UserError, first_problem
from ase_dist.files import sha256_of
from ase_dist.json_files import read_object
from ase_dist.tasks import Task

CARD, WEIGHTS = "export.json", "model.safetensors"
VERSION = 1


class ImageFacts(BaseModel):
    """What the model wants to see: squares of ``size`` pixels, RGB in [0, 1] less ``mean``, over ``std``."""

    model_config = ConfigDict(frozen=True)
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Card(BaseModel):
    """``export.json``. ``metrics`` are those of the run's evaluation at ``step``, None where there was none."""

    model_config = ConfigDict(frozen=True)
    format: Literal["ase_dist export"] = "ase_dist export"
    version: int = VERSION
    tasks: tuple[Task, ...]
    image: ImageFacts
    model: ModelSettings
    dtype: str
    sha256: str
    data: str
    description: DataSetDescription | None = None
    step: int
    metrics: dict[str, dict[str, float | None]] | None
    backbone: dict[str, str]
    versions: dict[str, str]

    def to_json(self) -> str:
        """The text of the file; each task has its palette, which may be changed there."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


@dataclass(frozen=True)
class Export:
    """An export whose card and hash have been checked."""

    folder: Path
    card: Card

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        with self._open() as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, as stored, one at a time."""
        with self._open() as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)

    def _open(self) -> Any:
        try:
            return safe_open(self.folder / WEIGHTS, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{self.folder / WEIGHTS}: not a safetensors file ({error}); export again") from None


def open_export(path: str | PathLike[str]) -> Export:
    """Check the card and the hash of an export. Raises UserError with one sentence that names the file."""
    folder = Path(path).expanduser()
    for name in (CARD, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no export, there is no {name} in it; make one with launch/export.py RUN OUT")
    card_file = folder / CARD
    tree = read_object(card_file)
    version = tree.get("version")
    if isinstance(version, int) and version > VERSION:
        raise UserError(
            f"{card_file}: got format version {version}, this ase_dist reads up to {VERSION}; install a newer"
        )
    try:
        card = Card.model_validate(tree)
    except ValidationError as error:
        problem = first_problem(error)
        raise UserError(f"{card_file}: {problem.where or 'the file'}: {problem.why}; export or copy it again") from None
    if sha256_of(folder / WEIGHTS) != card.sha256:
        raise UserError(f"{folder / WEIGHTS}: damaged, its SHA-256 is not that in {CARD}; export or copy it again")
    return Export(folder, card)
