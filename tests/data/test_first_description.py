"""``prepare_data FOLDER --init``: folders as users have them are described so that every file is read as meant."""

import logging
import re

import numpy as np
import pytest
from PIL import Image

from ase_dist.commands import prepare_data
from ase_dist.data.described import described_reader
from ase_dist.data.file_check import expand
from ase_dist.data.first_description import first_description
from ase_dist.description import FILE_NAME, described, read_description
from tests.data.own_folders import SHAPE, disc, ids, metres, millimetres, outline, palette_picture, picture, save

pytestmark = pytest.mark.single_gpu

COLORS = np.array([[0, 0, 0], [128, 64, 128], [244, 35, 232], [70, 70, 70], [107, 142, 35]], np.uint8)
COUNT = 10
FLAT = np.float32([0, 0.6, 0.8])[None, None].repeat(SHAPE[0], 0).repeat(SHAPE[1], 1)


def split_of(i):
    return "val" if i % 5 == 4 else "train"


def sub_folders(root, i):
    save(root / f"images/{split_of(i)}/p{i}.jpg", picture(i))
    save(root / f"labels/{split_of(i)}/p{i}.png", ids(i))


def split_first(root, i):
    split = {"train": "train", "val": "valid"}[split_of(i)]
    save(root / f"{split}/images/p {i}.JPG", picture(i))
    save(root / f"{split}/masks/p {i}.png", disc(i).astype(np.uint8) * 255)


def split_in_the_name(root, i):
    save(root / f"{split_of(i)}/p{i}.png", picture(i))
    save(root / f"{split_of(i)}annot/p{i}.png", ids(i))


def voc(root, i):
    root = root / "VOCdevkit/VOC2012"
    save(root / f"JPEGImages/2007_{i:06}.jpg", picture(i))
    if i < 8:
        (root / "SegmentationClass").mkdir(exist_ok=True)
        palette_picture(ids(i), COLORS.tolist()).save(root / f"SegmentationClass/2007_{i:06}.png")
        save(root / f"SegmentationObject/2007_{i:06}.png", ids(i))
    lists = {"Main/train": range(9), "Main/val": [9], "Segmentation/train": range(6), "Segmentation/val": (6, 7)}
    for name, numbers in lists.items():
        path = root / f"ImageSets/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(f"2007_{number:06}" for number in numbers))


def cityscapes(root, i):
    name = f"{split_of(i)}/{('aachen', 'bonn')[i % 2]}/x_{i:06}_{i * 7:06}"
    save(root / f"leftImg8bit/{name}_leftImg8bit.png", picture(i))
    save(root / f"gtFine/{name}_gtFine_labelIds.png", ids(i) * np.uint8(7) + np.uint8(1))
    save(root / f"gtFine/{name}_gtFine_instanceIds.png", ids(i).astype(np.uint16) * 1000)


def colours(root, i):
    save(root / f"photos/\u00e9 {i}.jpg", picture(i))
    save(root / f"masks_rgb/\u00e9 {i}.png", COLORS[ids(i)])


def one_folder(root, i):
    save(root / f"{i}.jpg", picture(i))
    save(root / f"{i}_mask.png", disc(i).astype(np.uint8))
    save(root / f"{i}_depth.npy", metres(i))


def one_folder_of_one_ending(root, i):
    save(root / f"x{i}.png", picture(i))
    save(root / f"x{i}_seg.png", ids(i))


def geometry(root, i):
    save(root / f"rgb/{i:04}.png", picture(i))
    save(root / f"depth/{i:04}.png", millimetres(i))
    save(root / f"normals/{i:04}.npy", FLAT)
    save(root / f"edges/{i:04}.png", outline(i))


def mixed_endings(root, i):
    save(root / f"images/a{i}.{('jpg', 'PNG', 'webp')[i % 3]}", picture(i))
    save(root / f"annotations/a{i}.png", ids(i) + np.uint8(1))
    (root / "classes.txt").write_text("sky\nroad\ncar\ntree\nm\u00e4n\n", encoding="utf-8")


def nested_pictures(root, i):
    save(root / f"data/images/{split_of(i)}/p{i}.jpg", picture(i))
    save(root / f"data/depth/p{i}.npy", metres(i))


# by layout: training and validation images; by task its kind, and what the first label is to be, from the number i
CASES = {
    sub_folders: ((8, 2), {"semseg": ("classes", ids)}),
    split_first: ((8, 2), {"masks": ("mask", disc)}),
    split_in_the_name: ((8, 2), {"semseg": ("classes", ids)}),
    voc: ((6, 2), {"semseg": ("classes", ids)}),
    cityscapes: ((8, 2), {"semseg": ("classes", ids)}),
    colours: ((8, 2), {"semseg": ("classes", lambda i: np.array([0, 3, 4, 1, 2])[ids(i)])}),  # in the order of codes
    one_folder: ((8, 2), {"mask": ("mask", disc), "depth": ("depth", metres)}),
    one_folder_of_one_ending: ((8, 2), {"semseg": ("classes", ids)}),
    geometry: ((8, 2), {
        "depth": ("depth", metres), "normals": ("normals", None), "edge": ("edges", lambda i: outline(i) > 0)}),
    mixed_endings: ((8, 2), {"semseg": ("classes", ids)}),
    nested_pictures: ((8, 2), {"depth": ("depth", metres)}),
}  # fmt: skip


def written(layout, root):
    for i in range(COUNT):
        layout(root, i)
    return root


@pytest.mark.parametrize("layout", CASES, ids=lambda layout: layout.__name__)
def test_a_folder_is_described_as_it_was_meant(layout, tmp_path, caplog):
    counts, tasks = CASES[layout]
    root = written(layout, tmp_path / "folder")
    with caplog.at_level(logging.INFO):
        assert prepare_data.main([str(root), "--init"]) == 0
        description = read_description(root / FILE_NAME)
        found = {name: task.kind for name, task in described(description).tasks.items()}
        assert found == {name: kind for name, (kind, _) in tasks.items()}
        reader = described_reader(description)
        rows = tuple(described(description).tasks.values())
        datasets = [reader(root, split, rows) for split in ("train", "val")]
        assert tuple(map(len, datasets)) == counts
        record = datasets[0][0]
        number = int("".join(filter(str.isdigit, record.name.rpartition("/")[2]))[-1])
        number = 0 if layout in (voc, cityscapes) else number
        for name, (_, want) in tasks.items():
            if want is not None:
                np.testing.assert_allclose(record.labels[name], want(number), rtol=1e-6)
        assert prepare_data.main([str(root), "--check-only", "--out", str(tmp_path / "none")]) == 0
    assert f"the files of {sum(counts)} images are whole" in caplog.text


def test_names_of_a_list_and_colours_of_a_palette_are_taken(tmp_path):
    (task,) = described(read_text(mixed_endings, tmp_path / "a")).tasks.values()
    assert task.class_names == ("sky", "road", "car", "tree", "m\u00e4n")
    (task,) = described(read_text(voc, tmp_path / "b")).tasks.values()
    assert task.palette == tuple(map(tuple, COLORS.tolist()))


@pytest.mark.parametrize("layout", [colours, cityscapes], ids=lambda layout: layout.__name__)
def test_names_and_colours_of_what_is_written_may_be_changed(layout, tmp_path):
    """The maps go by number, so that what the user is asked to change is in one place."""
    root = written(layout, tmp_path / "folder")
    text = first_description(root).text
    changed = re.sub(r"^      class (\d+): .*", r"      thing \1: [\1, 1, 2]", text, flags=re.MULTILINE)
    labels = []
    for each in (text, changed):
        (root / FILE_NAME).write_text(each, encoding="utf-8")
        found = described(read_description(root / FILE_NAME))
        reader = described_reader(found.description)
        labels.append(reader(root, "train", tuple(found.tasks.values()))[0].labels["semseg"])
    assert found.tasks["semseg"].class_names[1].startswith("thing") and found.tasks["semseg"].palette[1][1:] == (1, 2)
    np.testing.assert_array_equal(*labels)


def read_text(layout, root):
    (written(layout, root) / FILE_NAME).write_text(first_description(root).text, encoding="utf-8")
    return read_description(root / FILE_NAME)


def test_nothing_that_is_there_is_replaced(tmp_path, capsys):
    root = written(sub_folders, tmp_path / "one")
    (root / FILE_NAME).write_text("mine")
    assert prepare_data.main([str(root), "--init"]) == 2
    assert "is there already; edit it" in capsys.readouterr().err
    assert (root / FILE_NAME).read_text() == "mine"
    other = written(one_folder_of_one_ending, tmp_path / "two")
    (other / "val.txt").write_text("mine")
    assert prepare_data.main([str(other), "--init"]) == 2
    assert "val.txt is there already" in capsys.readouterr().err and not (other / FILE_NAME).exists()


def test_pictures_without_labels_and_folders_without_pictures_are_told(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert prepare_data.main([str(tmp_path / "empty"), "--init"]) == 2
    assert "got no picture in it, wanted files such as images/NAME.jpg" in capsys.readouterr().err
    for i in range(3):
        save(tmp_path / f"bare/images/{i}.jpg", picture(i))
    assert prepare_data.main([str(tmp_path / "bare"), "--init"]) == 2
    assert "got 3 images like images/{}.jpg and no labels of the same names" in capsys.readouterr().err
    assert prepare_data.main([str(tmp_path / "nowhere"), "--init"]) == 2
    assert prepare_data.main([str(tmp_path / "bare")]) == 2
    assert "got no dataset.yaml in it; write one, which --init begins" in capsys.readouterr().err


def test_what_cannot_be_told_is_a_note_and_is_left_out(tmp_path, caplog):
    root = written(sub_folders, tmp_path / "folder")
    for i in range(COUNT):
        save(root / f"shaded/{split_of(i)}/p{i}.png", np.random.default_rng(i).integers(0, 256, SHAPE).astype(np.uint8))
        save(root / f"coloured/{split_of(i)}/p{i}.png", picture(i))
    for i in range(2):
        save(root / f"few/{split_of(i)}/p{i}.png", ids(i))
    first = first_description(root)
    notes = "\n".join(first.notes)
    assert "shaded/{}.png: left out, grey pictures of many values" in notes
    assert "coloured/{}.png: left out, pictures of many colours" in notes
    assert "few/{}.png: only 2 of 10 images have one; left out" in notes


@pytest.mark.parametrize(
    ("pattern", "name", "path"),
    [
        ("images/{}.jpg", "a/b c", "images/a/b c.jpg"),
        ("{split}/images/{}.jpg", "train/a/b", "train/images/a/b.jpg"),
        ("depth/{stem}.npy", "train/a", "depth/a.npy"),
        ("{split}annot/{stem}.png", "val/x/{}", "valannot/{}.png"),
    ],
)
def test_a_pattern_and_a_name_are_a_path(pattern, name, path):
    assert expand(pattern, name) == path


@pytest.mark.parametrize(("turned", "how"), [(True, "upright"), (False, "stored")])
def test_sizes_show_how_labels_lie_on_turned_photographs(tmp_path, turned, how):
    tags = Image.Exif()
    tags[0x0112] = 6
    for i in range(5):
        save(tmp_path / f"masks/{i}.png", (disc(i).T if turned else disc(i)).astype(np.uint8))
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(picture(i)).save(tmp_path / f"images/{i}.jpg", exif=tags)
    first = first_description(tmp_path)
    assert f"orientation: {how}" in first.text and any("as the sizes of labels show" in note for note in first.notes)
    (tmp_path / FILE_NAME).write_text(first.text)
    description = read_description(tmp_path / FILE_NAME)
    dataset = described_reader(description)(tmp_path, "train", tuple(described(description).tasks.values()))
    np.testing.assert_array_equal(dataset[0].labels["masks"], disc(0).T if turned else disc(0))
