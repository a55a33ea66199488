"""A data set of one's own, described instead of programmed: what a ``dataset.yaml`` says. docs/own_data.md explains it.

The description is a value of the settings (``data.description``), so it travels with a run's config, its checkpoints
and its export. This module says what may stand in it and which tasks follow; ``ase_dist.data.described`` reads files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ase_dist import typed_yaml
from ase_dist.errors import UserError, did_you_mean, file_error, first_problem
from ase_dist.files import expand_user, is_regular, read_text
from ase_dist.tasks import DATA_SETS, IGNORE, RENAMED_SCORES, SCORES, Color, DataSet, Kind, Task, voc_color

FILE_NAME = "dataset.yaml"
DescribedKind = Literal["classes", "parts", "mask", "edges", "normals", "depth"]
UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}  # metres

# Other words for a kind.
KIND_ALIASES = {
    "semseg": "classes",
    "segmentation": "classes",
    "semantic_segmentation": "classes",
    "human_parts": "parts",
    "saliency": "mask",
    "edge": "edges",
    "boundaries": "edges",
    "surface_normals": "normals",
}


@dataclass(frozen=True)
class KindFacts:
    """What follows from a described kind: the kind of task, the head's channels, M3ViT's loss weight, the metric.

    ``keys`` are those of a task's description that such a kind may have in addition to those of every kind.
    """

    kind: Kind
    channels: int | None  # None: one per class
    loss_weight: float
    metric: str
    keys: frozenset[str] = field(default_factory=frozenset)


_IDS = frozenset({"ignore", "id_map", "unlisted"})
_CLASSES = _IDS | {"classes", "rgb_map", "first_id"}
KINDS: Mapping[str, KindFacts] = {
    "classes": KindFacts("classes", None, 1.0, "miou", _CLASSES),
    "parts": KindFacts("classes", None, 2.0, "miou", _CLASSES),
    "mask": KindFacts("mask", 1, 5.0, "miou", _IDS | {"threshold"}),
    "edges": KindFacts("edges", 1, 50.0, "bce", _IDS | {"threshold", "thickness", "tolerance"}),
    "normals": KindFacts("normals", 3, 10.0, "mean"),
    "depth": KindFacts("depth", 1, 1.0, "rmse", frozenset({"unit", "ignore"})),
}
TITLES = {
    "semseg": "Semantic segmentation",
    "human_parts": "Human parts",
    "normals": "Surface normals",
}

# ---------------------------------------------------------------------------------------------------------------------
# Values


def parse_color(value: Any) -> Any:
    """[R, G, B], "#rrggbb" or "R, G, B" as three numbers from 0 to 255. Raises UserError for anything else."""
    wanted = "wanted a colour, [R, G, B] from 0 to 255 or '#rrggbb' in quotation marks"
    if value is None:
        raise UserError(f"got nothing, {wanted} (YAML takes what follows a # without them for a comment)")
    numbers = value
    if isinstance(value, str):
        if re.fullmatch(r"#[0-9a-fA-F]{6}", value.strip()):
            numbers = [int(value.strip()[i : i + 2], 16) for i in (1, 3, 5)]
        else:
            numbers = [int(part) if part.isdecimal() else -1 for part in re.split(r"[\s,]+", value.strip(" ()[]"))]
    is_color = isinstance(numbers, (list, tuple)) and len(numbers) == 3
    if not is_color or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= 255 for n in numbers):
        raise UserError(f"got {value!r}, {wanted}")
    return tuple(numbers)


def _checked_pattern(pattern: str) -> str:
    """A pattern of files below the data folder; UserError for one that leaves it or has no place for the name."""
    pattern = pattern.strip().replace("{name}", "{}")
    rest = re.sub(r"\{\}|\{split\}|\{stem\}", "", pattern)
    if "{" in rest or "}" in rest:
        raise UserError(f"got {pattern!r}, wanted no other braces than {{}}, {{stem}} and {{split}}")
    if "{}" not in pattern and "{stem}" not in pattern:
        raise UserError(
            f"got {pattern!r}, wanted a place for the image's name: write {{}} there, as in labels/{{}}.png"
        )
    return _checked_place(pattern)


def _checked_place(place: str) -> str:
    path = PurePosixPath(place)
    if path.is_absolute() or ".." in path.parts or "\\" in place or not place.strip():
        raise UserError(f"got {place!r}, wanted a path below the data folder, with / between folders")
    return place


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, (str, int)) else value


ColorValue = Annotated[tuple[int, int, int], BeforeValidator(parse_color)]
Pattern = Annotated[str, AfterValidator(_checked_pattern)]
Patterns = Annotated[tuple[Pattern, ...], BeforeValidator(_listed), Field(min_length=1)]
Places = Annotated[
    tuple[Annotated[str, AfterValidator(_checked_place)], ...], BeforeValidator(_listed), Field(min_length=1)
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ClassDescription(_Part):
    """One class: what it is called and how it is drawn."""

    name: str = Field(min_length=1)
    color: ColorValue


class SplitDescription(_Part):
    """Which images are trained on and which are scored.

    An entry is a list of names (``lists/train.txt``), a folder (``images/train``, with all below) or a pattern of
    images with ``*`` (``images/train_*.jpg``). ``val_every`` n takes every n-th image of ``train`` for validation.
    """

    train: Places
    val: Places | None = None
    val_every: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _one_validation_set(self) -> SplitDescription:
        if (self.val is None) == (self.val_every is None):
            raise UserError("wanted either val or val_every: every n-th image of train is for validation")
        return self


class TaskDescription(_Part):
    """The labels of one task; None stands for the kind's default."""

    kind: Annotated[DescribedKind, BeforeValidator(lambda kind: KIND_ALIASES.get(str(kind), kind))]
    files: Patterns
    title: str | None = Field(None, min_length=1)
    loss_weight: float | None = Field(None, ge=0)
    metric: str | None = None
    classes: tuple[ClassDescription, ...] | None = None
    first_id: int = Field(0, ge=0)
    id_map: dict[int, str | int | None] | None = None
    rgb_map: Literal["colors"] | dict[str, str | int | None] | None = None
    ignore: Annotated[tuple[int, ...], BeforeValidator(_listed)] | None = None
    unlisted: Literal["refuse", "ignore"] = "refuse"
    threshold: float | None = None
    thickness: int | None = Field(None, ge=1, le=99)
    tolerance: float | None = Field(None, gt=0, lt=1)
    unit: Literal["m", "cm", "mm"] | Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_numbered_names(cls, values: Any) -> Any:
        """``classes: {7: road, 8: sidewalk}``, names by the ids in the files, as names and an id map."""
        classes = values.get("classes") if isinstance(values, dict) else None
        is_numbered = isinstance(classes, Mapping) and all(
            re.fullmatch(r"-?\d+", str(key)) and isinstance(name, str) and "," not in name and name[:1] != "#"
            for key, name in classes.items()
        )
        if not classes or not is_numbered or "id_map" in values:
            return values
        by_id = {int(key): name for key, name in classes.items()}
        named = {**values, "classes": [by_id[key] for key in sorted(by_id)]}
        if sorted(by_id) != list(range(len(by_id))):
            named["id_map"] = by_id
        return named

    @field_validator("metric", mode="before")
    @classmethod
    def _read_earlier_names(cls, value: Any) -> Any:
        return RENAMED_SCORES.get(value, value) if isinstance(value, str) else value

    @field_validator("classes", mode="before")
    @classmethod
    def _read_classes(cls, value: Any) -> Any:
        """A list of names, a mapping of names to colours, or a list of {name, color}."""
        if isinstance(value, Mapping):
            return [{"name": str(name), "color": color} for name, color in value.items()]
        if isinstance(value, (list, tuple)):
            return [{"name": each, "color": voc_color(i)} if isinstance(each, (str, int)) else each
                    for i, each in enumerate(value)]  # fmt: skip
        return value

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, value: tuple[ClassDescription, ...] | None) -> tuple[ClassDescription, ...] | None:
        names = [each.name for each in value or ()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"got {twice[0]!r} twice, wanted a name for each class")
        if value is not None and not 2 <= len(value) <= IGNORE:
            raise UserError(f"got {len(value)} classes, wanted 2 to {IGNORE}, the background included")
        return value

    @field_validator("rgb_map")
    @classmethod
    def _check_colors(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {",".join(map(str, parse_color(color))): name for color, name in value.items()}
        return value

    @model_validator(mode="after")
    def _check_kind(self) -> TaskDescription:
        facts = KINDS[self.kind]
        special = {key for each in KINDS.values() for key in each.keys}
        for key in sorted(special - facts.keys):
            if getattr(self, key) != type(self).model_fields[key].default:
                fits = [kind for kind, each in KINDS.items() if key in each.keys]
                raise UserError(f"{key}: labels of the kind {self.kind} have none, only {', '.join(fits)} have")
        if "classes" in facts.keys and self.classes is None:
            raise UserError("classes: missing, wanted the names of the classes, as in [background, cat, dog]")
        if self.kind == "depth" and self.unit is None:
            raise UserError(
                "unit: missing, wanted m, cm, mm or the metres that the number 1 in a file stands for, such as 0.0039"
            )
        if self.id_map is not None and self.rgb_map is not None:
            raise UserError("got id_map and rgb_map, wanted one of them: files hold either ids or colours")
        if self.first_id and (self.id_map is not None or self.rgb_map is not None):
            raise UserError("first_id: the map says already what each value means; leave first_id out")
        if self.metric is not None and self.metric not in metrics_of(facts.kind):
            there = list(metrics_of(facts.kind))
            raise UserError(f"metric: got {self.metric!r}, wanted one of {there}{did_you_mean(self.metric, there)}")
        self.targets()  # raises where a map names no class
        return self

    def targets(self) -> dict[int | Color, int | None]:
        """What each stored id, or colour, means: a class id (of masks and edges 0 or 1), or None where it is ignored.

        Without a map classes are stored as themselves, from ``first_id`` on; a mask or edges without a map have none.
        """
        if self.rgb_map == "colors":
            assert self.classes is not None
            colors = [each.color for each in self.classes]
            if len(set(colors)) < len(colors):
                raise UserError("rgb_map: two classes have the same colour, by which files cannot tell them apart")
            return dict(zip(colors, range(len(colors)), strict=True))
        if isinstance(self.rgb_map, dict):
            return {parse_color(color): self._target(name, "rgb_map") for color, name in self.rgb_map.items()}
        ignored: dict[int | Color, int | None] = dict.fromkeys(self.ignored_ids)
        if self.id_map is not None:
            return {**ignored, **{value: self._target(name, "id_map") for value, name in self.id_map.items()}}
        named: dict[int | Color, int | None] = {self.first_id + i: i for i in range(len(self.classes or ()))}
        both = sorted(value for value in self.ignore or () if value in named)
        if both:
            raise UserError(f"ignore: {both[0]} is the id of a class too; set first_id, or give an id_map")
        return {**ignored, **named}

    @property
    def ignored_ids(self) -> tuple[int, ...]:
        """``ignore``, which for classes is 255 by default."""
        if self.ignore is not None:
            return self.ignore
        return (IGNORE,) if KINDS[self.kind].kind == "classes" else ()

    def _target(self, name: str | int | None, where: str) -> int | None:
        names = [each.name for each in self.classes or ()] or ["0", "1"]
        if name is None or (name == "ignore" and "ignore" not in names):
            return None
        if str(name) in names:
            return names.index(str(name))
        if str(name).isdecimal() and int(str(name)) < len(names):
            return int(str(name))
        raise UserError(
            f"{where}: got {name!r}, wanted one of {names}, the number of one, or 'ignore'"
            f"{did_you_mean(str(name), names)}"
        )

    def task(self, name: str) -> Task:
        """The row of the task table."""
        facts = KINDS[self.kind]
        metric = self.metric or facts.metric
        score = SCORES[facts.kind][metric]
        classes = self.classes or ()
        return Task(
            name,
            self.title or TITLES.get(name) or name.replace("_", " ").capitalize(),
            facts.kind,
            facts.channels or len(classes),
            facts.loss_weight if self.loss_weight is None else self.loss_weight,
            metric,
            "BCE" if metric == "bce" else f"{score.title} {score.unit}".strip(),
            bool(score.higher_is_better),
            tuple(each.name for each in classes),
            tuple(each.color for each in classes),
            tolerance=self.tolerance,
        )


def metrics_of(kind: Kind) -> tuple[str, ...]:
    """The scores that may stand for a task: those with a direction that every evaluation computes."""
    return tuple(
        key
        for key, score in SCORES[kind].items()
        if score.higher_is_better is not None and not key.startswith(("ods_", "ois_"))
    )


class DataSetDescription(_Part):
    """The contents of a ``dataset.yaml``.

    ``orientation`` says which way up labels lie: on the pixels as stored, or on the picture as viewers show it, turned
    by its orientation tag; where it is not said, pictures are refused whose tag leaves it open.
    """

    name: str = Field(pattern=r"^\S(.*\S)?$", max_length=80)
    images: Patterns
    splits: SplitDescription
    tasks: dict[str, TaskDescription] = Field(min_length=1)
    orientation: Literal["stored", "upright"] | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if value in DATA_SETS:
            raise UserError(f"got {value!r}, which is another data set's name; choose a name of your own")
        return value

    @field_validator("tasks")
    @classmethod
    def _check_names(cls, value: dict[str, TaskDescription]) -> dict[str, TaskDescription]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise UserError(
                    f"got the task name {name!r}, wanted letters, digits and _ as in semseg; its title may be any text"
                )
        return value

    @property
    def uses_split(self) -> bool:
        """Whether a name begins with the folder that ``{split}`` stands for."""
        return any("{split}" in pattern for pattern in self.images)

    @model_validator(mode="after")
    def _agrees_on_split(self) -> DataSetDescription:
        for name, task in self.tasks.items():
            if any("{split}" in pattern for pattern in task.files) and not self.uses_split:
                raise UserError(f"tasks.{name}.files: {{split}} stands in it but not in images; write it in both")
        return self


# ---------------------------------------------------------------------------------------------------------------------
# The data set, and the file


@dataclass(frozen=True)
class DescribedDataSet(DataSet):
    """The data set of a description."""

    description: DataSetDescription | None = None


def described(description: DataSetDescription) -> DescribedDataSet:
    """The data set that ``description`` makes: its rows of the task table, and what reads its folder."""
    tasks = {name: task.task(name) for name, task in description.tasks.items()}
    return DescribedDataSet(tasks, "ase_dist.data.described:DescribedFolder", description=description)


def find_description(name: str | None, root: str | Path | None) -> Path | None:
    """The file that describes the data set of ``data.name`` and ``data.root``; None where there is none.

    ``name`` may be a YAML file or a folder with a ``dataset.yaml``; else the folder ``root`` may have one. Raises
    UserError for a name that looks like a path to one that is not there, and for a name or a dataset.yaml that is no
    regular file.
    """
    if name is not None and name not in DATA_SETS and not _is_module(name):
        path = Path(expand_user(name or "."))
        if path.suffix.lower() in (".yaml", ".yml"):
            if not is_regular(path):
                raise UserError(f"data.name: {name!r} is not there, wanted a {FILE_NAME} or the name of a data set")
            return path
        if name and is_regular(path / FILE_NAME):
            return path / FILE_NAME
        if name and path.is_dir():
            raise UserError(
                f"data.name: {name!r} is a folder without a {FILE_NAME}; write one, which launch/prepare_data.py "
                "FOLDER --init begins"
            )
    if root not in (None, "") and not (name is not None and _is_module(name)):
        path = Path(expand_user(str(root))) / FILE_NAME
        return path if is_regular(path) else None
    return None


def _is_module(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None


def read_description(path: Path) -> DataSetDescription:
    """The description in a YAML file, named after its folder where it has no name. Raises UserError, one sentence."""
    try:
        text = read_text(path, max_bytes=typed_yaml.MOST_BYTES)
    except OSError as error:
        raise file_error(error, f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        tree = typed_yaml.from_yaml(
            text, lambda key: typed_yaml.annotation_at(DataSetDescription, key.split(".") if key else [])
        )
    except yaml.YAMLError as error:
        raise UserError(
            f"{path}: not plain YAML: {' '.join(str(error).split())}; write patterns and colours in quotation marks"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: got {'nothing' if tree is None else 'no keys'}, wanted images, splits and tasks")
    tree = {"name": path.absolute().parent.name or "data", **tree}
    try:
        return DataSetDescription.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {problem_in(error)}") from None


def problem_in(error: ValidationError) -> str:
    """The first problem of a description as a clause that begins with its key."""
    problem = first_problem(error)
    keys = [key for key in problem.keys if not re.fullmatch(r"constrained-\w+|str|int|float|literal\[.*|dict\[.*", key)]
    where = ".".join(keys)
    if problem.kind == "extra_forbidden":
        section = _model_at(keys[:-1])
        hint = did_you_mean(keys[-1], section.model_fields) if section else ""
        return f"{where}: there is no such key{hint}"
    if problem.kind == "missing":
        return f"{where}: it is missing, wanted {_EXAMPLES.get(keys[-1], 'a value')}"
    if problem.kind == "value_error":
        return f"{where}: {problem.why}" if where else problem.why
    return f"{where}: got {problem.got!r:.80}, {problem.why}"


_EXAMPLES = {
    "images": "the pattern of the pictures, such as images/{}.jpg",
    "splits": "which images are for training, as in {train: lists/train.txt, val: lists/val.txt}",
    "train": "a list, a folder or a pattern, such as lists/train.txt",
    "tasks": "a task at least, as in {depth: {kind: depth, files: 'depth/{}.png', unit: mm}}",
    "kind": f"one of {', '.join(KINDS)}",
    "files": "the pattern of the label files, such as labels/{}.png",
    "color": "a colour, such as [128, 64, 128]",
}


def _model_at(keys: Iterable[str]) -> type[BaseModel] | None:
    found = typed_yaml.annotation_at(DataSetDescription, list(keys))
    return next((kind for kind in typed_yaml.alternatives(found) if hasattr(kind, "model_fields")), None)


def to_yaml(description: DataSetDescription) -> str:
    """A ``dataset.yaml`` that ``read_description`` reads back; defaults are left out."""
    return typed_yaml.to_yaml(description.model_dump(mode="json", exclude_defaults=True))


# ---------------------------------------------------------------------------------------------------------------------
# Resuming

# Keys whose change a resumed run only lists, as ``config.ON_RESUME`` has it: where files lie, how results are called,
# drawn, weighed and judged. What a label means and which images are trained on must stay.
LISTED = re.compile(
    r"data\.description\.(name|images|splits\.val|tasks\.\w+\.(title|files|loss_weight|metric|tolerance|classes\.\d+\.color\b))\b.*"
)


def differences(before: Any, now: Any) -> tuple[dict[str, str], dict[str, str]]:
    """What differs between the description in a checkpoint and this run's: refused, and only listed, by dotted key.

    See ``LISTED``.
    """
    flat_before, flat_now = (_flat(tree or {}, "data.description") for tree in (before, now))
    refused, listed = {}, {}
    for key in [*flat_before, *(key for key in flat_now if key not in flat_before)]:
        old, new = flat_before.get(key), flat_now.get(key)
        if old == new:
            continue
        if LISTED.fullmatch(key):
            listed[key] = f"{key}: {old} -> {new}"
        else:
            refused[key] = f"{key} is {old} there and {new} here"
    return refused, listed


def _flat(tree: Any, prefix: str) -> dict[str, Any]:
    if isinstance(tree, Mapping):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}").items()}
    if isinstance(tree, (list, tuple)) and any(isinstance(each, Mapping) for each in tree):
        return {k: v for i, value in enumerate(tree) for k, v in _flat(value, f"{prefix}.{i}").items()}
    return {prefix: list(tree) if isinstance(tree, tuple) else tree}
