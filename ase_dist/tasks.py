"""The one table of task facts: channels, loss, weight, metric and its direction, palette; and that of the data sets.

Every other module looks a task up here; adding a task of a known kind is a row in this file. Labels have one form per
kind, the same for every data set:

| kind    | label of one image | meaning                                                      |
|---------|--------------------|--------------------------------------------------------------|
| classes | uint8 [H, W]       | class id; 255 is ignored                                     |
| mask    | uint8 [H, W]       | 0 or 1; 255 is ignored                                       |
| edges   | uint8 [H, W]       | 0 or 1; 255 is ignored                                       |
| normals | float32 [3, H, W]  | unit vectors (x right, y down, z as stored); zero is ignored |
| depth   | float32 [1, H, W]  | metres; zero is ignored                                      |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ase_dist.errors import UserError, did_you_mean

Kind = Literal["classes", "mask", "edges", "normals", "depth"]
Color = tuple[int, int, int]

IGNORE = 255  # the label value that no loss and no metric counts
EDGE_POSITIVE_WEIGHT = 0.95  # of the edge pixels in the edge loss, ASTMT's; the others have the rest


@dataclass(frozen=True)
class Task:
    """What is known about one task.

    ``channels`` is the width of the head's output, ``loss_weight`` M3ViT's weight of the loss in the sum, ``metric``
    the key in the evaluation's result that stands for the task in tables and in Delta_m.
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

    @property
    def palette(self) -> tuple[Color, ...]:
        """One RGB colour per class (the PASCAL VOC colour map); for masks and edges black and white."""
        if self.kind == "classes":
            return tuple(voc_color(i) for i in range(self.channels))
        return ((0, 0, 0), (255, 255, 255))


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
             tuple(f"class {i + 1}" for i in range(40))),
        Task("depth", "Depth", "depth", 1, 1.0, "rmse", "RMSE m", False),
        Task("normals", "Surface normals", "normals", 3, 10.0, "mean", "mean angle deg", False),
        Task("edge", "Edges", "edges", 1, 50.0, "bce", "BCE", False),
    )
}  # fmt: skip


@dataclass(frozen=True)
class DataSet:
    """A value of ``data.name``: which tasks have labels, and what reads them.

    ``reader`` is a subclass of ``ase_dist.data.folder.FolderDataset`` or, to be imported when the first image is
    wanted, "module:Class". Images that are generated where they are missing lie in the ``layout`` of another data set.
    """

    tasks: Mapping[str, Task]
    reader: str | type
    layout: str | None = None


DATA_SETS: dict[str, DataSet] = {
    "scenes": DataSet(PASCAL_TASKS, "ase_dist.scenes.dataset:Scenes", layout="pascal_context"),
    "pascal_context": DataSet(PASCAL_TASKS, "ase_dist.data.pascal_context:PascalContext"),
    "nyud": DataSet(NYUD_TASKS, "ase_dist.data.nyud:NYUD"),
}


def packable() -> tuple[str, ...]:
    """Names of the data sets that can be packed: those that are not generated."""
    return tuple(name for name, data in DATA_SETS.items() if data.layout is None)


def find_task(data_name: str, name: str) -> Task | None:
    """The row ``name`` of the data set, of any other where that has none or is not known; None where there is none."""
    first = [DATA_SETS[data_name]] if data_name in DATA_SETS else []
    return next((data.tasks[name] for data in (*first, *DATA_SETS.values()) if name in data.tasks), None)


def select_tasks(data_name: str, names: Iterable[str] | None = None) -> tuple[Task, ...]:
    """The rows of ``names`` (all of the data set's when None), in the order asked for.

    Raises UserError for an unknown data set, an unknown task or one that is named twice.
    """
    if data_name not in DATA_SETS:
        raise UserError(
            f"data.name: got {data_name!r}, wanted one of {sorted(DATA_SETS)}{did_you_mean(data_name, DATA_SETS)}"
        )
    table = DATA_SETS[data_name].tasks
    chosen = list(table) if names is None else list(names)
    for name in chosen:
        if name not in table:
            raise UserError(
                f"tasks: {data_name} has no task {name!r}, wanted some of {list(table)}{did_you_mean(name, table)}"
            )
    if len(set(chosen)) != len(chosen) or not chosen:
        raise UserError(f"tasks: got {chosen}, wanted at least one task and each at most once")
    return tuple(table[name] for name in chosen)
