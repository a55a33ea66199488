"""NYUv2-13 and Cityscapes-7 in the folders of LibMTL and MTAN: read as their own code reads them, refused where odd."""

import shutil

import numpy as np
import pytest
import torch

from ase_dist.data.augmentation import Warp
from ase_dist.data.labels import normals_from_codes
from ase_dist.data.libmtl import Cityscapes, NYUv2
from ase_dist.data.loader import build_eval_loader
from ase_dist.data.packed.dataset import PackedDataset
from ase_dist.data.packed.prepare import Request, check_only
from ase_dist.data.transforms import Transform
from ase_dist.read_config import build_settings
from ase_dist.tasks import DATA_SETS, select_tasks
from tests.data.libmtl_folders import CLASSES, arrays, write_libmtl

pytestmark = pytest.mark.single_gpu
READERS = {"nyuv2_13": NYUv2, "cityscapes": Cityscapes}


@pytest.fixture(params=READERS)
def data(request):
    return request.param


def open_split(root, data, split="train", **options):
    return READERS[data](root, split, select_tasks(data), **options)


def test_arrays_come_back_as_labels(tmp_path, data):
    dataset = open_split(write_libmtl(tmp_path, data), data)
    assert dataset.names == ["train/0", "train/1", "train/2", "train/3"]
    for number in range(4):
        record, stored = dataset[number], arrays(data, number)
        np.testing.assert_allclose(record.image / 255, stored["image"], atol=0.5 / 255 + 1e-6)
        np.testing.assert_array_equal(
            record.labels["semseg"], [[255 if v == -1 else int(v) for v in row] for row in stored["label"]]
        )
        np.testing.assert_array_equal(record.labels["depth"], stored["depth"][..., 0])
        if "normal" in stored:
            found = normals_from_codes(record.labels["normals"]).transpose(1, 2, 0)
            is_none = ~stored["normal"].any(-1)
            assert is_none.any() and not found[is_none].any()
            cosine = (found * stored["normal"]).sum(-1)[~is_none].clip(-1, 1)
            assert np.degrees(np.arccos(cosine)).max() < 0.35
    assert record.labels.keys() == DATA_SETS[data].tasks.keys()
    assert len(DATA_SETS[data].tasks["semseg"].class_names) == CLASSES[data]


def test_images_are_in_the_order_of_their_numbers(tmp_path):
    dataset = open_split(write_libmtl(tmp_path, "cityscapes", train=12), "cityscapes", limit=11)
    assert dataset.names == [f"train/{number}" for number in range(11)]
    assert open_split(tmp_path, "cityscapes", "val").names == ["val/0", "val/1"]


def test_bytes_are_a_picture_too(tmp_path):
    write_libmtl(tmp_path, "cityscapes", train=1)
    picture = (arrays("cityscapes", 0)["image"] * 255).round().astype(np.uint8)
    np.save(tmp_path / "train/image/0.npy", picture)
    np.testing.assert_array_equal(open_split(tmp_path, "cityscapes")[0].image, picture)


@pytest.mark.parametrize("pictures", ["pixels", "files"])
def test_packed_they_are_the_same(tmp_path, data, pictures, pack):
    root = write_libmtl(tmp_path / "raw", data)
    place = pack(root, data=data, pictures=pictures)
    for split in ("train", "val"):
        packed = PackedDataset(place, split, select_tasks(data), data=data)
        plain = open_split(root, data, split)
        assert packed.names == plain.names
        for i in range(len(plain)):
            one, other = packed[i], plain[i]
            np.testing.assert_array_equal(one.image, other.image)
            for task, label in other.labels.items():
                np.testing.assert_array_equal(one.labels[task], label)


def test_the_check_counts_them_and_wants_the_published_numbers(tmp_path, data, one_sentence):
    root = write_libmtl(tmp_path / "data", data)
    assert check_only(Request(data, tmp_path / "data", subset=True, workers=1), tmp_path / "packed") == 6
    with pytest.raises(ValueError, match="add --subset") as raised:
        check_only(Request(data, root, workers=1), tmp_path / "packed")
    one_sentence(raised, *(f"{count}" for count in READERS[data].counts.values()))


def broken(path, array, word):
    return pytest.param(path, array, word, id=f"{path}: {word}")


@pytest.mark.parametrize(
    ("path", "array", "said"),
    [
        broken("image/1", np.zeros((18, 24)), r"array of shape \(18, 24\)"),
        broken("image/1", np.full((18, 24, 3), 2.0), "from 2 to 2"),
        broken("image/1", np.full((18, 24, 3), np.nan), "from nan to nan"),
        broken("image/1", np.full((18, 24, 3), 9, np.int64), "int64"),
        broken("label/1", np.full((18, 24), 13.0), "ids from 13.0 to 13.0"),
        broken("label/1", np.full((18, 24), -2.0), "ids from -2.0 to -2.0"),
        broken("label/1", np.full((18, 24), 0.5), "not whole"),
        broken("depth/1", np.zeros((18, 24, 3)), "wanted a matrix of metres"),
        broken("normal/1", np.full((18, 24, 3), 0.2), "vectors of length"),
    ],
)
def test_what_is_in_no_such_file(tmp_path, path, array, said, one_sentence):
    write_libmtl(tmp_path, "nyuv2_13")
    np.save(tmp_path / "train" / f"{path}.npy", array)
    with pytest.raises(ValueError, match=said) as raised:
        open_split(tmp_path, "nyuv2_13")[1]
    one_sentence(raised, f"{path}.npy")


def test_what_is_missing_is_named(tmp_path, one_sentence):
    root = write_libmtl(tmp_path / "nyuv2", "nyuv2_13")
    with pytest.raises(ValueError, match=r"got no folder train/image.*give data\.root=.*nyuv2$") as raised:
        open_split(tmp_path, "nyuv2_13")
    one_sentence(raised)
    (root / "train/normal/2.npy").unlink()
    with pytest.raises(ValueError, match=r"train/normal/2\.npy.*tasks=\[semseg,depth\]") as raised:
        open_split(root, "nyuv2_13")
    one_sentence(raised)
    np.save(root / "train/image/cat.npy", np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match=r"got the file 'cat\.npy', wanted numbers") as raised:
        open_split(root, "nyuv2_13")
    one_sentence(raised)
    shutil.rmtree(root / "val/image")
    with pytest.raises(ValueError, match=r"got no folder val/image.*check data\.root") as raised:
        open_split(root, "nyuv2_13", "val")
    one_sentence(raised)
    (root / "val/image").mkdir()
    with pytest.raises(ValueError, match="got no array in it") as raised:
        open_split(root, "nyuv2_13", "val")
    one_sentence(raised)


def test_magnified_disparities_grow_as_depths_shrink(tmp_path):
    """A picture magnified s times is that of things s times nearer, whose disparity is s times as large."""
    for data, factor in (("nyuv2_13", 1 / 1.25), ("cityscapes", 1.25)):
        root = write_libmtl(tmp_path / data, data)
        tasks = select_tasks(data, ["depth"])
        record = READERS[data](root, "train", tasks)[0]
        transform = Transform(24, tasks=tasks, augmentation="eigen")
        plain, warped = (transform.warped_sample(record, Warp(scale=s)).labels["depth"] for s in (1.0, 1.25))
        assert warped[0, 12, 12] == pytest.approx(float(plain[0, 12, 12]) * factor, rel=0.05)
        assert bool((warped > 0).any()) and torch.isfinite(warped).all()


def test_the_data_sets_are_known_by_name(tmp_path, data):
    root = write_libmtl(tmp_path, data)
    tree = {"data": {"name": data, "root": str(root), "size": 16}, "eval": {"batch_size": 2}}
    settings = build_settings(tree)
    loader = build_eval_loader(settings, settings.chosen_tasks(), rank=0, world_size=1, device=torch.device("cpu"))
    (batch,) = list(loader)
    loader.close()
    assert batch.names == ["val/0", "val/1"] and batch.images.shape[:2] == (2, 3)
    assert all(label.shape[-2:] == (18, 24) for many in batch.labels.values() for label in many)
