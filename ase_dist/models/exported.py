"""Reading an exported model: the file of tensors, the card beside it, and the model that both make. No DeepSpeed.

An export is a folder with ``model.safetensors`` (every tensor of the model, experts one by one under the names that
they have in a checkpoint) and ``export.json`` (the card: tasks, image size, settings, metrics, SHA-256).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ase_dist.config import DataSettings, ModelSettings, Settings
from ase_dist.files import sha256_of
from ase_dist.models.build import MultiTaskModel, build_model, moe_core
from ase_dist.models.multitask import ModelOutput
from ase_dist.moe import MoEFFN
from ase_dist.problems import first_problem
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
    step: int
    metrics: dict[str, dict[str, float | None]] | None
    backbone: dict[str, str]
    versions: dict[str, str]

    def to_json(self) -> str:
        """The text of the file; each task with its palette, for readers without this package."""
        tree = self.model_dump(mode="json")
        for facts, task in zip(tree["tasks"], self.tasks, strict=True):
            facts["palette"] = task.palette
        return json.dumps(tree, indent=2) + "\n"


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
            raise ValueError(f"{self.folder / WEIGHTS}: not a safetensors file ({error}); export again") from None


class ExportedModel(nn.Module):
    """A trained model ready for images; ``load`` makes one, in eval mode and without gradients.

    ``tasks`` are the rows of the task table, with channels and class names; ``image`` says what to feed; ``metrics``
    {task: {metric: value}} is what the run's evaluation found, empty where there was none; ``card`` is everything.
    """

    def __init__(self, model: MultiTaskModel, card: Card) -> None:
        super().__init__()
        self.model, self.card = model, card
        self.tasks, self.image = card.tasks, card.image
        self.metrics = {
            task: {name: math.nan if value is None else value for name, value in values.items()}
            for task, values in (card.metrics or {}).items()
        }

    def forward(self, images_B3SS: Tensor, *, tasks: Sequence[str] | None = None) -> ModelOutput:
        """Raw logits for normalised images: ``forward(images).predictions[task]`` [B, C, h, w]; see MultiTaskViT."""
        return self.model(images_B3SS, tasks=tasks)


def load(path: str | PathLike[str], *, device: torch.device | str = "cpu") -> ExportedModel:
    """The model in the folder that ``launch/export.py`` has written, in float32 however it was stored.

    Needs neither DeepSpeed nor a network nor any other file. It takes normalised tensors and gives raw logits;
    ``ase_dist.load`` gives one that takes pictures too (``ase_dist.inference.predictor``). Raises ValueError where the
    export is missing, damaged or of a newer version.
    """
    export = open_export(path)
    settings = Settings(data=DataSettings(size=export.card.image.size), model=export.card.model)
    model = build_model(settings, export.card.tasks, expert_layer="plain")
    fill(model, export)
    return ExportedModel(model.requires_grad_(False), export.card).to(device).eval()


def open_export(path: str | PathLike[str]) -> Export:
    """Check the card and the hash of an export. Raises ValueError with one sentence that names the file."""
    folder = Path(path).expanduser()
    for name in (CARD, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no export, there is no {name} in it; make one with launch/export.py RUN OUT")
    card = _read_card(folder / CARD)
    if sha256_of(folder / WEIGHTS) != card.sha256:
        raise ValueError(f"{folder / WEIGHTS}: damaged, its SHA-256 is not that in {CARD}; export or copy it again")
    return Export(folder, card)


def fill(model: MultiTaskModel, export: Export) -> None:
    """Copy every tensor of ``export`` into the model. ValueError, and nothing copied, unless names and shapes agree."""
    targets = named_tensors(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    got = export.shapes()
    odd = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    if odd:
        raise ValueError(
            f"{export.folder}: {len(odd)} tensors are not those of the model in {CARD}, the first, {odd[0]!r}, is "
            f"{got.get(odd[0], 'missing')} for {wanted.get(odd[0], 'none')}; export again with this version"
        )
    for name, tensor in export.tensors():
        targets[name].copy_(tensor)


def named_tensors(model: MultiTaskModel) -> dict[str, Tensor]:
    """The model's own tensors by global name, detached: what is copied into one changes the model.

    Names are those of the plain model, and the experts stand one by one as in ``blocks.3.mlp.fc1.A.07``. With sharded
    layers the routed experts are those of this rank.
    """
    state: dict[str, Tensor] = {}
    layers: dict[str, Any] = {f"blocks.{i}.mlp": block.mlp for i, block in enumerate(model.blocks) if block.has_moe}
    for name, tensor in model.state_dict().items():
        prefix = ".".join(name.split(".")[:3])
        if prefix not in layers:
            state[name] = tensor
            continue
        local = name.removeprefix(f"{prefix}.")
        core = moe_core(layers[prefix])
        local = local if core is layers[prefix] else local.removeprefix("moe.")
        state |= {f"{prefix}.{part}": row for part, row in _parts(core, local, tensor)}
    return state


def _parts(layer: MoEFFN, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor of a MoE layer, a bank taken apart by expert, its padding left out."""
    bank, _, rest = name.partition(".")
    if bank not in ("routed", "shared"):
        yield name, tensor
        return
    ids = layer.shard.ids[: layer.shard.real] if bank == "routed" else range(layer.shard.routed, layer.num_experts)
    digits = len(str(layer.num_experts - 1))
    for row, expert in enumerate(ids):
        yield f"{rest.replace('_', '.')}.{expert:0{digits}}", tensor[row]


def _read_card(path: Path) -> Card:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); export or copy it again") from None
    version = tree.get("version") if isinstance(tree, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise ValueError(f"{path}: got format version {version}, this ase_dist reads up to {VERSION}; install a newer")
    try:
        return Card.model_validate(tree)
    except ValidationError as error:
        problem = first_problem(error)
        raise ValueError(f"{path}: {problem.where or 'the file'}: {problem.why}; export or copy it again") from None
