"""Lists of images: one line is one image, and what is not found is told with what to write. Folders that hide deep."""

import os

import numpy as np
import pytest

from ase_dist.data.folder import find_roots, read_list
from ase_dist.data.pascal_context import PascalContext
from ase_dist.errors import UserError
from ase_dist.tasks import select_tasks
from tests.data.packing import archive, command, packed_names

pytestmark = pytest.mark.single_gpu
TASKS = select_tasks("pascal_context", ("semseg", "saliency"))
LIST = "ImageSets/Context/train.txt"


@pytest.fixture
def folder(pascal):
    for name in ("a1", "a2", "living room 1", "#7", "b;c", "two  blanks", "100%", "{}", "\u00e9t\u00e9"):
        pascal.add(name, labels=("semseg", "saliency"))
    pascal.add("v", split="val", labels=("semseg", "saliency"))
    return pascal


def written(pascal, text, encoding="utf-8"):
    (pascal.root / LIST).write_bytes(text.encode(encoding))
    return PascalContext(pascal.root, "train", TASKS)


RIGHT = {
    "a line an image": ("a1\na2\n", ["a1", "a2"]),
    "no newline at the end": ("a1\na2", ["a1", "a2"]),
    "Windows' line ends": ("a1\r\nliving room 1\r\n", ["a1", "living room 1"]),
    "old line ends": ("a1\ra2\r", ["a1", "a2"]),
    "blank lines and blanks around": ("\n  a1  \n\n\ta2\t\n \n", ["a1", "a2"]),
    "byte-order mark": ("\ufeffa1\na2\n", ["a1", "a2"]),
    "byte-order mark and Windows": ("\ufeffa1\r\na2\r\n", ["a1", "a2"]),
    "names with blanks": ("living room 1\ntwo  blanks\n", ["living room 1", "two  blanks"]),
    "names of signs": ("#7\nb;c\n100%\n{}\n", ["#7", "b;c", "100%", "{}"]),
    "other letters": ("\u00e9t\u00e9\n", ["\u00e9t\u00e9"]),
}


@pytest.mark.parametrize("case", RIGHT)
def test_one_line_is_one_image(folder, case):
    text, names = RIGHT[case]
    dataset = written(folder, text)
    assert dataset.names == names
    assert [dataset[i].name for i in range(len(names))] == names


TOLD = {
    "two names": ("a2\na1 a2\n", "line 'a1 a2', .* write 'a1'"),
    "a name and a number": ("a1  1\na2 -1\n", "line 'a1  1', .* write 'a1'"),
    "a name with blanks and a number": ("living room 1 0\n", "line 'living room 1 0', .* write 'living room 1'"),
    "commas": ("a1,a2\n", "line 'a1,a2', .* write 'a1'"),
    "a semicolon": ("a1;\n", "line 'a1;', .* write 'a1'"),
    "tabs": ("a1\ta2\n", r"line 'a1\\ta2', wanted one image name"),
    "quotes": ('"a1"\n', "line '\"a1\"', .* write 'a1'"),
    "a comment": ("# train\na1\n", "line '# train', .* remove it"),
    "an ending": ("a1.jpg\n", r"line 'a1\.jpg', .* write 'a1'"),
    "an ending in capitals": ("a1.JPG\n", r"line 'a1\.JPG', .* write 'a1'"),
    "two columns with endings": ("a1.jpg a1.png\n", r"line 'a1\.jpg a1\.png', .* write 'a1'"),
    "a folder": ("JPEGImages/a1.jpg\n", "'JPEGImages/a1.jpg', wanted names without folders"),
    "a Windows folder": ("JPEGImages\\a1\n", "wanted names without folders"),
    "twice": ("a1\na2\na1\n", "got 'a1' twice"),
    "twice but for blanks": ("a1\na1 \n", "got 'a1' twice"),
    "a zero byte": ("a1\0\n", r"line 'a1\\x00'"),
    "nothing": ("\n \n", "empty list"),
    "only a byte-order mark": ("\ufeff", "empty list"),
    "another image": ("a1\nc9\n", r"3 of the files .* are missing \(JPEGImages/c9\.jpg"),
}


@pytest.mark.parametrize("case", TOLD)
def test_what_is_no_name_is_told(folder, case, one_sentence, capsys):
    """In training, and when checking before packing."""
    text, said = TOLD[case]
    with pytest.raises(UserError, match=said) as raised:
        written(folder, text)
    one_sentence(raised, "train.txt" if case != "another image" else folder.root)
    assert command(folder.root, "--subset", "--check-only", "--tasks", "semseg,saliency") == 2
    assert ("3 of the files" if case == "another image" else "train.txt: got ") in capsys.readouterr().err


def test_a_list_in_another_encoding_is_told(folder):
    with pytest.raises(UserError, match="wanted one image name a line in UTF-8"):
        written(folder, "\u00e9t\u00e9\n", encoding="latin-1")
    with pytest.raises(UserError, match="UTF-8"):
        written(folder, "a1\na2\n", encoding="utf-16")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("JPEGImages/a1.jpg", "JPEGImages/a1.JPG", "got the file 'a1.JPG' for 'a1', wanted JPEGImages/a1.jpg"),
        ("JPEGImages/a1.jpg", "JPEGImages/A1.jpg", "got the file 'A1.jpg' for 'a1'"),
        ("JPEGImages/a1.jpg", "JPEGImages/a1.jpeg", "got the file 'a1.jpeg' for 'a1'"),
        ("sal_distill/a1.png", "sal_distill/a1.PNG", "got the file 'a1.PNG' for 'a1', wanted sal_distill/a1.png"),
        ("semseg/VOC12/a1.png", "semseg/VOC12/a1.npy", "got the file 'a1.npy' for 'a1'"),
        (
            "JPEGImages/\u00e9t\u00e9.jpg",
            "JPEGImages/e\u0301te\u0301.jpg",
            "got the file .* wanted JPEGImages/\u00e9t\u00e9",
        ),
    ],
)
def test_a_file_with_another_spelling_is_told(folder, before, after, said, one_sentence, capsys):
    (folder.root / before).rename(folder.root / after)
    with pytest.raises(UserError, match=said) as raised:
        written(folder, "a1\n\u00e9t\u00e9\n")
    one_sentence(raised, folder.root, "convert or rename it")
    assert command(folder.root, "--subset", "--check-only", "--tasks", "semseg,saliency") == 2
    assert "convert or rename it" in capsys.readouterr().err


def test_names_with_blanks_are_packed(folder, pack):
    written(folder, "living room 1\n#7\n")
    assert packed_names(pack(folder.root, tasks=("semseg",)), TASKS[:1]) == ["living room 1", "#7"]


# --- where the data set is -------------------------------------------------------------------------------------------


def test_an_archive_with_folders_in_folders_is_packed(six, pack, tmp_path):
    deep = tmp_path / "deep/data/sets/pascal"
    deep.parent.mkdir(parents=True)
    six.root.rename(deep)
    assert len(packed_names(pack(archive(tmp_path / "deep", tmp_path / "deep.tgz")))) == 5
    assert len(packed_names(pack(tmp_path / "deep", out=tmp_path / "again"))) == 5


def test_a_root_a_few_folders_up_is_told_where_to_go(six, tmp_path, one_sentence):
    six.root.rename(tmp_path / "up")
    (tmp_path / "above/mt").mkdir(parents=True)
    (tmp_path / "up").rename(tmp_path / "above/mt/PASCAL_MT")
    with pytest.raises(UserError, match="got no folder ImageSets/Context") as raised:
        PascalContext(tmp_path / "above", "train", TASKS)
    one_sentence(raised, f"give data.root={tmp_path / 'above/mt/PASCAL_MT'}")


def test_several_data_sets_on_a_level_are_told_and_shallower_ones_win(tmp_path):
    for name in ("a/b/one", "a/c/two", "a/b/one/ImageSets/Context/x/three"):
        (tmp_path / name / "ImageSets/Context").mkdir(parents=True)
    assert find_roots(tmp_path, "ImageSets/Context") == [tmp_path / "a/b/one", tmp_path / "a/c/two"]
    assert find_roots(tmp_path / "a/c/two", "ImageSets/Context") == [tmp_path / "a/c/two"]


@pytest.mark.timeout(60)
def test_links_to_the_folder_itself_end(six, tmp_path, pack, one_sentence):
    """Two links double the paths on each level: 2 to the power of the depth."""
    for name in ("self", "again"):
        (six.root / name).symlink_to(six.root)
        (six.root / "JPEGImages" / name).symlink_to(six.root / "JPEGImages")
    assert len(packed_names(pack(six.root))) == 5
    loops = tmp_path / "loops"
    (loops / "z").mkdir(parents=True)
    for name, target in (("circle", "circle"), ("one", "two"), ("two", "one"), ("nowhere", "absent")):
        (loops / name).symlink_to(loops / target)
    for name in ("self", "again", "more"):
        (loops / name).symlink_to(loops)
    assert find_roots(loops, "ImageSets/Context") == []
    with pytest.raises(UserError, match="no folder with ImageSets/Context") as raised:
        pack(loops, out=tmp_path / "other")
    one_sentence(raised, loops)


def test_a_folder_that_may_not_be_read_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b/c/lists").mkdir(parents=True)
    scan = os.scandir

    def scandir(path):
        if path == tmp_path / "a":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert find_roots(tmp_path, "lists") == [tmp_path / "b/c"]


def test_the_list_of_another_split_is_named(folder, one_sentence):
    (folder.root / LIST).unlink()
    with pytest.raises(UserError, match="no such list, found") as raised:
        read_list(folder.root, "ImageSets/Context", "train")
    one_sentence(raised, "val")
    assert np.array_equal(read_list(folder.root, "ImageSets/Context", "val"), ["v"])
