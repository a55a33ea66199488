"""The generated scenes as a data set: rendered if they are missing, then read like PASCAL-Context."""

from __future__ import annotations

from pathlib import Path

from ase_dist.config import DataSettings
from ase_dist.data.pascal_context import PascalContext
from ase_dist.scenes.make import ensure_scenes


class Scenes(PascalContext):
    """Generated scenes with the five labels, in the layout of PASCAL_MT."""

    remedy = "remove the folder, and it is rendered again"

    @classmethod
    def place(cls, data: DataSettings) -> Path:
        """The folder of the scenes that ``data`` wants, rendered now if it is missing. Raises as ``ensure_scenes``."""
        scenes = data.scenes
        return ensure_scenes(
            data.root, train=scenes.train_images, val=scenes.val_images, size=scenes.size, seed=scenes.seed
        )
