"""Rectangular scenes: what a square camera of the same focal length sees in its middle, labels bit for bit."""

import numpy as np
import pytest
from PIL import Image

from ase_dist.errors import UserError
from ase_dist.image_size import ImageSize
from ase_dist.scenes.make import ensure_scenes
from ase_dist.scenes.render import render_scene
from ase_dist.scenes.sheet import contact_sheet

pytestmark = pytest.mark.single_gpu
LABELS = ("semseg", "label_map", "parts", "saliency", "normals")


@pytest.mark.parametrize("size", [ImageSize(36, 48), ImageSize(48, 30)], ids=str)
@pytest.mark.parametrize("index", [7, 53])  # two people; a room
@pytest.mark.parametrize("camera", [{}, {"flip": True, "roll": 20.0}], ids=["upright", "turned"])
def test_a_rectangle_is_the_middle_of_the_square(size, index, camera):
    square = render_scene(seed=0, index=index, size=48, **camera)
    wide = render_scene(seed=0, index=index, size=size, **camera)
    top, left = (48 - size.height) // 2, (48 - size.width) // 2
    middle = np.s_[top : top + size.height, left : left + size.width]
    for name in LABELS:
        np.testing.assert_array_equal(getattr(wide, name), getattr(square, name)[middle], err_msg=name)
        assert getattr(wide, name).shape[:2] == size
    same = (wide.image == square.image[middle]).all(axis=-1)
    assert same[1:-1, 1:-1].mean() > 0.995  # pixels at the border have no neighbours outside to be smoothed with
    inside = {each.name: int(each.mask[middle].sum()) for each in square.instances if each.mask[middle].any()}
    assert {each.name: int(each.mask.sum()) for each in wide.instances}.keys() == inside.keys()
    assert all(each.mask.shape == size for each in wide.instances)


def test_a_quarter_turn_of_a_wide_scene_is_the_high_one():
    wide = render_scene(seed=0, index=7, size=ImageSize(36, 48))
    high = render_scene(seed=0, index=7, size=ImageSize(48, 36), roll=90.0)
    np.testing.assert_array_equal(high.semseg, np.rot90(wide.semseg))
    np.testing.assert_array_equal(high.image, np.rot90(wide.image))


def test_a_rectangular_data_set_is_named_and_found_again(tmp_path):
    place = ensure_scenes(tmp_path, train=1, val=1, size=ImageSize(32, 48), seed=2, workers=1)
    assert place.name.endswith("-seed2-32x48px-1+1")
    before = (place / "manifest.json").stat().st_mtime_ns
    assert ensure_scenes(tmp_path, train=1, val=1, size=ImageSize(32, 48), seed=2) == place
    assert (place / "manifest.json").stat().st_mtime_ns == before
    assert {Image.open(path).size for path in place.rglob("*.jpg")} == {(48, 32)}
    assert ensure_scenes(tmp_path, train=1, val=1, size=ImageSize(48, 32), seed=2, workers=1) != place


@pytest.mark.parametrize("size", [ImageSize(16, 48), ImageSize(48, 5000)], ids=str)
def test_a_side_out_of_range_is_one_sentence(size, tmp_path):
    with pytest.raises(UserError, match=rf"scenes: size: got {size}, wanted sides of 32 to 4,096 pixels"):
        ensure_scenes(tmp_path, train=1, val=1, size=size, seed=0)


def test_a_contact_sheet_of_wide_scenes(tmp_path):
    contact_sheet(tmp_path / "sheet.png", indices=[3], seed=4, size=ImageSize(36, 48))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (6 * 52 - 4, 18 + 36)
