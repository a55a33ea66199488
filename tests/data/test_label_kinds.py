"""Labels that are not what they look like: the right label, or a sentence that names the file; so does checking."""

import logging

import numpy as np
import pytest
from PIL import ExifTags, Image
from scipy.io import savemat

from ase_dist.data.folder import FolderDataset
from ase_dist.data.labels import normals_from_codes
from ase_dist.data.nyud import NYUD
from ase_dist.data.pascal_context import PascalContext
from ase_dist.data.transforms import Transform
from ase_dist.errors import UserError
from ase_dist.image_size import ImageSize
from ase_dist.tasks import NYUD_TASKS, PASCAL_TASKS, select_tasks
from tests.data.conftest import struct_array
from tests.data.packing import command

pytestmark = pytest.mark.single_gpu
SHAPE = (20, 30)
PARTS, MASK, EDGE = (PASCAL_TASKS[name] for name in ("human_parts", "saliency", "edge"))
DEPTH, NORMALS = NYUD_TASKS["depth"], NYUD_TASKS["normals"]
IDS = np.tile(np.arange(30, dtype=np.uint8) % 7, (20, 1))
BITS = IDS > 3


@pytest.fixture
def read(tmp_path):
    """The label of one image in the default layout, from values saved as ``suffix``."""

    def make(task, values, suffix):
        root = tmp_path / "own"
        for folder in ("images", "lists", task.name):
            (root / folder).mkdir(parents=True)
        (root / "lists/train.txt").write_text("a\n")
        Image.fromarray(np.zeros((*SHAPE, 3), np.uint8)).save(root / "images/a.png")
        path = root / task.name / f"a.{suffix}"
        if suffix == "npy":
            np.save(path, values)
        elif suffix == "mat":
            savemat(path, {task.name: values})
        else:
            (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(path)
        return FolderDataset(root, "train", (task,))[0].labels[task.name]

    return make


def palette(values):
    picture = Image.fromarray(values).convert("P")
    picture.putdata(values.ravel().tolist())
    return picture


UNKNOWN = np.where(IDS == 0, 255, BITS).astype(np.uint8)
RIGHT = {
    "palette classes": (PARTS, palette(IDS), "png", IDS),
    "classes in 64 bits": (PARTS, IDS.astype(np.int64), "npy", IDS),
    "classes in 16 bits with ignored": (
        PARTS,
        np.where(BITS, 255, IDS).astype(np.uint16),
        "npy",
        np.where(BITS, 255, IDS),
    ),
    "classes as whole floats": (PARTS, IDS.astype(np.float32), "npy", IDS),
    "classes with an axis more": (PARTS, IDS[None].astype(np.int32), "npy", IDS),
    "mask of 0 and 255": (MASK, 255 * BITS.astype(np.uint8), "png", BITS),
    "mask of 0 and 1": (MASK, BITS.astype(np.uint8), "png", BITS),
    "one-bit mask": (MASK, BITS, "png", BITS),
    "mask all of 1": (MASK, np.ones(SHAPE, np.uint8), "png", np.ones(SHAPE)),
    "empty mask": (MASK, np.zeros(SHAPE, np.uint8), "png", np.zeros(SHAPE)),
    "soft mask": (
        MASK,
        np.tile(np.arange(30, dtype=np.uint8) * 8, (20, 1)),
        "png",
        np.tile(np.arange(30) >= 16, (20, 1)),
    ),
    "dark soft mask": (MASK, IDS, "png", np.zeros(SHAPE)),
    "boolean mask": (MASK, BITS, "npy", BITS),
    "mask of whole numbers": (MASK, BITS.astype(np.int64), "npy", BITS),
    "mask of 0 and 255 in 64 bits": (MASK, 255 * BITS.astype(np.int64), "npy", BITS),
    "mask of probabilities": (MASK, np.where(BITS, 0.75, 0.25), "npy", BITS),
    "mask of floats with an axis more": (MASK, BITS.astype(np.float32)[..., None], "npy", BITS),
    "edges of 0 and 1": (EDGE, BITS.astype(np.uint8), "png", BITS),
    "edges of 0 and 255": (EDGE, 255 * BITS.astype(np.uint8), "png", BITS),
    "no edges": (EDGE, np.zeros(SHAPE, np.uint8), "png", np.zeros(SHAPE)),
    "boolean edges": (EDGE, BITS, "npy", BITS),
    "edges as floats": (EDGE, BITS.astype(np.float64), "npy", BITS),
    "mask with unknown pixels": (MASK, UNKNOWN, "png", UNKNOWN),
    "mask with unknown pixels as .npy": (MASK, UNKNOWN.astype(np.int32), "npy", UNKNOWN),
    "mask of 1 and unknown pixels": (MASK, np.where(BITS, 1, 255).astype(np.uint8), "png", np.where(BITS, 1, 255)),
    "white mask": (MASK, np.full(SHAPE, 255, np.uint8), "png", np.ones(SHAPE)),
    "edges with unknown pixels": (EDGE, UNKNOWN, "png", UNKNOWN),
    "edges with unknown pixels as floats": (EDGE, UNKNOWN.astype(np.float32), "npy", UNKNOWN),
    "depth in half precision": (DEPTH, np.full(SHAPE, 2.5, np.float16), "npy", np.full(SHAPE, 2.5)),
    "depth as .mat": (DEPTH, np.full(SHAPE, 2.5), "mat", np.full(SHAPE, 2.5)),
    "far depth": (DEPTH, np.full(SHAPE, 80.0), "npy", np.full(SHAPE, 80)),
    "depth with holes": (
        DEPTH,
        np.where(BITS, np.inf, np.where(IDS == 0, np.nan, 3.0)),
        "npy",
        np.where(BITS | (IDS == 0), 0, 3),
    ),
    "depth with -1 for none": (DEPTH, np.where(BITS, -1.0, 3.0), "npy", np.where(BITS, 0, 3)),
}


@pytest.mark.parametrize("case", RIGHT)
def test_the_right_label(read, case):
    task, values, suffix, expected = RIGHT[case]
    label = read(task, values, suffix)
    assert label.dtype == (np.float32 if task is DEPTH else np.uint8)
    np.testing.assert_array_equal(label, expected)


ONE_NAN = np.where(np.arange(600).reshape(SHAPE) == 7, np.nan, BITS)
HALF = np.full((*SHAPE, 3), 1 / np.sqrt(3))
TOLD = {
    "ids out of range": (PARTS, IDS + 1, "png", "ids from 7 to 7"),
    "ids out of range as .npy": (PARTS, IDS.astype(np.int32) + 1, "npy", "ids from 7 to 7"),
    "ids of 300, which are 44 in 8 bits": (PARTS, np.full(SHAPE, 256 + 3), "npy", "ids from 259 to 259"),
    "negative ids": (PARTS, IDS.astype(np.int64) - 1, "npy", "ids from -1 to -1"),
    "classes that are not whole": (PARTS, IDS + 0.5, "npy", "not whole"),
    "classes with NaN": (PARTS, ONE_NAN, "npy", "not whole"),
    "classes in colour": (PARTS, np.zeros((*SHAPE, 3), np.uint8), "png", "'RGB'"),
    "classes in colour and alpha": (PARTS, np.zeros((*SHAPE, 4), np.uint8), "png", "'RGBA'"),
    "classes of 16 bits": (PARTS, IDS.astype(np.uint16), "png", "16-bit"),
    "one-hot classes": (PARTS, np.zeros((7, *SHAPE), np.uint8), "npy", r"shape \(7, 20, 30\)"),
    "a row of classes": (PARTS, IDS.ravel(), "npy", r"shape \(600,\)"),
    "no classes": (PARTS, np.zeros((0, 30), np.uint8), "npy", "label of 30 x 0 pixels"),
    "words": (PARTS, np.array([["cat"]]), "npy", "type <U3"),
    "mask of 0 and 100": (MASK, 100 * BITS.astype(np.uint8), "png", "the values 0 and 100.*write 0 and 255"),
    "mask with NaN": (MASK, ONE_NAN, "npy", "from nan to nan"),
    "mask with infinity": (MASK, np.where(BITS, np.inf, 0), "npy", "from 0 to inf"),
    "mask of logits": (MASK, np.where(BITS, 3.0, -3.0), "npy", "from -3 to 3"),
    "mask of percent": (MASK, np.where(BITS, 99.5, 0.5), "npy", "fractions up to 99.5"),
    "mask of 16 bits": (MASK, BITS.astype(np.int64) * 65535, "npy", "from 0 to 65535"),
    "mask in colour": (MASK, np.zeros((*SHAPE, 3), np.uint8), "png", "'RGB'"),
    "empty mask file": (MASK, np.zeros((0, 0)), "npy", "label of 0 x 0 pixels"),
    "edges of NaN": (EDGE, np.full(SHAPE, np.nan), "npy", "from nan to nan"),
    "edges with one NaN": (EDGE, ONE_NAN, "npy", "from nan to nan"),
    "edges with infinity": (EDGE, np.where(BITS, np.inf, 0), "npy", "from inf to inf"),
    "soft edges": (EDGE, np.tile(np.linspace(0, 40, 30).astype(np.uint8), (20, 1)), "png", "from 1 to 40"),
    "edge probabilities": (EDGE, np.where(BITS, 0.9, 0.1), "npy", "from 0.1 to 0.9"),
    "edges of 0, 2 and 255": (EDGE, np.where(UNKNOWN == 1, 2, UNKNOWN), "png", "from 2 to 255"),
    "edges everywhere or nowhere known": (EDGE, np.full(SHAPE, 255, np.uint8), "png", "255 in every pixel"),
    "negative edges": (EDGE, -BITS.astype(np.int64), "npy", "from -1 to -1"),
    "millimetres": (
        DEPTH,
        np.full(SHAPE, 2500, np.uint16),
        "npy",
        "depths up to 2500.*divide .* by 1000.*unit: mm",
    ),
    "millimetres as floats": (DEPTH, np.full(SHAPE, 2500.0), "npy", "depths up to 2500"),
    "one pixel of 1e6": (DEPTH, np.where(np.isnan(ONE_NAN), 1e6, 2.0), "npy", r"depths up to 1e\+06"),
    "millimetres as .mat": (DEPTH, np.full(SHAPE, 2500.0), "mat", "depths up to 2500"),
    "depth along a negative axis": (DEPTH, np.where(BITS, -2.0, -3.0), "npy", "depths from -3 to -2"),
    "depth as truth": (DEPTH, BITS, "npy", "true and false"),
    "depth as PNG": (
        DEPTH,
        np.full(SHAPE, 2500, np.uint16),
        "png",
        r"'a\.png' for 'a', wanted depth/a\.npy or depth/a\.mat",
    ),
    "no depth": (DEPTH, np.zeros((20, 0)), "npy", "label of 0 x 20 pixels"),
    "normals as colours from 0 to 1": (NORMALS, (HALF + 1) / 2, "npy", "of length"),
    "normals as colours from 0 to 1, the other way": (NORMALS, (1 - HALF) / 2, "npy", "of length"),
    "normals of any length": (NORMALS, HALF / 2, "npy", "of length 0.5 on average"),
    "normals as bytes": (NORMALS, np.full((*SHAPE, 3), 200, np.uint8), "npy", "type uint8"),
    "normals with NaN": (NORMALS, HALF * np.where(np.isnan(ONE_NAN), np.nan, 1)[..., None], "npy", "from nan to nan"),
    "normals with infinity": (NORMALS, HALF * np.inf, "npy", "from inf to inf"),
    "normals, channels first": (NORMALS, HALF.transpose(2, 0, 1), "npy", r"shape \(3, 20, 30\)"),
    "no normals": (NORMALS, np.zeros((0, 0, 3)), "npy", r"shape \(0, 0, 3\)"),
    "classes transposed": (PARTS, IDS.T.copy(), "png", "20 x 30 pixels for an image of 30 x 20"),
    "half-size and transposed": (PARTS, IDS[::2, ::2].T.copy(), "png", "10 x 15 pixels for an image of 30 x 20"),
    "one pixel": (PARTS, IDS[:1, :1], "png", "1 x 1 pixels"),
    "depth transposed": (DEPTH, np.ones((30, 20)), "npy", "20 x 30 pixels for an image of 30 x 20"),
    "normals transposed": (NORMALS, np.full((30, 20, 3), 200, np.uint8), "png", "20 x 30 pixels"),
}


@pytest.mark.parametrize("task", [PARTS, MASK, EDGE])
def test_a_jpeg_by_the_name_of_a_png_is_told(read, tmp_path, task):
    """Its classes are smeared at every border."""
    read(task, BITS.astype(np.uint8), "png")
    Image.fromarray(BITS.astype(np.uint8)).save(tmp_path / "own" / task.name / "a.png", format="JPEG")
    with pytest.raises(UserError, match=r"a\.png: got a JPEG"):
        FolderDataset(tmp_path / "own", "train", (task,))[0]


@pytest.mark.parametrize("case", TOLD)
@pytest.mark.filterwarnings("error")
def test_what_is_no_label_is_told_by_name(read, case, one_sentence):
    task, values, suffix, said = TOLD[case]
    with pytest.raises(UserError, match=said) as raised:
        read(task, values, suffix)
    one_sentence(raised, task.name, "wanted")


def test_a_label_of_half_the_size_is_resized(read):
    np.testing.assert_array_equal(read(PARTS, IDS[::2, ::2].copy(), "png"), IDS[::2, ::2].repeat(2, 0).repeat(2, 1))


def test_unit_vectors_are_normals(read):
    vectors = np.where(BITS[..., None], (0.6, 0.0, -0.8), (0.0, 0.0, 0.0)).astype(np.float16)
    np.testing.assert_allclose(normals_from_codes(read(NORMALS, vectors, "npy")).transpose(1, 2, 0), vectors, atol=0.01)


@pytest.mark.parametrize(
    ("part", "said"),
    [(np.full((2, 3), np.nan), "a mask with NaN for 'head'"), (np.zeros((0, 0), np.uint8), "label of 0 x 0 pixels")],
)
def test_part_masks_that_say_nothing(pascal, part, said):
    pascal.add("a", shape=(12, 16), labels=("human_parts",))
    parts = struct_array(("part_name", "mask"), [("head", part)])
    things = struct_array(("class", "class_ind", "mask", "parts"), [("person", 15, np.ones((2, 3)), parts)])
    savemat(pascal.path("human_parts/a.mat"), {"anno": struct_array(("imname", "objects"), [("a", things)])})
    with pytest.raises(UserError, match=said):
        PascalContext(pascal.root, "train", (PARTS,))[0]


# --- orientation tags ------------------------------------------------------------------------------------------------


def tag(path, orientation):
    with Image.open(path) as picture:
        exif = picture.getexif()
        exif[ExifTags.Base.Orientation] = orientation
        picture.save(path, exif=exif)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_label_drawn_upright_for_a_tagged_picture_is_told(read, tmp_path, orientation, suffix):
    """Drawn on the pixels as stored it is right, on the picture as shown it is told, and what may be either too."""
    stored, root = IDS, tmp_path / "own"
    shown = np.asarray(upright(stored, orientation))
    read(PARTS, stored, "png")
    (root / "images/a.png").unlink()
    Image.fromarray(np.zeros((*SHAPE, 3), np.uint8)).save(root / f"images/a.{suffix}")
    tag(root / f"images/a.{suffix}", orientation)
    for drawn in (stored, shown):
        Image.fromarray(drawn).save(root / "human_parts/a.png")
        if orientation == 1 or (orientation >= 5 and drawn is stored):
            np.testing.assert_array_equal(FolderDataset(root, "train", (PARTS,))[0].labels["human_parts"], stored)
            continue
        with pytest.raises(UserError, match=r"a\.(png|jpg): got .* tag"):
            FolderDataset(root, "train", (PARTS,))[0]
    assert len(FolderDataset(root, "train", ())[0].image) == 20  # without labels there is nothing to tell


def upright(values, orientation):
    picture = Image.fromarray(values)
    steps = {2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}.get(orientation, [])
    for step in steps:
        picture = picture.transpose(Image.Transpose(step))
    return picture


@pytest.mark.parametrize("shape", [(12, 12), (96, 100)])
def test_a_square_picture_with_a_tag_is_told(pascal, shape):
    pascal.add("a", shape=shape)
    tag(pascal.root / "JPEGImages/a.jpg", 6)
    with pytest.raises(UserError, match=r"a\.jpg: got a picture with the orientation tag 6"):
        PascalContext(pascal.root, "train", select_tasks("pascal_context"))[0]


# --- the command -----------------------------------------------------------------------------------------------------


def test_checking_tells_what_reading_tells(pascal, caplog):
    """At ``--check-only`` already, every file of several."""
    for name in ("a", "b", "c"):
        pascal.add(name)
    pascal.add("v", split="val")
    pascal.saliency("a", np.arange(192).reshape(12, 16) % 2 * 100)
    pascal.semseg("b", np.zeros((16, 12)))
    tag(pascal.root / "JPEGImages/c.jpg", 3)
    with caplog.at_level(logging.INFO):
        assert command(pascal.root, "--subset", "--check-only") == 2
    told = [record.message for record in caplog.records if record.message.startswith("unusable")]
    assert len(told) == 3
    expected = {
        "sal_distill/a.png": "the values 0 and 100",
        "VOC12/b.png": "12 x 16 pixels",
        "JPEGImages/c.jpg": "orientation tag 3",
    }
    for line, (file, said) in zip(told, expected.items(), strict=True):
        assert file in line and said in line


@pytest.mark.parametrize("unknown", [0, 255])
def test_a_mask_of_0_and_1_is_packed_as_it_is(pascal, pack, unknown):
    from ase_dist.data.packed.dataset import PackedDataset

    values = np.eye(12, 16)
    values[3, :9] = unknown
    for split in ("train", "val"):
        pascal.add(split, split=split)
        pascal.saliency(split, values)
    place = pack(pascal.root)
    record = PackedDataset(place, "train", (MASK,), data="pascal_context")[0]
    np.testing.assert_array_equal(record.labels["saliency"], values)
    sample = Transform(ImageSize(12, 16), tasks=(MASK,), augmentation="none").train_sample(record, seed=0, epoch=0)
    np.testing.assert_array_equal(sample.labels["saliency"], values)


def test_nyud_tells_millimetres_and_edges_of_nan(nyud):
    good = {
        "semseg": np.ones(SHAPE),
        "depth": np.ones(SHAPE),
        "normals": np.zeros((*SHAPE, 3)),
        "edge": np.zeros(SHAPE),
    }
    nyud.add("1", **good)
    assert NYUD(nyud.root, "train", select_tasks("nyud"))[0].labels["depth"].max() == 1
    np.save(nyud.path("edge/1.npy"), np.full(SHAPE, np.nan, np.float32))
    with pytest.raises(UserError, match=r"edge/1\.npy: got values from nan"):
        NYUD(nyud.root, "train", select_tasks("nyud"))[0]
    np.save(nyud.path("depth/1.npy"), np.full(SHAPE, 2500, np.uint16))
    with pytest.raises(UserError, match=r"depth/1\.npy: got depths up to 2500"):
        NYUD(nyud.root, "train", select_tasks("nyud"))[0]
    savemat(nyud.path("segmentation/1.mat"), {"segmentation": np.full(SHAPE, 1.5)})
    (nyud.root / "segmentation/1.png").unlink()
    with pytest.raises(UserError, match=r"segmentation/1\.mat: got numbers that are not whole"):
        NYUD(nyud.root, "train", select_tasks("nyud"))[0]
