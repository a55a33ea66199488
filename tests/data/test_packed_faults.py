"""Packing and checking: everything that is wrong with a data set is named, and labels of other sizes too."""

import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from ase_dist.data.packed import prepare
from ase_dist.data.packed.dataset import PackedDataset
from ase_dist.data.packed.prepare import Request, check_only
from ase_dist.data.packed.sizes import stored_size
from ase_dist.tasks import select_tasks
from tests.data.conftest import struct_array
from tests.data.packing import ALL, packed_names, request, state

pytestmark = pytest.mark.single_gpu


def spoil(six):
    """Faults in five of six images, most with several; what each is told as."""
    noise = np.random.default_rng(0)
    six.path("JPEGImages/t0.jpg").write_bytes(six.path("JPEGImages/t0.jpg").read_bytes()[:300])
    six.path("sal_distill/t0.png").write_bytes(b"")
    Image.fromarray(np.full((12, 16), 300, np.uint16)).save(six.path("sal_distill/t1.png"))
    six.semseg("t1", np.full((12, 16), 77))
    savemat(six.path("pascal-context/trainval/t2.mat"), {"LabelMap": noise.integers(0, 9, (2, 3, 4))})
    savemat(six.path("human_parts/t2.mat"), {"anno": np.eye(3)})
    six.path("normals_distill/t3.png").unlink()
    six.path("JPEGImages/v0.jpg").unlink()
    six.path("pascal-context/trainval/v0.mat").unlink()
    return [
        "missing  normals_distill/t3.png",
        "missing  JPEGImages/v0.jpg",
        "missing  pascal-context/trainval/v0.mat",
        "JPEGImages/t0.jpg: got an unreadable file of 300 bytes",
        "sal_distill/t0.png: got an unreadable file of 0 bytes",
        "sal_distill/t1.png: got a 16-bit picture",
        "semseg/VOC12/t1.png: got 192 pixels with ids from 77 to 77",
        "pascal-context/trainval/t2.mat: got LabelMap of shape (2, 3, 4)",
        "human_parts/t2.mat: got a struct of another layout",
    ]


@pytest.mark.parametrize("checking", [True, False])
def test_all_faults_are_named_at_once(six, pack, tmp_path, caplog, one_sentence, checking):
    faults = spoil(six)
    before = state(six.root)
    with pytest.raises(ValueError, match="3 of the files that the lists need are missing and 6 cannot") as raised:
        check_only(request(six.root), tmp_path / "packed") if checking else pack(six.root)
    one_sentence(raised, six.root, "PASCAL_MT.tgz", "the same command goes on")
    told = [message for message in caplog.messages if message.startswith(("missing", "unusable"))]
    assert len(told) == len(faults)
    assert all(any(fault in line for line in told) for fault in faults)
    assert state(six.root) == before
    assert not (tmp_path / "packed").exists()


def test_after_a_repair_only_what_failed_is_packed(six, pack, tmp_path, counted):
    label = six.path("sal_distill/t4.png")
    whole = label.read_bytes()
    label.write_bytes(b"")
    with pytest.raises(ValueError, match="1 cannot be used"):
        pack(six.root)
    label.write_bytes(whole)
    counted.clear()
    place = pack(six.root)
    assert counted == ["train-002.bin"]
    assert packed_names(place) == [f"t{i}" for i in range(5)]
    assert not [path for path in tmp_path.iterdir() if "packing" in path.name]


def test_much_to_tell_goes_into_a_report_which_goes_away(six, pack, tmp_path, one_sentence):
    for i in range(20):
        six.add(f"more{i}")
        six.path(f"sal_distill/more{i}.png").unlink()
    six.path("human_parts/t1.mat").write_bytes(b"no")
    report = tmp_path / "packed.report.txt"
    with pytest.raises(ValueError, match="20 of the files") as raised:
        check_only(request(six.root), tmp_path / "packed")
    one_sentence(raised, report)
    lines = report.read_text().splitlines()
    assert lines[:20] == [f"missing  sal_distill/more{i}.png" for i in range(20)]
    assert lines[20].startswith("unusable") and "t1.mat" in lines[20] and len(lines) == 21
    for i in range(20):
        six.saliency(f"more{i}", np.zeros((12, 16)))
    six.parts("t1", [])
    pack(six.root)
    assert not report.exists()


def test_labels_of_another_size_are_named_and_resized(six, pack, caplog):
    six.saliency("t1", np.full((6, 8), 200))
    six.label_map("v0", np.ones((24, 16)))
    masks = np.ones((3, 4))
    six.parts("t2", [(15, masks, [("head", masks)])])
    place = pack(six.root)
    told = {message.removeprefix("resized  ") for message in caplog.messages if message.startswith("resized")}
    assert told == {
        "sal_distill/t1.png: 8 x 6 pixels, its image 16 x 12; it is resized to the image",
        "pascal-context/trainval/v0.mat: 16 x 24 pixels, its image 16 x 12; it is resized to the image",
        "human_parts/t2.mat: 4 x 3 pixels, its image 16 x 12; it is resized to the image",
    }
    record = PackedDataset(place, "train", ALL, data="pascal_context")[1]
    assert record.labels["saliency"].shape == (12, 16) and record.labels["saliency"].all()


def test_other_lists_than_the_published_need_a_word(six, tmp_path, one_sentence):
    with pytest.raises(ValueError, match="5 train and 1 val") as raised:
        prepare.prepare(Request("pascal_context", six.root), tmp_path / "packed")
    one_sentence(raised, six.root, "4998 train and 5105 val", "--subset")
    assert not (tmp_path / "packed").exists()


def test_images_in_both_lists_are_told(six, pack, caplog):
    six.path("ImageSets/Context/val.txt").write_text("v0\nt3\n")
    pack(six.root)
    assert "1 images are in both lists, such as t3" in caplog.text


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_list(six, pack, one_sentence, split):
    six.path(f"ImageSets/Context/{split}.txt").unlink()
    with pytest.raises(ValueError, match="no such list") as raised:
        pack(six.root)
    one_sentence(raised, f"{split}.txt")


def test_tasks_without_a_folder_are_left_out_by_name(six, pack, one_sentence):
    shutil.rmtree(six.root / "normals_distill")
    with pytest.raises(ValueError, match="no label for normals") as raised:
        pack(six.root)
    one_sentence(raised, "--tasks semseg,human_parts,saliency,edge")
    place = pack(six.root, tasks=("semseg", "edge"))
    assert len(PackedDataset(place, "train", select_tasks("pascal_context", ("edge",)), data="pascal_context")) == 5


def test_what_is_no_data_set(six, tmp_path, pack, one_sentence):
    (tmp_path / "notes.txt").write_text("x")
    for path, said in (
        (tmp_path / "nothing", "no such file or folder"),
        (tmp_path / "notes.txt", "a file of another kind"),
        (six.root / "JPEGImages", "no folder with ImageSets/Context"),
    ):
        with pytest.raises(ValueError, match=said) as raised:
            pack(path, out=tmp_path / "elsewhere" / "packed")
        one_sentence(raised, path)
    shutil.copytree(six.root, tmp_path / "second")
    with pytest.raises(ValueError, match="2 data sets"):
        pack(tmp_path, out=tmp_path.parent / f"{tmp_path.name}-packed")
    assert len(packed_names(pack(six.root, out=tmp_path / "elsewhere" / "packed"))) == 5


@pytest.mark.parametrize("content", [np.zeros((0, 0)), None])
def test_structs_without_a_mask_have_no_size(tmp_path, content):
    rows = struct_array(("class", "class_ind"), [("dog", 12)]) if content is None else content
    savemat(tmp_path / "a.mat", {"anno": struct_array(("imname", "objects"), [("a", rows)])})
    assert stored_size(tmp_path / "a.mat") is None


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (1, 5, 7)])
def test_sizes_of_arrays(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape))
    assert stored_size(tmp_path / "a.npy") == (5, 7)
    if shape == (5, 7):
        savemat(tmp_path / "a.mat", {"LabelMap": np.zeros(shape)})
        assert stored_size(tmp_path / "a.mat") == (5, 7)
