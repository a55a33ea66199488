"""The grid of predictions: the right colour where the content is known, whatever the sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ase_dist import imagenet
from ase_dist.pictures.grid import HATCH, prediction_grid, save_png
from ase_dist.pictures.legend import GAP, LINE, MARGIN, TASK_GAP
from ase_dist.tasks import IGNORE, NYUD_TASKS, PASCAL_TASKS, Task

pytestmark = pytest.mark.single_gpu

WIDTH = 32
TOP = MARGIN + 2 * LINE + GAP  # of the first row of tiles
SEMSEG, EDGE, SALIENCY, NORMALS = (PASCAL_TASKS[name] for name in ("semseg", "edge", "saliency", "normals"))


def tile(grid: Image.Image, task: int, *, prediction: bool, top: int = TOP, height: int = WIDTH) -> np.ndarray:
    """The pixels of a task's truth or prediction in the row that begins at ``top``."""
    left = MARGIN + WIDTH + task * (2 * WIDTH + GAP + TASK_GAP) + TASK_GAP + (WIDTH + GAP) * prediction
    return np.asarray(grid)[top : top + height, left : left + WIDTH]


def draw(task: Task, truth: Tensor, prediction: Tensor) -> tuple[np.ndarray, np.ndarray]:
    images = torch.zeros(1, 3, 16, 16)
    grid = prediction_grid(images, {task.name: [truth]}, {task.name: [prediction]}, [task], width=WIDTH)
    height = round(WIDTH * truth.shape[-2] / truth.shape[-1])
    return tuple(tile(grid, 0, prediction=p, height=height) for p in (False, True))  # type: ignore[return-value]


def is_hatched(pixels: np.ndarray) -> bool:
    """Whether all are of the two greys, and both occur."""
    return {tuple(pixel) for pixel in pixels.reshape(-1, 3).tolist()} == set(HATCH)


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (40, 64), (96, 64)])
def test_classes_have_their_palette_colours(size: tuple[int, int]) -> None:
    truth = torch.zeros(size, dtype=torch.uint8)
    truth[:, size[1] // 2 :] = 15
    truth[size[0] // 2 :, size[1] // 2 :] = IGNORE
    shown, predicted = draw(SEMSEG, truth, torch.full(size, 7, dtype=torch.uint8))
    h, w = shown.shape[:2]
    assert (shown[:, : w // 2] == SEMSEG.palette[0]).all()
    assert (shown[: h // 2, w // 2 :] == SEMSEG.palette[15]).all()
    assert is_hatched(shown[h // 2 :, w // 2 :])
    assert (predicted == SEMSEG.palette[7]).all()
    assert SEMSEG.palette[7] not in HATCH  # the class that is grey can be told from what is ignored


def test_normals_are_colours_and_unknown_ones_hatched() -> None:
    normal = torch.tensor([0.0, -0.6, 0.8]).view(3, 1, 1).expand(3, 24, 24).clone()
    truth = normal.clone()
    truth[:, :, 12:] = 0
    shown, predicted = draw(NORMALS, truth, normal)
    want = [round((n + 1) / 2 * 255) for n in (0.0, -0.6, 0.8)]
    assert np.abs(shown[:, :15].astype(int) - want).max() <= 1  # off the border, where hatching begins
    assert np.abs(predicted.astype(int) - want).max() <= 1
    assert is_hatched(shown[:, 16:])


def test_masks_and_edges_are_grey() -> None:
    truth = torch.zeros(64, 64, dtype=torch.uint8)
    truth[:, 21] = 1  # one pixel wide: still there at half the size
    truth[:8] = IGNORE
    shown, predicted = draw(EDGE, truth, torch.full((64, 64), 0.4))
    assert (shown[4:, 10] == 255).all() and (shown[4:, [8, 12]] == 0).all()
    assert is_hatched(shown[:4])
    assert (predicted == round(0.4 * 255)).all()
    shown, predicted = draw(SALIENCY, (torch.arange(64) < 32).expand(64, 64).to(torch.uint8), torch.ones(64, 64))
    assert (shown[:, :14] == 255).all() and (shown[:, 18:] == 0).all() and (predicted == 255).all()


def test_depth_shares_one_scale_between_truth_and_prediction() -> None:
    truth = torch.linspace(1, 5, 32).expand(1, 32, 32).clone()
    truth[:, :4] = 0
    shown, predicted = draw(NYUD_TASKS["depth"], truth, torch.linspace(1, 5, 32).expand(1, 32, 32))
    assert (shown[4:] == predicted[4:]).all() and is_hatched(shown[:4])
    assert len(np.unique(shown[8], axis=0)) > 20
    nothing, _ = draw(NYUD_TASKS["depth"], torch.zeros(1, 8, 8), torch.ones(1, 8, 8))
    assert is_hatched(nothing)


def test_the_image_is_de_normalised() -> None:
    colour = torch.tensor([0.9, 0.5, 0.1]).view(1, 3, 1, 1)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (imagenet.MEAN, imagenet.STD))
    images = ((colour - mean) / std).expand(1, 3, 20, 20)
    labels = {"edge": torch.zeros(1, 20, 20, dtype=torch.uint8)}
    grid = np.asarray(prediction_grid(images, labels, labels, [EDGE], width=WIDTH))
    assert np.abs(grid[TOP : TOP + WIDTH, MARGIN : MARGIN + WIDTH].astype(int) - [230, 128, 26]).max() <= 1


def test_rows_have_the_shape_of_their_labels_and_batches_may_be_tensors(tmp_path: Path) -> None:
    """Two images of different shapes, every task of the table; predictions at yet another size."""
    tasks = list(PASCAL_TASKS.values())
    sizes = [(30, 60), (90, 60)]
    g = torch.Generator().manual_seed(0)

    def content(task: Task, size: tuple[int, int]) -> Tensor:
        if task.kind == "normals":
            return torch.nn.functional.normalize(torch.randn(3, *size, generator=g), dim=0)
        return torch.full(size, 1, dtype=torch.uint8)

    labels = {task.name: [content(task, size) for size in sizes] for task in tasks}
    predictions = {task.name: torch.stack([content(task, (12, 12)) for _ in sizes]) for task in tasks}
    grid = prediction_grid(torch.randn(2, 3, 16, 16, generator=g), labels, predictions, tasks, width=WIDTH)
    heights = [WIDTH // 2, WIDTH * 3 // 2]
    for task in (0, 1):
        top = TOP
        for height in heights:
            for prediction in (False, True):
                pixels = tile(grid, task, prediction=prediction, top=top, height=height)
                assert (pixels == tasks[task].palette[1]).all()
            top += height + GAP
    assert grid.height >= TOP + sum(heights) + 2 * GAP + 2 * LINE  # a line of legend for each task with classes
    save_png(grid, tmp_path / "predictions" / "step_10.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "predictions" / "step_10.png")), np.asarray(grid))


def test_the_legend_shows_the_classes_that_occur() -> None:
    truth = torch.tensor([[3, 3], [IGNORE, 0]], dtype=torch.uint8).repeat_interleave(8, 0).repeat_interleave(8, 1)
    images = torch.zeros(1, 3, 16, 16)
    grid = prediction_grid(images, {"semseg": [truth]}, {"semseg": [torch.full_like(truth, 12)]}, [SEMSEG], width=200)
    legend = np.asarray(grid)[TOP + 200 + GAP :].reshape(-1, 3)
    found = [i for i, colour in enumerate(SEMSEG.palette) if ((legend == colour).all(1)).sum() >= 100]
    assert found == [0, 3, 12]
