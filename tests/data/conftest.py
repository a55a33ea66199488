"""Tiny data folders in the exact layouts of PASCAL_MT and NYUD_MT, written as the archives' own files are."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from ase_dist.tasks import voc_color

ALL_LABELS = ("semseg", "human_parts", "saliency", "edge", "normals")


def struct_array(fields, rows):
    """A MATLAB struct array 1 x n as scipy writes and reads it; an empty one is the 0 x 0 matrix."""
    if not rows:
        return np.zeros((0, 0))
    array = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    for i, row in enumerate(rows):
        array[0, i] = row
    return array


class PascalFolder:
    """Writes PASCAL_MT; ``add`` fills in every file of an image from a generator seeded by its name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lists: dict[str, list[str]] = {}

    def path(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add(self, name, *, split="train", shape=(12, 16), labels=ALL_LABELS):
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        self.image(name, rng.integers(0, 256, (*shape, 3)))
        mask = rng.random(shape) < 0.5
        if "semseg" in labels:
            self.semseg(name, rng.choice([0, 3, 15, 20, 255], shape))
        if "human_parts" in labels:
            self.parts(name, [(15, mask, [("head", mask), ("rfoot", ~mask)])])
        if "saliency" in labels:
            self.saliency(name, rng.integers(0, 256, shape))
        if {"edge", "normals"} & set(labels):
            self.label_map(name, rng.choice([2, 3, 454], (3, 4)).repeat(shape[0] // 3, 0).repeat(shape[1] // 4, 1))
        if "normals" in labels:
            self.normals(name, rng.integers(0, 256, (*shape, 3)))
        self.lists.setdefault(split, []).append(name)
        self.path(f"ImageSets/Context/{split}.txt").write_text("".join(f"{n}\n" for n in self.lists[split]))

    def image(self, name, array):
        Image.fromarray(np.asarray(array, np.uint8)).save(self.path(f"JPEGImages/{name}.jpg"), quality=95)

    def semseg(self, name, ids, *, folder="VOC12"):
        picture = Image.fromarray(np.asarray(ids, np.uint8)).convert("P")
        picture.putdata(np.asarray(ids, np.uint8).ravel().tolist())
        picture.putpalette([value for i in range(256) for value in voc_color(i)])
        picture.save(self.path(f"semseg/{folder}/{name}.png"))

    def parts(self, name, things):
        """``things``: (class id, mask, [(part name, mask), ...])."""
        rows = []
        for class_id, mask, parts in things:
            masks = [(part, np.asarray(m, np.uint8)) for part, m in parts]
            part_array = struct_array(("part_name", "mask"), masks)
            rows.append(("thing", class_id, np.asarray(mask, np.uint8), part_array))
        objects = struct_array(("class", "class_ind", "mask", "parts"), rows)
        anno = struct_array(("imname", "objects"), [(name, objects)])
        savemat(self.path(f"human_parts/{name}.mat"), {"anno": anno})

    def saliency(self, name, grey):
        Image.fromarray(np.asarray(grey, np.uint8)).save(self.path(f"sal_distill/{name}.png"))

    def label_map(self, name, ids):
        savemat(self.path(f"pascal-context/trainval/{name}.mat"), {"LabelMap": np.asarray(ids, np.uint16)})

    def normals(self, name, rgb):
        Image.fromarray(np.asarray(rgb, np.uint8)).save(self.path(f"normals_distill/{name}.png"))


class NyudFolder:
    """Writes NYUD_MT."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add(self, name, *, semseg, depth, normals, edge):
        Image.fromarray(np.full((*np.shape(semseg), 3), 7, np.uint8)).save(self.path(f"images/{name}.jpg"))
        Image.fromarray(np.asarray(semseg, np.uint8)).save(self.path(f"segmentation/{name}.png"))
        np.save(self.path(f"depth/{name}.npy"), np.asarray(depth, np.float32))
        Image.fromarray(np.asarray(normals, np.uint8)).save(self.path(f"normals/{name}.png"))
        Image.fromarray(np.asarray(edge, np.uint8)).save(self.path(f"edge/{name}.png"))
        for split in ("train", "val"):
            self.path(f"gt_sets/{split}.txt").write_text(f"{name}\n")


@pytest.fixture
def pascal(tmp_path):
    return PascalFolder(tmp_path / "PASCAL_MT")


@pytest.fixture
def nyud(tmp_path):
    return NyudFolder(tmp_path / "NYUD_MT")


@pytest.fixture(scope="session")
def photographs(shared_data):
    """The folder of real photographs in the PASCAL_MT layout, where this machine has it."""
    return shared_data / "data" / "ccp_mt"


@pytest.fixture
def pack(tmp_path):
    """Packs a folder of any number of images; returns the packed data set's folder."""
    from ase_dist.data.packed.prepare import Request, prepare

    def make(root, *, data="pascal_context", out=tmp_path / "packed", **options):
        return prepare(Request(data, root, subset=True, workers=1, **options), out)

    return make


@pytest.fixture
def small_shards(monkeypatch):
    """Two images in a packed file."""
    from ase_dist.data.packed import source

    monkeypatch.setattr(source, "SHARD", 2)


@pytest.fixture
def six(pascal, small_shards):
    """Five images to train on, which are three packed files, and one to validate."""
    for i in range(5):
        pascal.add(f"t{i}")
    pascal.add("v0", split="val")
    return pascal


@pytest.fixture
def counted(monkeypatch):
    """The files that are packed, by name, in the order of packing."""
    from ase_dist.data.packed import jobs, shard

    targets = []

    def pack(job, fingerprint):
        targets.append(job.target.name)
        return shard.pack(job, fingerprint)

    monkeypatch.setattr(jobs, "pack", pack)
    return targets
