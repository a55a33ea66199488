"""PASCAL_MT opened and read; each thing that may be missing, told by name."""

import numpy as np
import pytest

from ase_dist.data.dataset import data_fingerprint
from ase_dist.data.pascal_context import PascalContext
from ase_dist.tasks import select_tasks

pytestmark = pytest.mark.single_gpu

ALL = select_tasks("pascal_context")


def some(*names):
    return select_tasks("pascal_context", names)


def tree(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


@pytest.fixture
def three(pascal):
    for name in ("2008_000002", "2008_000008", "2008_000003"):
        pascal.add(name)
    return pascal


def test_records_have_every_task_at_the_images_size(three):
    three.semseg("2008_000003", np.full((6, 8), 7))
    dataset = PascalContext(three.root, "train", ALL)
    assert [record.name for record in dataset] == ["2008_000002", "2008_000008", "2008_000003"]
    record = dataset[2]
    assert (record.index, record.image.shape, record.image.dtype) == (2, (12, 16, 3), np.uint8)
    shapes = {task: label.shape for task, label in record.labels.items()}
    flat = dict.fromkeys(("semseg", "human_parts", "saliency", "edge"), (12, 16))
    assert shapes == {**flat, "normals": (12, 16, 3)}
    np.testing.assert_array_equal(record.labels["semseg"], np.full((12, 16), 7))


def test_only_the_tasks_asked_for_in_their_order(three):
    dataset = PascalContext(three.root, "train", some("saliency", "semseg"))
    assert list(dataset[0].labels) == ["saliency", "semseg"]


def test_semseg_prefers_voc12_and_falls_back(three):
    three.semseg("2008_000002", np.full((12, 16), 9), folder="pascal-context")
    three.semseg("2008_000008", np.full((12, 16), 9), folder="pascal-context")
    (three.root / "semseg/VOC12/2008_000008.png").unlink()
    dataset = PascalContext(three.root, "train", some("semseg"))
    assert not (dataset[0].labels["semseg"] == 9).all()
    assert (dataset[1].labels["semseg"] == 9).all()


def test_limit_looks_at_the_first_images_only(three):
    (three.root / "JPEGImages/2008_000003.jpg").unlink()
    assert len(PascalContext(three.root, "train", ALL, limit=2)) == 2
    assert len(PascalContext(three.root, "train", ALL, limit=2)) < len(three.lists["train"])


def test_cache_keeps_the_record(three):
    assert PascalContext(three.root, "train", ALL)[0].image.any()
    cached = PascalContext(three.root, "train", ALL, cache_in_memory=True)
    assert cached[1] is cached[1]
    plain = PascalContext(three.root, "train", ALL)
    assert plain[1] is not plain[1]
    np.testing.assert_array_equal(plain[1].labels["edge"], cached[1].labels["edge"])


def test_reading_writes_nothing_into_the_folder(three):
    three.path("ImageSets/Parts/train.txt").write_text("{a stale cache of other code")
    before = tree(three.root)
    for record in PascalContext(three.root, "train", ALL):
        assert record.labels
    assert tree(three.root) == before


# --- what may be missing ---------------------------------------------------------------------------------------------


def test_absent_folders_name_the_tasks_to_leave_out(pascal, one_sentence):
    pascal.add("a", labels=("semseg", "saliency", "edge"))
    with pytest.raises(ValueError, match="has no label for human_parts, normals") as raised:
        PascalContext(pascal.root, "train", ALL)
    one_sentence(
        raised, pascal.root, "no folder human_parts, no folder normals_distill", "tasks=[semseg,saliency,edge]"
    )
    assert len(PascalContext(pascal.root, "train", some("semseg", "saliency", "edge"))) == 1


def test_nothing_left_to_train(pascal, one_sentence):
    pascal.add("a", labels=("semseg",))
    with pytest.raises(ValueError, match="has no label for saliency") as raised:
        PascalContext(pascal.root, "train", some("saliency"))
    one_sentence(raised, "name other tasks")


def test_missing_files_are_counted_and_the_first_named(three, one_sentence):
    three.add("2008_000009")
    for name in three.lists["train"]:
        (three.root / f"sal_distill/{name}.png").unlink()
    (three.root / "pascal-context/trainval/2008_000008.mat").unlink()
    with pytest.raises(ValueError, match="5 of the files") as raised:
        PascalContext(three.root, "train", ALL)
    one_sentence(raised, "sal_distill/2008_000002.png", "...", "leave saliency, edge, normals out")
    one_sentence(raised, "tasks=[semseg,human_parts]")
    assert len(PascalContext(three.root, "train", some("semseg", "human_parts"))) == 4


def test_missing_image(three, one_sentence):
    (three.root / "JPEGImages/2008_000008.jpg").unlink()
    with pytest.raises(ValueError, match=r"JPEGImages/2008_000008\.jpg") as raised:
        PascalContext(three.root, "train", ALL)
    one_sentence(raised, three.root, "1 of the files", "unpack")
    assert "leave" not in str(raised.value)


@pytest.mark.parametrize("root", [None, "/no/such/folder"])
def test_missing_root(root, one_sentence):
    with pytest.raises(ValueError, match=r"data\.root") as raised:
        PascalContext(root, "train", ALL)
    one_sentence(raised, root, "wanted the folder of PASCAL-Context")


def test_another_folder_altogether(three, one_sentence):
    with pytest.raises(ValueError, match="no such list") as raised:
        PascalContext(three.root / "JPEGImages", "train", ALL)
    one_sentence(raised, "ImageSets/Context/train.txt", "none at all")
    with pytest.raises(ValueError, match="got no folder ImageSets/Context") as raised:
        PascalContext(three.root.parent, "train", ALL)
    one_sentence(raised, f"give data.root={three.root}")
    with pytest.raises(ValueError, match=r"val\.txt: no such list, found \['train'\]"):
        PascalContext(three.root, "val", ALL)


def test_list_without_images_folder(pascal, one_sentence):
    pascal.path("ImageSets/Context/train.txt").write_text("a\n")
    with pytest.raises(ValueError, match="no folder JPEGImages") as raised:
        PascalContext(pascal.root, "train", ALL)
    one_sentence(raised, pascal.root)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "empty list"), ("a\nb\na\n", "'a' twice"), ("a\n../b\n", r"'\.\./b'"), ("a\\b\n", "without folders")],
)
def test_damaged_list(three, one_sentence, text, said):
    three.path("ImageSets/Context/train.txt").write_text(text)
    with pytest.raises(ValueError, match=said) as raised:
        PascalContext(three.root, "train", ALL)
    one_sentence(raised, "ImageSets/Context/train.txt")


def test_blank_lines_and_windows_line_ends(three):
    three.path("ImageSets/Context/train.txt").write_bytes(b"2008_000002\r\n\r\n2008_000008\r\n")
    assert PascalContext(three.root, "train", ALL).names == ["2008_000002", "2008_000008"]


# --- the fingerprint -------------------------------------------------------------------------------------------------


def test_fingerprint_is_of_content_not_of_place(three, tmp_path):
    elsewhere = three.root.rename(tmp_path / "moved")
    first = PascalContext(elsewhere, "train", ALL)
    assert data_fingerprint(first) == data_fingerprint(
        PascalContext(str(elsewhere), "train", ALL, cache_in_memory=True)
    )
    others = [
        PascalContext(elsewhere, "train", ALL, limit=2),
        PascalContext(elsewhere, "train", ALL[:4]),
    ]
    (elsewhere / "ImageSets/Context/train.txt").write_text("2008_000008\n2008_000002\n2008_000003\n")
    others.append(PascalContext(elsewhere, "train", ALL))
    assert len({data_fingerprint(dataset) for dataset in (first, *others)}) == 4


# --- real photographs ------------------------------------------------------------------------------------------------


@pytest.mark.shared_data
def test_photographs(photographs):
    with pytest.raises(ValueError, match=r"tasks=\[semseg,human_parts,saliency,edge\]"):
        PascalContext(photographs, "val", ALL)
    dataset = PascalContext(photographs, "val", some("semseg", "human_parts", "saliency", "edge"))
    assert len(dataset) == 110
    for record in (dataset[i] for i in range(0, 110, 11)):
        labels = record.labels
        assert max(record.image.shape) == 320
        assert {label.shape for label in labels.values()} == {record.image.shape[:2]}
        assert labels["human_parts"].max() in (*range(1, 7), 255)
        assert set(np.unique(labels["saliency"])) == {0, 1}
        assert 0.005 < labels["edge"].mean() < 0.1
        person = labels["saliency"] == 1
        assert (labels["semseg"][person] > 0).mean() > (labels["semseg"][~person] > 0).mean()
