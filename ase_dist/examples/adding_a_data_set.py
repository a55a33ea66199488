"""Adding a data set: a row in one table.

A ``dataset.yaml`` needs no program at all: see docs/own_data.md. What a file cannot say is a row in a table, here for
this program alone, or in a module of yours by ``data.name=package.module:NAME``.

The row names its tasks and what reads it. A folder in the layout of ``FolderDataset`` (``lists/train.txt``,
``val.txt``, ``images/NAME.jpg``, ``TASK/NAME.png``) needs no code; other places and file types are a subclass that
says where and how: see ``ase_dist/data/nyud.py``, 30 lines. Loader, augmentation, packing, evaluation, plots and
reports take it from there. In a checkout the row goes into ``ase_dist/tasks.py``.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ase_dist.data.folder import FolderDataset
from ase_dist.examples import small
from ase_dist.tasks import DATA_SETS, DataSet, Task

CLASSES = ("wall", "disc", "bar")
TASKS = (
    Task("shapes", "Shapes", "classes", 3, 1.0, "miou", "mIoU %", True, CLASSES),
    Task("depth", "Depth", "depth", 1, 1.0, "rmse", "RMSE m", False),
)


def write(root: Path) -> None:
    """Nine pictures of a disc and a bar before a wall, the disc's distance 1 m, the bar's 2 m, the wall's 4 m."""
    for folder in ("lists", "images", "shapes", "depth"):
        (root / folder).mkdir()
    rng = np.random.default_rng(0)
    names = [f"toy_{i}" for i in range(9)]
    for name in names:
        y, x = np.mgrid[:40, :48]
        bar, disc = x // 6 == rng.integers(8), (y - rng.integers(40)) ** 2 + (x - rng.integers(48)) ** 2 < 100
        ids = np.select([disc, bar], [1, 2], 0).astype(np.uint8)
        Image.fromarray(rng.integers(40, size=(40, 48, 3), dtype=np.uint8) + ids[..., None] * 90).save(
            root / "images" / f"{name}.png"
        )
        Image.fromarray(ids).save(root / "shapes" / f"{name}.png")
        np.save(root / "depth" / f"{name}.npy", np.array([4, 1, 2], np.float32)[ids])
    (root / "lists" / "train.txt").write_text("\n".join(names[:6]))
    (root / "lists" / "val.txt").write_text("\n".join(names[6:]))


def main() -> dict[str, Any]:
    """Train two steps on it and evaluate; the run's summary."""
    DATA_SETS["toys"] = DataSet({task.name: task for task in TASKS}, reader=FolderDataset)  # the one line
    return small.run("data.name=toys", prepare=write)


if __name__ == "__main__":
    main()
