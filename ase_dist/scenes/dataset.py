"""The generated scenes as a data set: rendered if they are missing, then read like PASCAL-Context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ase_dist.config import DataSettings
from ase_dist.data.file_check import Patterns
from ase_dist.data.pascal_context import PascalContext
from ase_dist.scenes.layout import DEPTH_FOLDER
from ase_dist.scenes.make import ensure_depth, ensure_scenes
from ase_dist.tasks import Task


class Scenes(PascalContext):
    """Generated scenes with the five labels, in the layout of PASCAL_MT, and with depth where a task wants it."""

    label_files: ClassVar[Mapping[str, tuple[Patterns, ...]]] = {
        **PascalContext.label_files,
        "depth": ((f"{DEPTH_FOLDER}/{{}}.npy",),),
    }
    remedy = "remove the folder, and it is rendered again"

    def __init__(self, root: Path | str | None, split: str, tasks: Sequence[Task], **options: Any) -> None:
        if root is not None and any(task.kind == "depth" for task in tasks):
            ensure_depth(Path(root))
        super().__init__(root, split, tasks, **options)

    @classmethod
    def place(cls, data: DataSettings) -> Path:
        """The folder of the scenes that ``data`` wants, rendered now if it is missing. Raises as ``ensure_scenes``."""
        scenes = data.scenes
        return ensure_scenes(
            data.root, train=scenes.train_images, val=scenes.val_images, size=scenes.size, seed=scenes.seed
        )
