"""Images that lack the label files of some tasks: what is accepted, counted, left out and refused, in every layout."""

import logging
import pickle

import numpy as np
import pytest
import torch

from ase_dist.data.batch import Record
from ase_dist.data.labels import ignored_label
from ase_dist.data.loader import build_eval_loader, build_train_loader, data_fingerprint, first_images, open_dataset
from ase_dist.data.nyud import NYUD
from ase_dist.data.packed.dataset import PackedDataset
from ase_dist.data.packed.layout import read_manifest
from ase_dist.data.pascal_context import PascalContext
from ase_dist.data.transforms import Transform
from ase_dist.errors import UserError
from ase_dist.read_config import build_settings
from ase_dist.tasks import select_tasks
from tests.data.own_folders import ids, metres, picture, save
from tests.data.packing import command, contents, request

pytestmark = pytest.mark.single_gpu

ALL = select_tasks("pascal_context")
NYUD_ALL = select_tasks("nyud")
SIZE = 16
LABELS = {  # of the images of ``some``
    "t0": ("semseg", "human_parts", "saliency", "edge", "normals"),
    "t1": ("semseg",),
    "t2": ("edge", "saliency"),
    "t3": ("human_parts", "normals"),  # and, as normals need the label map, edges
    "v0": ("semseg", "edge"),
    "v1": ("saliency",),
}
COUNTS = {"semseg": 2, "human_parts": 2, "saliency": 2, "edge": 3, "normals": 2}


@pytest.fixture
def some(pascal):
    """Four images to train on and two to validate, most without some labels."""
    for name, labels in LABELS.items():
        pascal.add(name, split="train" if name[0] == "t" else "val", labels=labels)
    for folder in ("human_parts", "normals_distill", "sal_distill"):
        assert (pascal.root / folder).is_dir()
    return pascal


def settings_of(root, **data):
    return build_settings(
        {
            "seed": 3,
            "data": {"name": "pascal_context", "root": str(root), "size": SIZE, "partial": True, **data},
            "train": {"batch_size": 2},
        }
    )


def records(dataset):
    return [dataset[i] for i in range(len(dataset))]


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", (*ALL, NYUD_ALL[1]), ids=lambda task: task.name)
@pytest.mark.parametrize("augmentation", ("none", "eigen", "atrc"))
def test_an_absent_label_is_one_that_is_ignored_everywhere_bit_for_bit(task, augmentation):
    transform = Transform(SIZE, tasks=(task,), augmentation=augmentation)
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for index in range(8):  # warps of their own
        absent = transform.train_sample(Record(index, "a", image, {}), seed=1, epoch=2)
        ignored = Record(index, "a", image, {task.name: ignored_label(task.kind, (20, 30))})
        wanted = transform.train_sample(ignored, seed=1, epoch=2)
        assert torch.equal(absent.image, wanted.image)
        one, other = absent.labels[task.name], wanted.labels[task.name]
        assert one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()  # -0.0 is not 0.0
    assert transform.eval_sample(Record(0, "a", image, {})).labels == {}


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_pascal_counts_and_reads_what_is_there(some):
    dataset = open_dataset(settings_of(some.root), ALL, split="train")
    assert dataset.labelled_images() == COUNTS
    found = {record.name: set(record.labels) for record in records(dataset)}
    assert found == {
        name: set(LABELS[name]) | ({"edge"} if name == "t3" else set()) for name in ("t0", "t1", "t2", "t3")
    }
    whole = PascalContext(some.root, "train", ALL, names=["t0"])[0]
    for task, label in records(dataset)[0].labels.items():
        np.testing.assert_array_equal(label, whole.labels[task])


def test_nyud_and_described_folders(nyud, tmp_path):
    ones = np.ones((2, 3), np.uint8)
    for name in ("a", "b"):
        nyud.add(name, semseg=ones, depth=ones, normals=np.full((2, 3, 3), 200), edge=np.eye(2, 3) * 255)
    nyud.path("gt_sets/train.txt").write_text("a\nb\n")
    (nyud.root / "depth/b.npy").unlink()
    dataset = NYUD(nyud.root, "train", NYUD_ALL, partial=True)
    assert dataset.labelled_images() == {"semseg": 2, "depth": 1, "normals": 2, "edge": 2}
    assert [sorted(record.labels) for record in records(dataset)] == [
        ["depth", "edge", "normals", "semseg"],
        ["edge", "normals", "semseg"],
    ]

    root = tmp_path / "own"
    for i in range(6):
        save(root / f"images/{i}.png", picture(i))
        if i % 2:
            save(root / f"labels/{i}.png", ids(i))
        if i < 5:
            save(root / f"depth/{i}.npy", metres(i))
    description = {
        "name": "own",
        "images": "images/{}.png",
        "splits": {"train": "images", "val_every": 3},
        "tasks": {
            "things": {"kind": "classes", "files": "labels/{}.png", "classes": list("abcde")},
            "far": {"kind": "depth", "files": "depth/{}.npy", "unit": "m"},
        },
    }
    settings = build_settings({"data": {"root": str(root), "description": description, "partial": True}})
    train, val = (open_dataset(settings, settings.chosen_tasks(), split=split) for split in ("train", "val"))
    assert (train.names, train.labelled_images()) == (["0", "1", "3", "4"], {"things": 2, "far": 4})
    assert (val.names, val.labelled_images()) == (["2", "5"], {"things": 1, "far": 1})
    assert pickle.loads(pickle.dumps(train))[0].labels.keys() == {"far"}


def test_without_the_setting_it_is_refused_and_the_setting_is_named(some):
    with pytest.raises(
        UserError, match=r"of the files that the list needs are missing .*accept that with data\.partial=true"
    ):
        open_dataset(settings_of(some.root, partial=False), ALL, split="train")


def test_images_without_any_label_are_named(some):
    some.add("bare", labels=())
    some.add("empty", labels=())
    with pytest.raises(UserError, match=r"2 of its images have no label of any task \(bare, empty\)"):
        open_dataset(settings_of(some.root), ALL, split="train")


def test_a_run_of_fewer_tasks_leaves_images_of_other_tasks_out(some, caplog):
    caplog.set_level(logging.INFO)
    dataset = open_dataset(settings_of(some.root), select_tasks("pascal_context", ["semseg"]), split="train")
    assert dataset.names == ["t0", "t1"] and "2 images have labels of other tasks only and are left out" in caplog.text


def test_a_task_without_any_label_is_refused_in_training_and_told_in_validation(some, caplog):
    dataset = open_dataset(settings_of(some.root), ALL, split="val")
    assert dataset.labelled_images() == {"semseg": 1, "human_parts": 0, "saliency": 1, "edge": 1, "normals": 0}
    assert "no image has a label of human_parts, normals, which is not scored" in caplog.text
    for name in ("t0", "t3"):
        (some.root / f"human_parts/{name}.mat").unlink()
    with pytest.raises(UserError, match=r"no image has a label of human_parts; leave human_parts out with tasks="):
        open_dataset(settings_of(some.root), ALL, split="train")


def test_a_label_that_is_only_written_otherwise_is_told(some, caplog):
    (some.root / "semseg/VOC12/t1.png").rename(some.root / "semseg/VOC12/T1.PNG")
    some.saliency("t1", np.zeros((12, 16)))
    open_dataset(settings_of(some.root), ALL, split="train")
    assert "1 files are no labels because of how their names are written (semseg/VOC12/T1.PNG)" in caplog.text


def test_the_labels_that_are_there_are_part_of_what_ranks_compare(some):
    before = data_fingerprint(open_dataset(settings_of(some.root), ALL, split="train"))
    some.saliency("t1", np.zeros((12, 16)))
    assert data_fingerprint(open_dataset(settings_of(some.root), ALL, split="train")) != before


# --- packed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", (False, True))
def test_packed_labels_are_absent_where_the_folder_s_are(some, pack, small_shards, cached):
    place = pack(some.root, partial=True)
    assert read_manifest(place).partial
    for split in ("train", "val"):
        folder, packed = (
            open_dataset(settings_of(root, cache_in_memory=cached), ALL, split=split) for root in (some.root, place)
        )
        assert packed.absent == folder.absent and data_fingerprint(packed) == data_fingerprint(folder)
        for _ in range(2):
            for one, other in zip(records(folder), records(packed), strict=True):
                assert (one.name, list(one.labels)) == (other.name, list(other.labels))
                for task, label in one.labels.items():
                    np.testing.assert_array_equal(label, other.labels[task])
    semseg = open_dataset(settings_of(place), select_tasks("pascal_context", ["semseg"]), split="train")
    assert [record.name for record in records(semseg)] == ["t0", "t1"]
    with pytest.raises(UserError, match=r"3 images were packed without a label of semseg .*data\.partial=true"):
        PackedDataset(place, "train", ALL, data="pascal_context")


def test_packing_again_without_the_option_takes_nothing_that_was_packed_with_it(some, pack, tmp_path):
    before = contents(pack(some.root, partial=True))
    with pytest.raises(UserError, match=r"accept images without some labels with --partial"):
        pack(some.root)
    assert contents(tmp_path / "packed") == before
    some.lists = {"train": [], "val": []}
    some.add("t0")
    some.add("v9", split="val")
    assert not read_manifest(pack(some.root)).partial


def test_the_check_says_how_many_have_labels_and_names_those_without_any(some, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    arguments = (some.root, "--check-only", "--subset", "--workers", "1", "--out", tmp_path / "out")
    assert command(*arguments) == 2
    assert command(*arguments, "--partial") == 0
    assert "train: of 4 images have a label: semseg 2, human_parts 2, saliency 2, edge 3, normals 2" in caplog.text
    assert "val: of 2 images have a label: semseg 1, human_parts 0, saliency 1, edge 1, normals 0" in caplog.text
    some.add("bare", labels=())
    assert command(*arguments, "--partial") == 2
    assert "missing  bare: every label of this image" in caplog.text
    some.lists["train"].remove("bare")
    some.add("odd", labels=("semseg", "edge"))
    some.path("semseg/VOC12/odd.png").write_bytes(b"no picture")
    assert command(*arguments, "--partial") == 2
    assert "semseg/VOC12/odd.png" in caplog.text.rsplit("unusable", 1)[1]


def test_a_request_is_whole_by_default(some):
    assert not request(some.root).partial


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", (0, 1))
def test_batches_have_ignored_labels_and_evaluation_has_none(some, workers):
    settings = settings_of(some.root, workers=workers)
    loader = build_train_loader(settings, ALL, rank=0, world_size=1)
    for batch in (next(loader) for _ in range(3)):
        for i, name in enumerate(batch.names):
            for task in ALL:
                label = batch.labels[task.name][i]
                ignored = 0 if task.kind == "normals" else 255
                is_there = task.name in LABELS[name] or (name, task.name) == ("t3", "edge")
                assert bool((label != ignored).any()) is is_there, (name, task.name)
    loader.close()
    evaluation = build_eval_loader(settings, ALL, rank=0, world_size=1)
    (batch,) = list(evaluation)
    evaluation.close()
    assert [label is None for label in batch.labels["semseg"]] == [False, True]
    assert [label is None for label in batch.labels["normals"]] == [True, True]
    moved = batch.to("cpu")
    assert moved.labels["semseg"][1] is None and torch.equal(moved.labels["semseg"][0], batch.labels["semseg"][0])


def test_the_trivial_predictors_see_the_first_images_of_every_task(some):
    settings = settings_of(some.root)
    loader = build_train_loader(settings, ALL, rank=0, world_size=1)
    chosen = first_images(loader, settings, limit=2, rank=0, world_size=1)
    assert [name for batch in chosen for name in batch.names] == ["t0", "t1", "t2", "t3"]
    loader.close()
    (some.root / "ImageSets/Context/train.txt").write_text("t1\nt2\nt3\n")
    loader = build_train_loader(settings, ALL, rank=0, world_size=1)
    shares = [first_images(loader, settings, limit=1, rank=rank, world_size=2) for rank in (0, 1)]
    assert sorted(name for share in shares for batch in share for name in batch.names) == ["t1", "t2", "t3"]
    loader.close()
