"""dataset.yaml: what may stand in it, what follows from it, and one sentence for everything that is wrong."""

import re
from pathlib import Path

import pytest

from ase_dist import description
from ase_dist.description import FILE_NAME, DataSetDescription, parse_color, read_description
from ase_dist.errors import UserError
from ase_dist.read_config import build_settings, load_settings, override_settings, recorded_settings, to_yaml
from ase_dist.tasks import DATA_SETS, voc_color

pytestmark = pytest.mark.single_gpu

START = "images: images/{}.jpg\nsplits: {train: images, val_every: 4}\ntasks:\n"
DEPTH = "  depth: {kind: depth, files: 'depth/{}.png', unit: mm}\n"


def read(folder, text):
    (folder / FILE_NAME).write_text(text, encoding="utf-8")
    return read_description(folder / FILE_NAME)


def classes(folder, text):
    (task,) = description.described(
        read(folder, f"{START}  semseg:\n    kind: classes\n    files: l/{{}}.png\n{text}")
    ).tasks.values()
    return task


def test_names_stay_text_and_colours_have_three_forms(tmp_path):
    task = classes(tmp_path, "    classes:\n      no: [1, 2, 3]\n      007: '#0A0b0c'\n      on: 128, 64 32\n")
    assert task.class_names == ("no", "007", "on")
    assert task.palette == ((1, 2, 3), (10, 11, 12), (128, 64, 32))
    assert (task.channels, task.title, task.metric_title) == (3, "Semantic segmentation", "mIoU %")


def test_a_list_of_names_has_the_colours_of_voc(tmp_path):
    task = classes(tmp_path, "    classes: [sky, yes, '\u00e9t\u00e9']\n")
    assert task.class_names == ("sky", "yes", "\u00e9t\u00e9")
    assert task.palette == tuple(map(voc_color, range(3)))


@pytest.mark.parametrize(
    ("kind", "known", "weight", "metric"),
    [("saliency", "mask", 5, "miou"), ("edge", "edges", 50, "bce"), ("surface_normals", "normals", 10, "mean")],
)
def test_the_words_of_the_field_are_kinds_with_the_tables_weights_and_metrics(tmp_path, kind, known, weight, metric):
    found = read(tmp_path, f"{START}  a: {{kind: {kind}, files: 'a/{{}}.png'}}\n")
    task = description.described(found).tasks["a"]
    assert (task.kind, task.loss_weight, task.metric) == (known, weight, metric)
    of_table = [each for data in DATA_SETS.values() for each in data.tasks.values() if each.kind == known]
    assert {(each.loss_weight, each.metric, each.higher_is_better) for each in of_table} == {
        (weight, metric, task.higher_is_better)
    }


MAP = "classes: [a, b, c]\n"


def test_edges_may_have_a_tolerance_and_an_earlier_name_of_a_score_is_read(tmp_path):
    lines = (
        "  a: {kind: edges, files: 'a/{}.png', tolerance: 0.011}",
        "  b: {kind: edges, files: 'b/{}.png'}",
        "  d: {kind: depth, files: 'd/{}.npy', unit: m, metric: absrel}",
    )
    found = read(tmp_path, START + "\n".join(lines) + "\n")
    tasks = description.described(found).tasks
    assert (tasks["a"].tolerance, tasks["b"].tolerance, tasks["d"].tolerance) == (0.011, 0.0075, None)
    assert tasks["d"].metric == "rel"
    assert read(tmp_path, description.to_yaml(found)) == found


WRONG = {
    "no file kind": (f"{START}  d: {{kind: depht, files: 'd/{{}}.png'}}", "tasks.d.kind: got 'depht'"),
    "an unknown key": (f"{START}{DEPTH}imges: x", "imges: there is no such key, did you mean 'images'?"),
    "an unknown key of a task": (
        f"{START}  d: {{kind: depth, unit: m, fils: x, files: 'd/{{}}.png'}}",
        "tasks.d.fils: there is no such key, did you mean 'files'?",
    ),
    "no unit": (f"{START}  d: {{kind: depth, files: 'd/{{}}.png'}}", "tasks.d: unit: missing, wanted m, cm, mm"),
    "no images": (f"splits: {{train: x, val: y}}\ntasks:\n{DEPTH}", "images: it is missing"),
    "no place for the name": (f"{START}  d: {{kind: depth, files: 'd/a.png', unit: m}}", "wanted a place for the"),
    "out of the folder": (f"{START}  d: {{kind: depth, files: '../{{}}.png', unit: m}}", "wanted a path below the"),
    "an absolute path": (f"{START}  d: {{kind: depth, files: '/d/{{}}.png', unit: m}}", "wanted a path below the data"),
    "other braces": (f"{START}  d: {{kind: depth, files: '{{x}}.png', unit: m}}", "wanted no other braces"),
    "both validation sets": (
        f"images: i/{{}}.jpg\nsplits: {{train: a, val: b, val_every: 2}}\ntasks:\n{DEPTH}",
        "splits: wanted either val or val_every",
    ),
    "an odd task": (f"{START}  my-task: {{kind: depth, files: 'd/{{}}.png', unit: m}}", "got the task name 'my-task'"),
    "classes of depth": (
        f"{START}  d: {{kind: depth, files: 'd/{{}}.png', unit: m, classes: [a, b]}}",
        "classes: labels of the kind depth have none, only classes, parts have",
    ),
    "an odd metric": (
        f"{START}  d: {{kind: depth, files: 'd/{{}}.png', unit: m, metric: rsme}}",
        "metric: got 'rsme', wanted one of ['rmse', 'abs_err', 'rel', ",
    ),
    "a tolerance in pixels": (
        f"{START}  e: {{kind: edges, files: 'e/{{}}.png', tolerance: 4}}", "tasks.e.tolerance: got 4"
    ),
    "a tolerance of depth": (
        f"{START}  d: {{kind: depth, files: 'd/{{}}.png', unit: m, tolerance: 0.01}}",
        "tolerance: labels of the kind depth have none, only edges have",
    ),
    "no YAML": (f"{START}  d: {{kind: depth, files: d/{{}}.png}}", "not plain YAML"),
    "empty": ("", "got nothing, wanted images, splits and tasks"),
    "another's name": (f"name: scenes\n{START}{DEPTH}", "name: got 'scenes', which is another data set's name"),
    "twice": (f"{START}{DEPTH}{DEPTH}", "tasks.depth: stands twice, in lines 4 and 5"),
    "split in labels only": (
        f"{START}  d: {{kind: depth, files: '{{split}}/d/{{}}.png', unit: m}}",
        "tasks.d.files: {split} stands in it but not in images",
    ),
}  # fmt: skip
OF_CLASSES = {
    "one class": ("    classes: [a]\n", "got 1 classes, wanted 2 to 255"),
    "a name twice": ("    classes: [a, b, a]\n", "got 'a' twice, wanted a name for each class"),
    "a comment for a colour": (
        "    classes:\n      a: #ff0000\n      b: [0, 0, 0]\n",
        "color: got nothing, wanted a colour",
    ),
    "an odd colour": (
        "    classes:\n      a: [0, 0, 256]\n      b: [0, 0, 0]\n",
        "color: got [0, 0, 256], wanted a colour",
    ),
    "a map to nothing": (f"    {MAP}    id_map: {{1: a, 2: d}}\n", "id_map: got 'd', wanted one of ['a', 'b', 'c']"),
    "two maps": (f"    {MAP}    id_map: {{1: a}}\n    rgb_map: colors\n", "got id_map and rgb_map, wanted one of them"),
    "an ignored class": (f"    {MAP}    ignore: 1\n", "ignore: 1 is the id of a class too"),
    "no classes": ("    ignore: 1\n", "classes: missing, wanted the names of the classes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_in_one_sentence(tmp_path, case, one_sentence):
    text, words = WRONG[case]
    with pytest.raises(UserError) as raised:
        read(tmp_path, text)
    one_sentence(raised, tmp_path / FILE_NAME, words)


@pytest.mark.parametrize("case", OF_CLASSES)
def test_what_is_wrong_with_classes_is_told_in_one_sentence(tmp_path, case, one_sentence):
    text, words = OF_CLASSES[case]
    with pytest.raises(UserError) as raised:
        classes(tmp_path, text)
    one_sentence(raised, "tasks.semseg", words)


@pytest.mark.parametrize("color", ["red", "#fff", "1,2", [1, 2], [1, 2, 3.5], True, {"r": 1}, [True, 1, 1]])
def test_what_is_no_colour(color):
    with pytest.raises(UserError, match=re.escape(f"got {color!r}, wanted a colour")):
        parse_color(color)


def test_every_key_is_on_the_page():
    page = (Path(__file__).parents[1] / "docs" / "own_data.md").read_text()
    models = (DataSetDescription, description.SplitDescription, description.TaskDescription)
    for key in (key for model in models for key in model.model_fields):
        assert f"`{key}`" in page or f"{key}:" in page, key
    for kind in description.KINDS:
        assert f"| `{kind}`" in page


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def garden(tmp_path):
    folder = tmp_path / "my garden"
    folder.mkdir()
    (folder / FILE_NAME).write_text(START + DEPTH)
    return folder


def test_the_folder_or_the_file_is_enough(garden, tmp_path):
    by_root = load_settings(None, [f"data.root={garden}"])
    assert by_root.data.name == "my garden" and [task.name for task in by_root.chosen_tasks()] == ["depth"]
    assert load_settings(None, [f"data.name={garden}"]) == by_root
    assert load_settings(None, [f"data.name={garden / FILE_NAME}"]) == by_root
    assert load_settings("pascal_ase_16_3_1_4", [f"data.root={garden}"]).data.description == by_root.data.description
    elsewhere = tmp_path / "elsewhere.yaml"
    (garden / FILE_NAME).rename(elsewhere)
    assert load_settings(None, [f"data.name={elsewhere}", f"data.root={garden}"]).data.root == garden
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(by_root))
    assert recorded_settings(config) == load_settings(config) == by_root  # the file is not there any more


def test_a_run_keeps_its_description_until_other_data_are_named(garden, tmp_path):
    settings = load_settings(None, [f"data.root={garden}"])
    (garden / FILE_NAME).write_text(START + DEPTH.replace("mm", "cm"))
    assert override_settings(settings, ["seed=1"]).data == settings.data
    assert override_settings(settings, {"data.root": tmp_path}).data.description == settings.data.description
    assert override_settings(settings, {"data.root": garden}).data.description.tasks["depth"].unit == "cm"
    assert override_settings(settings, {"data.name": "nyud", "data.root": None}).data.description is None
    with pytest.raises(UserError, match=r"got 'scens', but .* describes 'my garden'"):
        override_settings(settings, {"data.name": "scens"})


def test_a_recorded_run_of_another_data_set_is_not_described_anew(garden, tmp_path):
    tree = load_settings(None, ["data.name=pascal_context"]).model_dump(mode="json")
    tree["data"]["root"] = str(garden)
    (tmp_path / "config.yaml").write_text(to_yaml(build_settings(tree)))
    assert recorded_settings(tmp_path / "config.yaml").data.data_set is DATA_SETS["pascal_context"]


def test_a_folder_without_a_description_says_how_to_write_one(tmp_path):
    with pytest.raises(UserError, match=r"is a folder without a dataset\.yaml; write one, which .* --init begins"):
        load_settings(None, [f"data.name={tmp_path}"])


def test_changed_meanings_are_refused_on_resume_and_other_changes_are_listed(garden):
    text = (
        START + "  semseg:\n    kind: classes\n    files: l/{}.png\n    classes: {a: [0, 0, 0], b: [9, 9, 9]}\n" + DEPTH
    )
    before = read(garden, text).model_dump(mode="json")
    listed = {"[9, 9, 9]": "[9, 9, 8]", "l/{}": "m/{}", "unit: mm": "unit: mm, title: Far", "jpg": "png"}
    refused = {
        "b: [9": "c: [9",
        "unit: mm": "unit: cm",
        "val_every: 4": "val_every: 5",
        "train: images": "train: pictures",
    }
    for changes, place in ((listed, 1), (refused, 0)):
        for old, new in changes.items():
            found = description.differences(before, read(garden, text.replace(old, new)).model_dump(mode="json"))
            assert [len(part) for part in found] == [1 - place, place], (old, found)
    assert description.differences(before, before) == ({}, {})
    swapped = text.replace("a: [0, 0, 0], b: [9, 9, 9]", "b: [9, 9, 9], a: [0, 0, 0]")
    assert description.differences(before, read(garden, swapped).model_dump(mode="json"))[0]


def test_a_study_takes_the_folder_too(garden, tmp_path):
    from ase_dist.study.jobs import jobs_of
    from ase_dist.study.presets import find_preset
    from ase_dist.study.variants import STUDIES

    preset = find_preset(str(garden))
    assert preset.title == "my garden" and preset.pair == ("depth",)
    (job, *_) = jobs_of(STUDIES["topk"].variants(preset), preset, seeds=1, out=tmp_path)
    assert job.settings.data.description.tasks.keys() == {"depth"} and job.settings.data.root == garden
    with pytest.raises(UserError, match=r"there is no 'scene', did you mean 'scenes'"):
        find_preset("scene")
