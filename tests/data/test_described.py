"""Folders of one's own: which images there are, what their labels become, and what is told where something is wrong."""

import logging
import pickle
import random

import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy.ndimage import binary_dilation
from scipy.ndimage import label as components

from ase_dist.commands import prepare_data
from ase_dist.data.described import described_reader
from ase_dist.data.packed.dataset import PackedDataset
from ase_dist.description import FILE_NAME, described, read_description
from ase_dist.errors import UserError
from ase_dist.tasks import IGNORE
from tests.data.own_folders import CLASSES, SHAPE, disc, ids, millimetres, outline, palette_picture, picture, save

pytestmark = pytest.mark.single_gpu

COLORS = np.array([[0, 0, 0], [128, 64, 128], [244, 35, 232], [70, 70, 70], [107, 142, 35]], np.uint8)
NAMES = "classes: [sky, road, car, tree, man]"
START = "images: images/{}.jpg\nsplits: {train: images, val_every: 4}\n"


class Own:
    """A folder with four images and one task, ``x``, whose label files a test writes."""

    def __init__(self, root):
        self.root = root
        for name in "abcd":
            save(root / f"images/{name}.jpg", picture(ord(name)))

    def describe(self, task, *, start=START, files="x/{}.png"):
        text = f"{start}tasks:\n  x: {{files: '{files}', {task}}}\n"
        (self.root / FILE_NAME).write_text(text, encoding="utf-8")
        return read_description(self.root / FILE_NAME)

    def open(self, task, *, split="train", **options):
        description = self.describe(task, **options)
        return described_reader(description)(self.root, split, tuple(described(description).tasks.values()))

    def label(self, task, values):
        """The decoded label of an image whose file has ``values``."""
        for name in "abcd":
            save(self.root / f"x/{name}.png", values)
        return self.open(task)[0].labels["x"]


@pytest.fixture
def own(tmp_path):
    return Own(tmp_path / "own")


# --- labels ----------------------------------------------------------------------------------------------------------


def slow_map(values, table, *, other=IGNORE):
    """The specification: pixel by pixel."""
    flat = [
        table.get(tuple(value) if np.ndim(value) else int(value), other)
        for value in values.reshape(-1, *values.shape[2:])
    ]
    return np.array(flat, np.uint8).reshape(values.shape[:2])


def test_ids_are_classes_and_255_is_ignored(own):
    values = ids(1)
    values[3, :9] = IGNORE
    np.testing.assert_array_equal(own.label(f"kind: classes, {NAMES}", values), values)


def test_the_indices_of_a_palette_are_ids_whatever_their_colours(own):
    for name in "abcd":
        path = own.root / f"x/{name}.png"
        path.parent.mkdir(exist_ok=True)
        palette_picture(ids(2), COLORS[::-1].tolist()).save(path)
    np.testing.assert_array_equal(own.open(f"kind: classes, {NAMES}")[0].labels["x"], ids(2))


def test_cityscapes_ids_by_a_map(own):
    stored = np.array([7, 8, 11, 0, 255], np.uint8)[ids(0)]
    task = f"kind: classes, {NAMES}, id_map: {{7: road, 8: 2, 11: man, 0: ignore}}, ignore: 255"
    want = slow_map(stored, {7: 1, 8: 2, 11: 4})
    np.testing.assert_array_equal(own.label(task, stored), want)
    np.testing.assert_array_equal(own.label(task, stored.astype(np.uint16) + 0), want)


def test_negative_ids_and_ids_above_255_in_a_npy(own):
    for name in "abcd":
        save(own.root / f"x/{name}.npy", np.array([-1, 300, 70000, 2, 9])[ids(0)])
    task = f"kind: classes, {NAMES}, id_map: {{300: road, 70000: car, 2: sky, 9: tree}}, ignore: -1"
    dataset = own.open(task, files="x/{}.npy")
    np.testing.assert_array_equal(dataset[0].labels["x"], slow_map(ids(0), {1: 1, 2: 2, 3: 0, 4: 3}))


def test_a_first_id_of_one_and_zero_ignored(own):
    label = own.label(f"kind: classes, {NAMES}, first_id: 1, ignore: [0, 255]", ids(0, classes=6))
    np.testing.assert_array_equal(label, slow_map(ids(0, classes=6), {i + 1: i for i in range(CLASSES)}))


@pytest.mark.parametrize("alpha", [False, True])
def test_colours_by_a_map_or_by_those_of_the_classes(own, alpha):
    rgb = COLORS[ids(3)]
    stored = np.dstack([rgb, np.full(SHAPE, 255, np.uint8)]) if alpha else rgb
    table = {tuple(color): i for i, color in enumerate(COLORS.tolist())}
    codes = ", ".join(f"'{r},{g} {b}': {name}" for (r, g, b), name in zip(COLORS.tolist(), "01234", strict=True))
    label = own.label(f"kind: classes, {NAMES}, rgb_map: {{{codes}}}", stored)
    np.testing.assert_array_equal(label, slow_map(rgb, table))
    named = ", ".join(f"n{i}: {color}" for i, color in enumerate(COLORS.tolist()))
    label = own.label(f"kind: classes, classes: {{{named}}}, rgb_map: colors", stored)
    np.testing.assert_array_equal(label, slow_map(rgb, table))


def test_what_is_not_listed_is_refused_by_file_and_value_or_ignored(own):
    with pytest.raises(
        UserError, match=r"a\.png: got \d+ pixels of the ids 5, wanted only ids of 0\.\.4, 255; add them"
    ):
        own.label(f"kind: classes, {NAMES}", ids(0, classes=6))
    label = own.label(f"kind: classes, {NAMES}, unlisted: ignore", ids(0, classes=6))
    np.testing.assert_array_equal(label, np.where(ids(0, classes=6) == 5, IGNORE, ids(0, classes=6)))
    with pytest.raises(UserError, match=r"pixels of the colours \[107, 142, 35\], wanted only colours of \[0, 0, 0\]"):
        codes = "{'0 0 0': a, '128 64 128': b, '244 35 232': 0, '#464646': 0}"
        own.label(f"kind: classes, classes: [a, b], rgb_map: {codes}", COLORS[ids(0)])


def test_grey_saved_as_rgb_is_grey(own):
    np.testing.assert_array_equal(own.label(f"kind: classes, {NAMES}", np.stack([ids(0)] * 3, -1)), ids(0))


def test_parts_of_background_alone_are_not_counted(own):
    assert (own.label(f"kind: parts, {NAMES}", np.zeros(SHAPE, np.uint8)) == IGNORE).all()
    np.testing.assert_array_equal(own.label(f"kind: parts, {NAMES}", ids(0)), ids(0))


@pytest.mark.parametrize("high", [1, 255, True])
def test_a_mask_of_zero_and_one_or_of_black_and_white(own, high):
    values = disc(0) if high is True else disc(0).astype(np.uint8) * np.uint8(high)
    np.testing.assert_array_equal(own.label("kind: mask", values), disc(0))


@pytest.mark.parametrize("kind", ["mask", "edges"])
def test_255_beside_0_and_1_is_unknown_and_beside_0_what_the_description_says(own, kind):
    values = disc(0).astype(np.uint8)
    values[0] = 255
    want = np.where(values == 255, IGNORE, disc(0))
    np.testing.assert_array_equal(own.label(f"kind: {kind}", values), want)
    white = np.where(values == 255, np.uint8(255), np.uint8(0))
    np.testing.assert_array_equal(own.label(f"kind: {kind}", white), white == 255)
    np.testing.assert_array_equal(own.label(f"kind: {kind}, ignore: 255", white), white)


def test_an_unknown_border_of_a_mask_is_told_to_be_one(own):
    values = disc(0).astype(np.uint8)
    values[0] = 255
    want = np.where(values == 255, IGNORE, disc(0))
    np.testing.assert_array_equal(own.label("kind: saliency, ignore: 255", values), want)
    np.testing.assert_array_equal(own.label("kind: mask, id_map: {0: 0, 1: 1, 255: ignore}", values), want)


def test_soft_edges_need_a_threshold(own):
    soft = (np.arange(32, dtype=np.uint8) * 8)[None].repeat(24, 0)
    with pytest.raises(UserError, match=r"wanted two values, .* \(or a threshold"):
        own.label("kind: edges", soft)
    np.testing.assert_array_equal(own.label("kind: edges, threshold: 100", soft), soft > 100)


@pytest.mark.parametrize("thickness", [1, 3, 5])
def test_edges_are_made_as_thick_as_is_said(own, thickness):
    wide = binary_dilation(outline(0), np.ones((4, 4))).astype(np.uint8) * 255
    found = own.label(f"kind: edges, thickness: {thickness}", wide)
    assert found[:, 12:20].sum(0).tolist() == [thickness] * 8
    assert components(found)[1] == 1


UNITS = {"mm": 0.001, "cm": 0.01, "0.00390625": 1 / 256}


@pytest.mark.parametrize("unit", UNITS)
def test_depth_in_sixteen_bits_becomes_metres(own, unit):
    stored = millimetres(0)
    stored[0], stored[1] = 0, 65535
    found = own.label(f"kind: depth, unit: {unit}, ignore: 65535", stored)
    want = np.where((stored == 0) | (stored == 65535), 0, stored * UNITS[unit])
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert found.dtype == np.float32


def test_metres_that_are_millimetres_are_refused_unless_they_are_sure(own):
    with pytest.raises(UserError, match=r"a\.png: got distances up to 3593, .*; set unit: mm in dataset\.yaml"):
        own.label("kind: depth, unit: m", millimetres(0))
    assert own.label("kind: depth, unit: 1.0", millimetres(0)).max() == 3593


REFUSED = {
    "a JPEG as labels": (f"kind: classes, {NAMES}", "got a JPEG, which does not keep values exactly"),
    "colours": (f"kind: classes, {NAMES}", "got a picture in colours, .*; give an rgb_map in dataset.yaml"),
    "transparent": (f"kind: classes, {NAMES}", "got a picture with transparent pixels"),
    "not whole": (f"kind: classes, {NAMES}", "got numbers that are not whole|unreadable"),
    "damaged": (
        f"kind: classes, {NAMES}",
        r"got an unreadable file .*; correct the files or dataset.yaml, or take 'a' out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_label_that_is_none_is_refused_by_its_file_and_no_archive_is_spoken_of(own, case, one_sentence):
    path = own.root / "x/a.png"
    save(own.root / "x/b.png", ids(0))
    dataset = None
    if case == "a JPEG as labels":
        Image.fromarray(ids(0)).save(path, format="JPEG")
    elif case == "colours":
        save(path, COLORS[ids(0)])
    elif case == "transparent":
        save(path, np.dstack([ids(0)] * 3 + [ids(0)]))
    elif case == "not whole":
        Image.fromarray(np.full(SHAPE, 0.5, np.float32)).save(path, format="TIFF")
    else:
        path.write_bytes(b"\x89PNG nothing")
    for name in "cd":
        save(own.root / f"x/{name}.png", ids(0))
    dataset = own.open(REFUSED[case][0])
    with pytest.raises(UserError, match=REFUSED[case][1] if case != "not whole" else "a.png: got") as raised:
        dataset.read(0)
    one_sentence(raised, path)
    assert "archive" not in str(raised.value)


# --- images ----------------------------------------------------------------------------------------------------------


def test_every_nth_image_is_for_validation(own):
    for name in "abcd":
        save(own.root / f"x/{name}.png", ids(0))
    assert (own.open(f"kind: classes, {NAMES}").names, own.open(f"kind: classes, {NAMES}", split="val").names) == (
        ["a", "b", "c"], ["d"])  # fmt: skip


def test_lists_may_have_names_endings_and_paths(own):
    for name in "abcd":
        save(own.root / f"x/{name}.png", ids(0))
    (own.root / "t.txt").write_text("a\nb.jpg\n./images/c.jpg\n\n")
    (own.root / "v.txt").write_bytes("\ufeffd\r\n".encode())
    start = "images: images/{}.jpg\nsplits: {train: t.txt, val: v.txt}\n"
    assert own.open(f"kind: classes, {NAMES}", start=start).names == ["a", "b", "c"]
    assert own.open(f"kind: classes, {NAMES}", start=start, split="val").names == ["d"]


PLACES = {
    "no list": ("train: list/t.txt, val: images", "splits.train: got 'list/t.txt', which is not there, wanted a list"),
    "no folder": ("train: image, val: images", "got 'image', which is not there, .* did you mean 'images'"),
    "no picture": ("train: x, val: images", "got no picture in 'x', wanted files like images/{}.jpg"),
    "no pattern": ("train: images/z*, val: images", r"got no picture in 'images/z\*'"),
    "an empty list": ("train: e.txt, val: images", "got an empty list"),
    "too few": ("train: images, val_every: 9", "splits.val_every is 9 for 4 images, which leaves none for validation"),
    "twice": ("train: [images, images/a.jp*], val: images", "got 'a' twice"),
    "outside": ("train: o.txt, val: images", "got the line '../a', wanted the name of an image below"),
    "missing": (
        "train: m.txt, val: images",
        r"2 of the files .* are missing \(images/q.jpg, x/q.png\); correct the files",
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_splits_that_lead_nowhere_are_told(own, case):
    splits, words = PLACES[case]
    for name in "abcd":
        save(own.root / f"x/{name}.png", ids(0))
    for name, text in {"e": "\n", "o": "../a\n", "m": "a\nq\n"}.items():
        (own.root / f"{name}.txt").write_text(text)
    start = f"images: images/{{}}.jpg\nsplits: {{{splits}}}\n"
    with pytest.raises(UserError, match=words):
        for split in ("train", "val"):
            own.open(f"kind: classes, {NAMES}", start=start, split=split)


def test_pictures_of_any_ending_with_blanks_accents_and_folders(own):
    names = ["deep/er/one 1", "\u00e9t\u00e9", "UP"]
    for name, ending in zip(names, (".jpeg", ".webp", ".PNG"), strict=True):
        save(own.root / f"photos/{name}{ending}", picture(0))
        save(own.root / f"x/{name}.png", ids(0))
    start = "images: photos/{}.*\nsplits: {train: photos, val: photos}\n"
    dataset = own.open(f"kind: classes, {NAMES}", start=start)
    assert dataset.names == sorted(names)
    assert [record.labels["x"].tolist() for record in map(dataset.read, range(3))] == [ids(0).tolist()] * 3


def test_two_pictures_of_one_name_are_told(own):
    save(own.root / "images/a.png", picture(0))
    with pytest.raises(UserError, match=r"'images/a\.jpg' and 'images/a\.png' of one name"):
        own.open(f"kind: classes, {NAMES}", start="images: images/{}.*\nsplits: {train: images, val_every: 2}\n")


@pytest.mark.parametrize("tag", range(1, 9))
def test_upright_pictures_are_as_viewers_show_them(own, tag):
    stored = Image.fromarray(picture(5))
    tags = stored.getexif()
    tags[0x0112] = tag
    for name in "abcd":
        stored.save(own.root / f"images/{name}.jpg", exif=tags, quality=95)
    with Image.open(own.root / "images/a.jpg") as reread:
        upright = np.asarray(ImageOps.exif_transpose(reread))
    for name in "abcd":
        save(own.root / f"x/{name}.png", (upright[..., 0] > 100).astype(np.uint8))
    start = "images: images/{}.jpg\norientation: upright\nsplits: {train: images, val_every: 4}\n"
    record = own.open("kind: mask", start=start)[0]
    np.testing.assert_array_equal(record.image, upright)
    np.testing.assert_array_equal(record.labels["x"], upright[..., 0] > 100)


# --- the whole -------------------------------------------------------------------------------------------------------


def test_it_can_be_sent_to_other_processes(own):
    for name in "abcd":
        save(own.root / f"x/{name}.png", ids(0))
    dataset = own.open(f"kind: classes, {NAMES}, id_map: {{0: sky, 1: road, 2: car, 3: tree, 4: ignore}}")
    again = pickle.loads(pickle.dumps(dataset))
    assert type(again) is type(dataset) and again.names == dataset.names
    np.testing.assert_array_equal(again[1].labels["x"], dataset[1].labels["x"])


def test_packed_records_are_those_of_the_folder_until_the_description_changes(own, tmp_path, one_sentence):
    for name in "abcd":
        save(own.root / f"x/{name}.png", COLORS[ids(ord(name))])
    named = ", ".join(f"n{i}: {color}" for i, color in enumerate(COLORS.tolist()))
    dataset = own.open(f"kind: classes, classes: {{{named}}}, rgb_map: colors")
    assert prepare_data.main([str(own.root), "--out", str(tmp_path / "packed"), "--workers", "1"]) == 0
    description = read_description(tmp_path / "packed" / FILE_NAME)
    assert description.model_copy(update={"name": "own"}) == dataset.description
    packed = PackedDataset(tmp_path / "packed", "train", dataset.tasks, data="own", description=dataset.description)
    for a, b in zip(map(dataset.read, range(3)), map(packed.read, range(3)), strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.labels["x"], b.labels["x"])
    other = own.describe(f"kind: classes, classes: {{{named}}}, rgb_map: colors, unlisted: ignore")
    with pytest.raises(UserError, match=r"was packed by another dataset\.yaml") as raised:
        PackedDataset(tmp_path / "packed", "train", dataset.tasks, data="own", description=other)
    one_sentence(raised, "data.description.tasks.x.unlisted is refuse there and ignore here")


def test_the_check_names_every_problem_by_file(own, caplog, capsys, tmp_path):
    for name in "bcd":
        save(own.root / f"x/{name}.png", ids(0))
    save(own.root / "x/A.PNG", ids(0))
    save(own.root / "x/b.png", ids(0, classes=9))
    (own.root / "x/c.png").write_bytes(b"")
    (own.root / "images/d.jpg").write_bytes((own.root / "images/d.jpg").read_bytes()[:300])
    own.describe(f"kind: classes, {NAMES}")
    with caplog.at_level(logging.INFO):
        assert prepare_data.main([str(own.root), "--check-only", "--out", str(tmp_path / "packed")]) == 2
    for words in ("missing  x/a.png (there is 'A.PNG'; rename it", "x/b.png: got", "x/c.png: got", "images/d.jpg: got"):
        assert words in caplog.text
    assert "1 of the files that the lists need are missing and 3 cannot be used" in capsys.readouterr().err


def test_random_maps_agree_with_the_slow_ones(own):
    rng = random.Random(0)
    for _ in range(5):
        stored = np.array(rng.sample(range(256), CLASSES), np.uint8)
        targets = [rng.choice(["sky", "road", "car", "tree", "man", "ignore"]) for _ in stored]
        text = ", ".join(f"{value}: {name}" for value, name in zip(stored, targets, strict=True))
        names = ["sky", "road", "car", "tree", "man"]
        table = {int(v): names.index(n) for v, n in zip(stored, targets, strict=True) if n != "ignore"}
        label = own.label(f"kind: classes, {NAMES}, id_map: {{{text}}}", stored[ids(1)])
        np.testing.assert_array_equal(label, slow_map(stored[ids(1)], table))


@pytest.mark.parametrize("tag", [3, 6])
def test_it_must_be_said_how_labels_lie_on_turned_pictures(own, tag, one_sentence):
    tags = Image.Exif()
    tags[0x0112] = tag
    stored = picture(5, shape=(24, 24) if tag == 6 else SHAPE)
    for name in "abcd":
        Image.fromarray(stored).save(own.root / f"images/{name}.jpg", exif=tags)
        save(own.root / f"x/{name}.png", np.zeros(stored.shape[:2], np.uint8))
    with pytest.raises(UserError) as raised:
        own.open("kind: mask").read(0)
    one_sentence(
        raised, "images/a.jpg", f"the orientation tag {tag}", "set orientation: upright (or stored) in dataset.yaml"
    )
    start = START + "orientation: stored\n"
    np.testing.assert_allclose(own.open("kind: mask", start=start)[0].image, stored, atol=255)


def test_names_by_the_ids_in_the_files(own):
    stored = np.array([7, 8, 11, 0, 255], np.uint8)[ids(0)]
    label = own.label("kind: classes, classes: {8: car, 0: sky, 7: 'no', 11: tree}", stored)
    assert own.open("kind: classes, classes: {8: car, 0: sky, 7: 'no', 11: tree}").tasks[0].class_names == (
        "sky", "no", "car", "tree")  # fmt: skip
    np.testing.assert_array_equal(label, slow_map(stored, {0: 0, 7: 1, 8: 2, 11: 3}))
    dense = own.describe("kind: classes, classes: {0: a, 1: b}").tasks["x"]
    assert dense.id_map is None and [each.name for each in dense.classes] == ["a", "b"]


def test_accents_that_are_composed_otherwise_are_shown_as_they_are(own):
    for name in "abcd":
        save(own.root / f"x/{name}.png", ids(0))
    save(own.root / "images/\u00e9.jpg", picture(0))
    save(own.root / "x/e\u0301.png", ids(0))
    with pytest.raises(UserError, match=r"got the file 'e\\u0301.png' for '\u00e9', wanted x/\u00e9.png"):
        own.open(f"kind: classes, {NAMES}")
