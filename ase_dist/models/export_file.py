"""The files of an exported model: its tensors and its card.

An export is a folder with ``model.safetensors`` (every tensor of the model, experts one by one under the names that
they have in a checkpoint) and ``export.json`` (the card: tasks, image size, settings, metrics, the SHA-256 of the
tensors' file and that of all of this).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ase_dist.config import LARGEST_INPUT, ModelSettings, SetSettings, SizeSetting
from ase_dist.description import DataSetDescription
from ase_dist.errors import UserError, first_problem
from ase_dist.files import expand_user, is_regular, sha256_of
from ase_dist.hub import Fetched, Place, fetch, is_hub
from ase_dist.image_size import ImageSize
from ase_dist.json_files import json_digest, read_object
from ase_dist.models.weight_files import what_it_is
from ase_dist.tasks import Task

CARD, WEIGHTS = "export.json", "model.safetensors"
VERSION = 3  # the newest; from 2 on with ``card_sha256``, 3 for an image size of two sides
CARD_HASH = "card_sha256"  # of everything else in the card
MOST_CARD_BYTES = 1 << 22
MOST_CHANNELS = 1 << 16
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Positive = Annotated[float, Field(gt=0)]


class ImageFacts(BaseModel):
    """What the model wants to see: images of ``size`` pixels, RGB in [0, 1] less ``mean``, over ``std``."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    size: Annotated[SizeSetting, AfterValidator(lambda size: size.within(16, LARGEST_INPUT))]
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


class Card(BaseModel):
    """``export.json``. ``metrics`` are those of the run's evaluation at ``step``, None where there was none.

    ``labelled_images`` counts the training images that had a label, by task; None in earlier exports.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    format: Literal["ase_dist export"] = "ase_dist export"
    version: int = Field(ge=1)
    tasks: tuple[Task, ...] = Field(min_length=1)
    image: ImageFacts
    model: ModelSettings
    dtype: Literal["fp32", "fp16", "bf16"]
    sha256: str
    data: str
    description: DataSetDescription | None = None
    sets: tuple[SetSettings, ...] = ()
    step: int = Field(ge=0)
    metrics: dict[str, dict[str, float | None]] | None
    backbone: dict[str, str]
    labelled_images: dict[str, int] | None = None
    versions: dict[str, str]

    @field_validator("tasks", mode="before")
    @classmethod
    def _no_endless_palettes(cls, tasks: Any) -> Any:
        """A task makes a colour for each of its channels, so these are checked before there is a task."""
        for task in tasks if isinstance(tasks, list) else ():
            channels = task.get("channels") if isinstance(task, dict) else None
            if isinstance(channels, (int, float)) and not 1 <= channels <= MOST_CHANNELS:
                raise ValueError(f"got a task of {channels} channels")
        return tasks

    @field_validator("tasks")
    @classmethod
    def _tasks_that_can_have_heads(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        for task in tasks:
            if not re.fullmatch(r"\w{1,64}", task.name, re.ASCII):
                raise ValueError(f"got the task {task.name!r:.80}, wanted letters, digits and _")
        if len({task.name for task in tasks}) < len(tasks):
            raise ValueError("got a task twice")
        return tasks

    def to_json(self) -> str:
        """The text of the file; each task has its palette, which may be changed there."""
        tree = self.model_dump(mode="json")
        return json.dumps({**tree, CARD_HASH: card_digest(tree)}, indent=2) + "\n"


def format_version(size: ImageSize) -> int:
    """The version that a card is written in: the oldest that can say it, so that earlier programs read squares."""
    return 2 if size.is_square else VERSION


def card_digest(tree: Mapping[str, Any]) -> str:
    """SHA-256 of a card's tree, palettes left out: a change of colours changes no prediction."""
    tasks = tree.get("tasks")
    plain = (
        [{key: task[key] for key in task if key != "palette"} for task in tasks] if isinstance(tasks, list) else None
    )
    return json_digest({**tree, "tasks": plain})


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
        """Every tensor with its name, as stored, one at a time. UserError for one of another type than the card's, or
        with a value that is not finite: no export is written so.
        """
        with self._open() as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if tensor.dtype not in (DTYPES[self.card.dtype], torch.int64):  # the second: counts of a BatchNorm
                    raise UserError(
                        f"{self.folder / WEIGHTS}: {name!r} is of {tensor.dtype}, wanted {DTYPES[self.card.dtype]} as "
                        f"{CARD} says; export again"
                    )
                if not tensor.isfinite().all():
                    raise UserError(f"{self.folder / WEIGHTS}: {name!r} is not finite; export an earlier checkpoint")
                yield name, tensor

    def _open(self) -> Any:
        try:
            return safe_open(self.folder / WEIGHTS, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{self.folder / WEIGHTS}: not a safetensors file ({error}); export again") from None


def fetch_export(name: str | PathLike[str], files: Sequence[str] = (CARD, WEIGHTS)) -> Fetched:
    """Fetch an export, or some of its files, from the hub. Raises as ``hub.fetch``."""
    lacking = f"an export has {CARD}; a backbone's weights alone are for model.pretrained"
    return fetch(Place.read(name), files, lacking=lacking)


def open_export(path: str | PathLike[str]) -> Export:
    """Check the card and the hash of an export, a folder or ``hf://owner/name``.

    Raises UserError with one sentence that names the file, and as ``hub.fetch``.
    """
    folder = fetch_export(path).path.parent if is_hub(path) else Path(expand_user(str(path)))
    for name in (CARD, WEIGHTS):
        if not is_regular(folder / name):
            raise UserError(f"{folder}: no export, there is no {name} in it; make one with launch/export.py RUN OUT")
    card_file = folder / CARD
    tree = read_object(card_file, max_bytes=MOST_CARD_BYTES)
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
    own_hash = tree.pop(CARD_HASH, None)
    if own_hash != card_digest(tree) and (own_hash is not None or card.version > 1):
        raise UserError(f"{card_file}: was changed or damaged, its own SHA-256 does not fit; export or copy it again")
    if sha256_of(folder / WEIGHTS) != card.sha256:
        why = what_it_is(folder / WEIGHTS) or f"damaged, its SHA-256 is not that in {CARD}; export or copy it again"
        raise UserError(f"{folder / WEIGHTS}: {why}")
    return Export(folder, card)
