"""Adding a task: a row in one table.

The row says what the task is: its kind (classes, mask, edges, normals or depth) decides loss, metric, trivial
predictor and drawing, so they follow, as do its head, router, plots, tables and report. Its labels lie where the data
set says, else in ``TASK/IMAGE.png`` or ``.npy``, as ``ase_dist.data.decode.decoder_of`` reads them. In a checkout the
row goes into ``ase_dist/tasks.py``. (A new kind is more: a label form, a loss, a metric, a decoding and a picture.)
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ase_dist.examples import small
from ase_dist.read_config import load_settings
from ase_dist.scenes.dataset import Scenes
from ase_dist.tasks import DATA_SETS, Task

LIGHT = Task(
    name="light",
    title="Light places",
    kind="mask",
    channels=1,
    loss_weight=5.0,
    metric="miou",
    metric_title="mIoU %",
    higher_is_better=True,
)


def label(root: Path) -> None:
    """Make the labels: white where a scene is lighter than its median."""
    folder = Scenes.place(load_settings(None, [*small.SMALL, f"data.root={root}"]).data)
    (folder / LIGHT.name).mkdir()
    for path in folder.glob("JPEGImages/*.jpg"):
        grey = np.asarray(Image.open(path).convert("L"))
        Image.fromarray(np.uint8(255) * (grey > np.median(grey))).save(folder / LIGHT.name / f"{path.stem}.png")


def main() -> dict[str, Any]:
    """Train two steps on it and another task, and evaluate; returns the run's summary."""
    scenes = DATA_SETS["scenes"]
    DATA_SETS["scenes"] = replace(scenes, tasks={**scenes.tasks, LIGHT.name: LIGHT})
    return small.run("tasks=[light,semseg]", prepare=label)


if __name__ == "__main__":
    main()
