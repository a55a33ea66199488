"""Pictures show what was predicted, at its size, in the colours of the task table; the sheet has a tile for each."""

import subprocess
import sys

import numpy as np
import pytest

from ase_dist.pictures.legend import LINE, MARGIN, TASK_GAP
from ase_dist.pictures.sheet import TILE, sheet, task_picture
from ase_dist.tasks import NYUD_TASKS, PASCAL_TASKS
from tests.deployment.conftest import photo

pytestmark = pytest.mark.single_gpu
SEMSEG, EDGE, NORMALS = (PASCAL_TASKS[name] for name in ("semseg", "edge", "normals"))


def test_pixels_of_a_class_picture_are_the_ids_and_look_like_the_palette():
    ids = (np.arange(20 * 30).reshape(20, 30) % 21).astype(np.uint8)
    picture = task_picture(SEMSEG, ids)
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.asarray(picture), ids)
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), np.array(SEMSEG.palette, np.uint8)[ids])


def test_probabilities_are_grey_and_normals_colours():
    ramp = np.linspace(0, 1, 60, dtype=np.float32).reshape(6, 10)
    np.testing.assert_array_equal(np.asarray(task_picture(EDGE, ramp)), np.rint(ramp * 255))
    normals = np.zeros((3, 4, 5), dtype=np.float32)
    normals[2], normals[:, 0, 0] = 1, (1, 0, 0)
    shown = np.asarray(task_picture(NORMALS, normals))
    assert shown[1, 1].tolist() == [128, 128, 255] and shown[0, 0].tolist() == [255, 128, 128]


def test_depth_runs_over_its_own_range():
    metres = np.linspace(2, 7, 40, dtype=np.float32).reshape(1, 5, 8)
    shown = np.asarray(task_picture(NYUD_TASKS["depth"], metres))
    assert shown.shape == (5, 8, 3) and shown[0, 0].tolist() == [68, 1, 84] and shown[-1, -1].tolist() == [253, 231, 36]


@pytest.mark.parametrize(
    ("shape", "tasks", "columns"),
    [((100, 150), 5, 3), ((150, 100), 3, 2), ((80, 80), 1, 2), ((20, 400), 2, 3), ((400, 10), 4, 3), ((90, 90), 6, 2)],
)
def test_the_sheet_has_a_tile_for_the_image_and_each_task(shape, tasks, columns):
    image = np.zeros((*shape, 3), np.uint8) + np.array([200, 30, 60], np.uint8)
    chosen = [EDGE] * (tasks - 1) + [PASCAL_TASKS["saliency"]]
    values = {"edge": np.full(shape, 0.25, np.float32), "saliency": np.ones(shape, np.float32)}
    page = np.asarray(sheet(image, values, chosen))
    height, width = (max(TILE // 4, round(side * TILE / max(shape))) for side in shape)
    assert page.shape[1] == 2 * MARGIN + columns * (width + TASK_GAP) - TASK_GAP
    middles = []
    for i in range(tasks + 1):
        top = MARGIN + LINE + i // columns * (LINE + height + TASK_GAP)
        left = MARGIN + i % columns * (width + TASK_GAP)
        tile = page[top : top + height, left : left + width]
        assert tile.shape[:2] == (height, width) and (tile == tile[0, 0]).all()
        middles.append(tile[0, 0].tolist())
    assert middles == [[200, 30, 60], *[[64, 64, 64]] * (tasks - 1), [255, 255, 255]]


def test_classes_that_occur_stand_below():
    """A swatch of each colour that is predicted, and of no other."""
    ids = np.zeros((60, 60), np.uint8)
    ids[:, 30:] = 15
    bare = np.asarray(sheet(photo(60, 60), {"edge": np.zeros((60, 60), np.float32)}, [EDGE]))
    page = np.asarray(sheet(photo(60, 60), {"semseg": ids}, [SEMSEG]))
    legend = page[bare.shape[0] - MARGIN :].reshape(-1, 3).tolist()
    assert list(SEMSEG.palette[15]) in legend and list(SEMSEG.palette[12]) not in legend


def test_importing_loads_no_matplotlib():
    code = "import sys, ase_dist.pictures.grid, ase_dist.pictures.sheet; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
