"""A packed data set gives the samples of the folder that it was packed from, bit for bit; damage is told."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from ase_dist.data.dataset import data_fingerprint
from ase_dist.data.loader import build_eval_loader, build_train_loader, open_dataset
from ase_dist.data.nyud import NYUD
from ase_dist.data.packed.dataset import PackedDataset
from ase_dist.data.packed.layout import is_packed
from ase_dist.data.pascal_context import PascalContext
from ase_dist.data.transforms import Transform
from ase_dist.errors import UserError
from ase_dist.read_config import build_settings
from ase_dist.tasks import select_tasks

pytestmark = pytest.mark.single_gpu

ALL = select_tasks("pascal_context")
MODES = ("pixels", "files")
TRAIN = 5


@pytest.fixture
def folder(pascal):
    """Images of several sizes and kinds: grey, without people, with a label of another size."""
    for i in range(TRAIN):
        pascal.add(f"train_{i}", shape=(12 + 3 * (i % 2), 16))
    for i in range(2):
        pascal.add(f"val_{i}", split="val", shape=(18, 12 + 4 * i))
    Image.fromarray(np.full((12, 16), 99, np.uint8)).save(pascal.path("JPEGImages/train_0.jpg"))
    pascal.parts("train_1", [])
    pascal.saliency("train_2", np.arange(48).reshape(6, 8) * 5)
    return pascal.root


def assert_same_records(one, other):
    assert (one.index, one.name) == (other.index, other.name)
    assert list(one.labels) == list(other.labels)
    pairs = [(one.image, other.image), *((label, other.labels[task]) for task, label in one.labels.items())]
    for a, b in pairs:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a, b)


def assert_same_samples(one, other):
    assert (one.index, one.name, list(one.labels)) == (other.index, other.name, list(other.labels))
    for a, b in [(one.image, other.image), *((label, other.labels[task]) for task, label in one.labels.items())]:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# --- equality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", MODES)
def test_every_field_of_every_sample_is_the_folders(folder, pack, pictures):
    place = pack(folder, pictures=pictures)
    assert is_packed(place) and not is_packed(folder)
    transform = Transform(16, tasks=ALL, augmentation="astmt")
    for split in ("train", "val"):
        plain = PascalContext(folder, split, ALL)
        packed = PackedDataset(place, split, ALL, data="pascal_context")
        assert len(packed) == len(plain)
        assert data_fingerprint(packed) == data_fingerprint(plain)
        for i in range(len(plain)):
            assert_same_records(packed[i], plain[i])
            for epoch in range(3):
                a, b = (transform.train_sample(data[i], seed=1, epoch=epoch) for data in (packed, plain))
                assert_same_samples(a, b)
            assert_same_samples(transform.eval_sample(packed[i]), transform.eval_sample(plain[i]))


def test_nyud_with_its_depth(nyud, pack):
    rng = np.random.default_rng(0)
    nyud.add(
        "7",
        semseg=rng.integers(0, 41, (9, 11)),
        depth=rng.uniform(0.5, 9, (9, 11)),
        normals=rng.integers(0, 256, (9, 11, 3)),
        edge=rng.integers(0, 2, (9, 11)),
    )
    tasks = select_tasks("nyud")
    packed = PackedDataset(pack(nyud.root, data="nyud"), "val", tasks, data="nyud")
    assert_same_records(packed[0], NYUD(nyud.root, "val", tasks)[0])


def test_fewer_tasks_in_another_order_and_the_first_images(folder, pack):
    some = select_tasks("pascal_context", ("normals", "semseg"))
    packed = PackedDataset(pack(folder), "train", some, data="pascal_context", limit=2)
    assert len(packed) == 2
    assert_same_records(packed[1], PascalContext(folder, "train", some)[1])
    assert list(packed[1].labels) == ["normals", "semseg"]


def settings(root, **data):
    tree = {"seed": 3, "data": {"name": "pascal_context", "root": str(root), "size": 16, **data}}
    return build_settings({**tree, "train": {"batch_size": 2}})


@pytest.mark.parametrize(("build", "workers"), [(build_train_loader, 1), (build_eval_loader, 0)])
def test_training_and_evaluation_read_it_by_data_root(folder, pack, build, workers):
    roots = {folder: 0, pack(folder): workers}
    plain, packed = (build(settings(root, workers=n), ALL, rank=0, world_size=1) for root, n in roots.items())
    for _, a, b in zip(range(4), plain, packed, strict=False):
        assert a.names == b.names
        assert torch.equal(a.images, b.images)
        for task in a.labels:
            assert all(torch.equal(x, y) for x, y in zip(a.labels[task], b.labels[task], strict=True))
    plain.close()
    packed.close()


def test_records_cannot_be_written_to_and_reading_writes_nothing(folder, pack):
    place = pack(folder)
    before = {path: path.read_bytes() for path in place.iterdir()}
    packed = PackedDataset(place, "train", ALL, data="pascal_context", cache_in_memory=True)
    record = packed[0]
    assert packed[0] is record
    with pytest.raises(ValueError, match="read-only"):
        record.image[0, 0] = 1
    assert {path: path.read_bytes() for path in place.iterdir()} == before


def test_it_travels_to_other_processes_without_its_maps(folder, pack):
    packed = PackedDataset(pack(folder), "train", ALL, data="pascal_context")
    record = packed[1]
    assert_same_records(pickle.loads(pickle.dumps(packed))[1], record)


# --- what may be wrong -----------------------------------------------------------------------------------------------


def open_packed(place, *, data="pascal_context", tasks=ALL):
    return PackedDataset(place, "train", tasks, data=data)


def test_tasks_that_were_not_packed(folder, pack, one_sentence):
    place = pack(folder, tasks=("semseg", "edge"))
    with pytest.raises(ValueError, match="without labels for human_parts, saliency, normals") as raised:
        open_packed(place)
    one_sentence(raised, place, "tasks=[semseg,edge]", "launch/prepare_data.py")
    assert len(open_packed(place, tasks=select_tasks("pascal_context", ("edge",)))) == TRAIN


def test_another_data_set(folder, pack, one_sentence):
    place = pack(folder)
    with pytest.raises(ValueError, match=r"data\.root") as raised:
        open_packed(place, data="nyud", tasks=())
    one_sentence(raised, place, "PASCAL-Context", "wanted NYUD-v2", "data.name=pascal_context")
    tree = {"data": {"name": "nyud", "root": str(place), "size": 16}}
    with pytest.raises(ValueError, match="wanted NYUD-v2"):
        open_dataset(build_settings(tree), select_tasks("nyud"), split="train")


@pytest.mark.parametrize("damage", ["cut", "grown", "gone"])
def test_a_file_of_another_size(folder, pack, one_sentence, damage):
    path = pack(folder) / "train-000.bin"
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-1] if damage == "cut" else content + b"x")
    with pytest.raises(ValueError, match=r"train-000\.bin") as raised:
        open_packed(path.parent)
    one_sentence(raised, f"wanted {len(content)} bytes", "launch/prepare_data.py")


@pytest.mark.parametrize("name", ["train-000.json", "packed.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"offsets": 3}'])
def test_damaged_indices_and_manifests(folder, pack, one_sentence, name, content):
    place = pack(folder)
    (place / name).write_bytes(content)
    with pytest.raises(ValueError, match="unreadable part of a packed data set") as raised:
        open_packed(place)
    one_sentence(raised, place / name, "make it again")


def test_an_index_that_is_not_the_manifests(folder, pack):
    place = pack(folder)
    index = json.loads((place / "train-000.json").read_text())
    index["names"].reverse()
    (place / "train-000.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not what its manifest says"):
        open_packed(place)


def test_another_version(folder, pack, one_sentence):
    place = pack(folder)
    manifest = json.loads((place / "packed.json").read_text())
    (place / "packed.json").write_text(json.dumps({**manifest, "version": 999}))
    with pytest.raises(ValueError, match="999") as raised:
        open_packed(place)
    one_sentence(raised, place, "make it again with launch/prepare_data.py")


@pytest.mark.parametrize("pictures", ["pixels", "files"])
def test_a_changed_byte_anywhere_is_told_where_it_is_read(folder, pack, one_sentence, pictures):
    """Of every file of a packed data set: the manifest and an index when it is opened, an image when it is read."""
    place = pack(folder, pictures=pictures)
    rng = np.random.default_rng(0)
    for path in sorted(place.iterdir()):
        whole = path.read_bytes()
        for _ in range(6):
            damaged = bytearray(whole)
            damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            with pytest.raises(UserError) as raised:
                for split in ("train", "val"):
                    packed = PackedDataset(place, split, ALL, data="pascal_context")
                    for i in range(len(packed)):
                        packed[i]
            one_sentence(raised, place)
        path.write_bytes(whole)


def test_a_changed_byte_in_a_label_is_told_when_it_is_read(folder, pack, one_sentence):
    place = pack(folder)
    index = json.loads((place / "train-000.json").read_text())
    content = bytearray((place / "train-000.bin").read_bytes())
    for i in (1, 3):  # in the middle of the labels of semseg and edge of image 1
        start, stop = index["offsets"][1][i], index["offsets"][1][i + 1]
        content[(start + stop) // 2] ^= 255
    (place / "train-000.bin").write_bytes(content)
    packed = open_packed(place)
    assert packed[0].labels
    with pytest.raises(ValueError, match="damaged label") as raised:
        packed[1]
    one_sentence(raised, "train-000.bin", "'train_1'", "make it again")
