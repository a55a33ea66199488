"""The size of the input: a square as ever, rectangles in one form, and one sentence for what is no size."""

import json

import pytest
import yaml

from ase_dist.errors import UserError
from ase_dist.image_size import ImageSize
from ase_dist.read_config import build_settings, load_settings, override_settings, to_yaml
from ase_dist.training.state.compare_settings import compare_settings

pytestmark = pytest.mark.single_gpu

SQUARES = ["224", "0xE0", "224.0", "224x224", "[224, 224]", "[224,224]"]
RECTANGLES = ["448x576", "448X576", " 448 x 576 ", "[448,576]", "[448, 576]"]


@pytest.mark.parametrize("text", SQUARES + RECTANGLES)
def test_every_form_is_recorded_in_one(text, tmp_path):
    wanted = 224 if text in SQUARES else [448, 576]
    settings = load_settings(None, [f"data.size={text}", f"data.scenes.size={text}"])
    assert settings.data.size == ((224, 224) if text in SQUARES else (448, 576)) == settings.data.scenes.size
    for data in (settings.model_dump(mode="json")["data"], settings.model_dump()["data"],
                 yaml.safe_load(to_yaml(settings))["data"]):  # fmt: skip
        assert data["size"] == wanted == data["scenes"]["size"]
    (tmp_path / "a.yaml").write_text(f"data: {{size: {json.dumps(text) if text in RECTANGLES[:3] else text}}}")
    assert load_settings(tmp_path / "a.yaml").data.size == settings.data.size
    assert override_settings(settings, {"data.size": wanted}) == settings


def test_height_comes_first():
    size = ImageSize.read("448x576")
    assert (size.height, size.width, str(size), size.is_square) == (448, 576, "448x576", False)
    assert str(ImageSize.read(32)) == "32" and ImageSize.read((32, 48)) == ImageSize(32, 48)


@pytest.mark.parametrize(
    "text",
    ["", "big", "448x", "x576", "448x576x3", "[448]", "[1,2,3]", "[448x576]", "[448,x]", "null", "224.5", "[true,32]",
     "{a: 1}", "448,576", "1e99"],
)  # fmt: skip
def test_what_is_no_size_is_one_sentence(text):
    with pytest.raises(UserError, match=r"data\.size: got .*, wanted the side of a square such as 224, or height x wi"):
        load_settings(None, [f"data.size={text}"])


@pytest.mark.parametrize(("text", "shown"), [("8", "8"), ("32x8", "32x8"), ("[-32,32]", "-32x32"), ("16x99999", "16x")])
def test_what_is_too_small_or_too_large_is_one_sentence(text, shown):
    with pytest.raises(UserError, match=rf"data\.size: got {shown}.*, wanted sides of 16 to 16,384 pixels"):
        load_settings(None, [f"data.size={text}"])


def test_a_resumed_run_keeps_its_size():
    settings = build_settings({"data": {"size": [32, 48]}})
    saved = settings.model_dump(mode="json")
    same = compare_settings(saved, settings, tasks=(), saved_tasks=())
    assert not same.refused and not same.listed
    turned = build_settings({"data": {"size": [48, 32]}})
    refused = compare_settings(saved, turned, tasks=(), saved_tasks=()).refused
    assert refused == {"data.size": "data.size is [32, 48] there and [48, 32] here"}
