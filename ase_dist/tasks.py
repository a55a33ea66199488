"""The one table of task facts: channels, loss, weight, metric and its direction, palette; and that of the data sets.

Every other module looks a task up here; adding a task of a known kind is a row in this file. Labels have one form per
kind, the same for every data set:

| kind    | label of one image | meaning                                                      |
|---------|--------------------|--------------------------------------------------------------|
| classes | uint8 [H, W]       | class id; 255 is ignored                                     |
| mask    | uint8 [H, W]       | 0 or 1; 255 is ignored                                       |
| edges   | uint8 [H, W]       | 0 or 1; 255 is ignored                                       |
| normals | float32 [3, H, W]  | unit vectors (x right, y down, z as stored); zero is ignored |
| depth   | float32 [1, H, W]  | metres (or disparity, ``inverse_depth``); zero is ignored    |
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Literal

from ase_dist.errors import UserError, describe, did_you_mean

Kind = Literal["classes", "mask", "edges", "normals", "depth"]
Color = tuple[int, int, int]
Delta = Literal["delta_m", "delta_p"]  # how a gain over a reference is averaged; see ``evaluation.delta_m``

IGNORE = 255  # the label value that no loss and no metric counts
EDGE_POSITIVE_WEIGHT = 0.95  # of the edge pixels in the edge loss, ASTMT's; the others have the rest
TOLERANCE = 0.0075  # of boundary matching where a data set has no other: BSDS500's and PASCAL's
NYUD_TOLERANCE = 0.011  # what is published on NYUD-v2 was scored with it (maxDist, Gupta et al., CVPR 2013)
RENAMED_SCORES = {"absrel": "rel"}  # keys of results and descriptions that earlier versions wrote


@dataclass(frozen=True)
class Task:
    """What is known about one task.

    ``channels`` is the width of the head's output, ``loss_weight`` M3ViT's weight of the loss in the sum, ``metric``
    the key in the evaluation's result that stands for the task in tables and in Delta_m. ``palette`` is one RGB colour
    per class, by default the PASCAL VOC colour map; for masks and edges black and white. ``tolerance``, of edges only,
    is how far apart a predicted and a true boundary pixel may match in odsF, as a share of the image diagonal; it
    belongs to the data set, and numbers with another do not compare. ``inverse_depth``: labels of depth are
    disparities, larger where things are nearer, in a unit of the data set's own.
    """

    name: str
    title: str
    kind: Kind
    channels: int
    loss_weight: float
    metric: str
    metric_title: str
    higher_is_better: bool
    class_names: tuple[str, ...] = ()
    palette: tuple[Color, ...] = ()
    tolerance: float | None = None
    inverse_depth: bool = False

    def __post_init__(self) -> None:
        if self.kind == "edges" and self.tolerance is None:
            object.__setattr__(self, "tolerance", TOLERANCE)
        if self.tolerance is not None and (self.kind != "edges" or not 0 < self.tolerance < 1):
            raise UserError(
                f"the tolerance of {self.name}: got {self.tolerance}, wanted a share of the image diagonal such as "
                f"{TOLERANCE}, of edges only"
            )
        if self.inverse_depth and self.kind != "depth":
            raise UserError(f"inverse_depth of {self.name}: it is of the kind {self.kind}, only depth may be inverse")
        if not self.palette:
            is_classes = self.kind == "classes"
            default = tuple(map(voc_color, range(self.channels))) if is_classes else ((0, 0, 0), (255, 255, 255))
            object.__setattr__(self, "palette", default)  # the dataclass is frozen
        colors = self.channels if self.kind == "classes" else 2
        if len(self.palette) != colors:
            raise UserError(f"the palette of {self.name} has {len(self.palette)} colours, wanted {colors}")
        if not all(0 <= channel <= 255 for color in self.palette for channel in color):
            raise UserError(f"the palette of {self.name} has channels that are not from 0 to 255")


def voc_color(index: int) -> Color:
    """The colour of class ``index`` in the PASCAL VOC colour map (bits of the id spread over R, G and B)."""
    rgb = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            rgb[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return rgb[0], rgb[1], rgb[2]


VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
PART_CLASSES = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")

NYUD_CLASSES = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter",
    "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes", "ceiling", "books",
    "refrigerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person", "night stand",
    "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure", "otherfurniture", "otherprop",
)  # fmt: skip

PASCAL_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("semseg", "Semantic segmentation", "classes", 21, 1.0, "miou", "mIoU %", True, VOC_CLASSES),
        Task("human_parts", "Human parts", "classes", 7, 2.0, "miou", "mIoU %", True, PART_CLASSES),
        Task("saliency", "Saliency", "mask", 1, 5.0, "miou", "mIoU %", True),
        Task("edge", "Edges", "edges", 1, 50.0, "bce", "BCE", False),
        Task("normals", "Surface normals", "normals", 3, 10.0, "mean", "mean angle deg", False),
    )
}

NYUD_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("semseg", "Semantic segmentation", "classes", 40, 1.0, "miou", "mIoU %", True,
             NYUD_CLASSES),
        Task("depth", "Depth", "depth", 1, 1.0, "rmse", "RMSE m", False),
        Task("normals", "Surface normals", "normals", 3, 10.0, "mean", "mean angle deg", False),
        Task("edge", "Edges", "edges", 1, 50.0, "bce", "BCE", False, tolerance=NYUD_TOLERANCE),
    )
}  # fmt: skip


# The benchmarks of MTAN and LibMTL, on which methods of balancing are compared.
NYUV2_13_CLASSES = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table", "television",
    "wall", "window",
)  # fmt: skip
CITYSCAPES_CATEGORIES: Mapping[str, Color] = {  # void is not labelled; the colours of Cityscapes' road, building, ...
    "flat": (128, 64, 128),
    "construction": (70, 70, 70),
    "object": (153, 153, 153),
    "nature": (107, 142, 35),
    "sky": (70, 130, 180),
    "human": (220, 20, 60),
    "vehicle": (0, 0, 142),
}
NYUV2_13_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("semseg", "Semantic segmentation", "classes", 13, 1.0, "miou", "mIoU %", True, NYUV2_13_CLASSES),
        Task("depth", "Depth", "depth", 1, 1.0, "abs_err", "absolute error m", False),
        Task("normals", "Surface normals", "normals", 3, 10.0, "mean", "mean angle deg", False),
    )
}
CITYSCAPES_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "semseg",
            "Semantic segmentation",
            "classes",
            7,
            1.0,
            "miou",
            "mIoU %",
            True,
            tuple(CITYSCAPES_CATEGORIES),
            tuple(CITYSCAPES_CATEGORIES.values()),
        ),
        Task("depth", "Disparity", "depth", 1, 1.0, "abs_err", "absolute error", False, inverse_depth=True),
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Scores


@dataclass(frozen=True)
class Score:
    """How one score is written; ``higher_is_better`` None: neither way."""

    title: str
    unit: str = ""
    higher_is_better: bool | None = None

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


SCORES: Mapping[Kind, Mapping[str, Score]] = {
    "classes": {
        "miou": Score("mIoU", "%", True),
        "accuracy": Score("pixel accuracy", "%", True),
    },
    "mask": {
        "miou": Score("mIoU at the best threshold", "%", True),
        "miou_threshold": Score("threshold of that mIoU"),
        "maxf": Score("maxF (beta^2 = 0.3)", "%", True),
        "maxf_threshold": Score("threshold of that F"),
        "mae": Score("mean absolute error", "", False),
    },
    "edges": {
        "ods_f": Score("odsF", "%", True),
        "ods_precision": Score("precision at odsF", "%", True),
        "ods_recall": Score("recall at odsF", "%", True),
        "ods_threshold": Score("threshold of odsF"),
        "ois_f": Score("oisF", "%", True),
        "bce": Score("weighted BCE", "", False),
        "edge_share": Score("share of edge pixels", "%"),
    },
    "normals": {
        "mean": Score("mean angle", "deg", False),
        "median": Score("median angle", "deg", False),
        "rmse": Score("RMSE", "deg", False),
        "within_11.25": Score("within 11.25 deg", "%", True),
        "within_22.5": Score("within 22.5 deg", "%", True),
        "within_30": Score("within 30 deg", "%", True),
    },
    "depth": {
        "rmse": Score("RMSE", "m", False),
        "abs_err": Score("mean absolute error", "m", False),
        "rel": Score("mean relative error", "", False),
        "log10": Score("mean log10 error", "", False),
        "delta1": Score("delta < 1.25", "%", True),
        "delta2": Score("delta < 1.25^2", "%", True),
        "delta3": Score("delta < 1.25^3", "%", True),
    },
}


# What LibMTL's Delta_p averages for a task; of other kinds the one score that stands for it.
LIBMTL_SCORES: Mapping[Kind, tuple[str, ...]] = {
    "classes": ("miou", "accuracy"),
    "depth": ("abs_err", "rel"),
    "normals": ("mean", "median", "within_11.25", "within_22.5", "within_30"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


@dataclass(frozen=True)
class DataSet:
    """A value of ``data.name``: which tasks have labels, and what reads them.

    ``reader`` is a subclass of ``ase_dist.data.folder.FolderDataset`` or, to be imported when the first image is
    wanted, "module:Class". Images that are generated where they are missing lie in the ``layout`` of another data set.
    ``optional`` tasks have labels too, but are trained only where they are named (``tasks=[..., depth]``). A data set
    of one's own can be such an object in a module: ``data.name=package.module:NAME``.
    """

    tasks: Mapping[str, Task]
    reader: str | type
    layout: str | None = None
    optional: Mapping[str, Task] = field(default_factory=dict)

    @property
    def table(self) -> dict[str, Task]:
        """All tasks that can be named, the optional ones last."""
        return {**self.tasks, **self.optional}


DATA_SETS: dict[str, DataSet] = {
    "scenes": DataSet(
        PASCAL_TASKS,
        "ase_dist.scenes.dataset:Scenes",
        layout="pascal_context",
        optional={"depth": NYUD_TASKS["depth"]},
    ),
    "pascal_context": DataSet(PASCAL_TASKS, "ase_dist.data.pascal_context:PascalContext"),
    "nyud": DataSet(NYUD_TASKS, "ase_dist.data.nyud:NYUD"),
    "nyuv2_13": DataSet(NYUV2_13_TASKS, "ase_dist.data.libmtl:NYUv2"),
    "cityscapes": DataSet(CITYSCAPES_TASKS, "ase_dist.data.libmtl:Cityscapes"),
}


def packable() -> tuple[str, ...]:
    """Names of the data sets that can be packed: those that are not generated."""
    return tuple(name for name, data in DATA_SETS.items() if data.layout is None)


def find_task(data_name: str, name: str) -> Task | None:
    """The row ``name`` of the data set, of any other where that has none or is not known; None where there is none."""
    first = [DATA_SETS[data_name]] if data_name in DATA_SETS else []
    return next((data.table[name] for data in (*first, *DATA_SETS.values()) if name in data.table), None)


def find_data_set(name: str) -> DataSet:
    """The data set called ``name`` in ``DATA_SETS``, or the one at "package.module:NAME"; UserError for neither."""
    if name in DATA_SETS:
        return DATA_SETS[name]
    if ":" not in name:
        raise UserError(
            f"data.name: got {name!r}, wanted one of {sorted(DATA_SETS)}, a dataset.yaml or package.module:NAME"
            f"{did_you_mean(name, DATA_SETS)}"
        )
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:  # launch/train.py and an installed command do not search the current folder
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"data.name: got {name!r}, wanted package.module:NAME of a module that can be imported from the current "
            f"folder ({describe(error)})"
        ) from None
    if not isinstance(found, DataSet):
        raise UserError(f"data.name: {name!r} is {found!r:.80}, wanted an object of ase_dist.tasks.DataSet")
    return found


def select_tasks(
    data: str | DataSet, names: Iterable[str] | None = None, *, data_name: str | None = None
) -> tuple[Task, ...]:
    """The rows of ``names`` (all of the data set's but the optional ones when None), in the order asked for.

    ``data_name`` is what messages call the data set where it is given as an object. Raises UserError for an unknown
    data set, an unknown task or one that is named twice.
    """
    data_set = find_data_set(data) if isinstance(data, str) else data
    table = data_set.table
    called = data_name or (data if isinstance(data, str) else "this data set")
    chosen = list(data_set.tasks) if names is None else list(names)
    for name in chosen:
        if name not in table:
            raise UserError(
                f"tasks: {called} has no task {name!r}, wanted some of {list(table)}{did_you_mean(name, table)}"
            )
    if len(set(chosen)) != len(chosen) or not chosen:
        raise UserError(f"tasks: got {chosen}, wanted at least one task and each at most once")
    return tuple(table[name] for name in chosen)


# ---------------------------------------------------------------------------------------------------------------------
# Several data sets


@dataclass(frozen=True)
class OfferedTasks:
    """The tasks of one of several data sets, and what the user calls some of them (``names``, by the set's own)."""

    title: str
    tasks: tuple[Task, ...]
    names: Mapping[str, str]


def join_tasks(sets: Iterable[OfferedTasks]) -> tuple[dict[str, Task], ...]:
    """For each set, what the run calls its tasks: the run's row by the set's own name.

    1. A task keeps its name, or has the one that ``names`` gives it.
    2. Tasks of one name are one task where ``_meaning`` agrees; the row is that of the first set.
    3. Where it does not agree they are several, each named SET_TASK after the first set that has it.

    Raises UserError for a name in ``names`` that is no task's, for two tasks of a set that would be one, and where a
    name that ``names`` gives is that of another task.
    """
    sets = tuple(sets)
    groups: dict[str, list[tuple[int, Task]]] = {}
    for i, each in enumerate(sets):
        for task, called in zip(each.tasks, _called(each), strict=True):
            groups.setdefault(called, []).append((i, task))
    joined: tuple[dict[str, Task], ...] = tuple({} for _ in sets)
    for called, group in groups.items():
        meanings = list(dict.fromkeys(_meaning(task) for _, task in group))
        given = [sets[i].title for i, task in group if task.name in sets[i].names]
        if len(meanings) > 1 and given:
            titles = " and ".join(dict.fromkeys(sets[i].title for i, _ in group))
            raise UserError(
                f"data.sets: {titles} would both call a task {called!r}, but they are not the same ({_odd(meanings)}); "
                f"give {given[0]}'s another name with as:"
            )
        for meaning in meanings:
            first, row = next((i, task) for i, task in group if _meaning(task) == meaning)
            if len(meanings) > 1:
                row = replace(row, name=f"{sets[first].title}_{called}", title=f"{row.title} ({sets[first].title})")
                if row.name in groups:
                    raise UserError(
                        f"data.sets: two tasks would be called {row.name!r}; give one another name with as:"
                    )
            elif called != row.name:
                row = replace(row, name=called, title=called.replace("_", " ").capitalize())
            for i, task in group:
                if _meaning(task) == meaning:
                    joined[i][task.name] = row
    return joined


def _called(each: OfferedTasks) -> list[str]:
    """What the user calls the tasks of a set, in their order."""
    own = [task.name for task in each.tasks]
    for name in each.names:
        if name not in own:
            raise UserError(
                f"data.sets: {each.title} has no task {name!r} to call otherwise, wanted some of {own}"
                f"{did_you_mean(name, own)}"
            )
    called = [each.names.get(name, name) for name in own]
    for name in called:
        if called.count(name) > 1:
            raise UserError(f"data.sets: {each.title} has two tasks called {name!r}; give one another name with as:")
    return called


def _meaning(task: Task) -> tuple[object, ...]:
    """What two tasks must have in common to be one: what is predicted, and how its scores are counted."""
    return task.kind, task.channels, task.class_names, task.tolerance, task.inverse_depth


def _odd(meanings: Sequence[tuple[object, ...]]) -> str:
    """What the first two of different meanings differ in."""
    words = ("kind", "channels", "classes", "tolerance of boundaries", "inverse depth")
    return next(
        word if word == "classes" else f"{word} {one} and {other}"
        for word, one, other in zip(words, *meanings[:2], strict=True)
        if one != other
    )
