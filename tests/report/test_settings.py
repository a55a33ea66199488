"""Settings beside their defaults."""

import pytest

from ase_dist.config import Settings, setting_keys
from ase_dist.read_config import load_settings, to_yaml
from ase_dist.report.settings import read_settings, settings_sections

pytestmark = pytest.mark.single_gpu


def rows(text):
    return {row.key: row for section in settings_sections(read_settings(text)) for row in section.rows}


def test_every_setting_has_a_row_and_the_defaults_are_not_marked():
    found = rows(to_yaml(Settings()))
    assert list(found) == setting_keys()
    assert not [key for key, row in found.items() if row.differs]


def test_what_differs_is_marked_beside_its_default():
    changes = [
        "train.lr=0.25",
        "tasks=[edge]",
        "model.moe.aux_losses={z: 0.5}",
        "train.loss_weights={edge: 3}",
        "output=x",
    ]
    found = rows(to_yaml(load_settings("scenes", changes)))
    plain = rows(to_yaml(load_settings("scenes")))
    assert {key for key in found if found[key].value != plain[key].value} == {
        change.split("=")[0] for change in changes
    }
    assert (found["train.lr"].value, found["train.lr"].default, found["train.lr"].differs) == ("0.25", "0.0005", True)
    assert found["model.moe.aux_losses"].value == '{"z": 0.5}'
    assert found["model.moe.k"].meaning == "routed experts active per token"


def test_sections_count_their_changes():
    sections = {s.name: s for s in settings_sections({"seed": 4, "train": {"lr": 1.0, "warmup_steps": 2}})}
    assert (sections["general"].changed, sections["train"].changed, sections["model.moe"].changed) == (1, 2, 0)


def test_a_setting_of_another_version_is_shown_as_such():
    found = rows("seed: 0\ntrain: {magic: 7}\nmodel: 3\n")
    assert (found["train.magic"].value, found["train.magic"].is_known, found["train.magic"].differs) == (
        "7",
        False,
        False,
    )
    assert found["model"].value == "3" and found["model.backbone"].value == found["model.backbone"].default


@pytest.mark.parametrize("text", ["[1, 2]", "", "a: b: c", "!!python/object:os.system {}", "'text'"])
def test_what_is_no_tree_is_refused_in_a_sentence(text):
    with pytest.raises(ValueError, match=r"config\.yaml"):
        read_settings(text)


def test_settings_of_an_older_run_stand_under_their_names_of_today():
    found = rows("data: {train_images: 7}\ntrain: {eps: 0.5}\n")
    assert list(found) == setting_keys()
    assert (found["data.scenes.train_images"].value, found["train.adam.eps"].value) == ("7", "0.5")
