"""Label files decoded to arrays computed by hand or by a slow reference."""

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import laplace
from skimage.morphology import thin as thin_everywhere

from ase_dist.data import decode
from ase_dist.data.labels import (
    codes_from_normals,
    fit_label,
    fit_normals,
    ignored_label,
    label_tensor,
    normals_from_codes,
)

pytestmark = pytest.mark.single_gpu

LEFT = np.array([[1, 0, 0], [1, 0, 0]], bool)
TOP = np.array([[1, 1, 1], [0, 0, 0]], bool)
NONE = np.zeros((2, 3), bool)


# --- semseg ----------------------------------------------------------------------------------------------------------


def test_semseg_is_the_palette_index(pascal):
    ids = np.arange(22).reshape(2, 11)
    ids[1, 10] = 255
    pascal.semseg("a", ids)
    decoded = decode.class_ids(pascal.root / "semseg/VOC12/a.png", (2, 11))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, ids)


def test_semseg_out_of_range(pascal, one_sentence):
    pascal.semseg("a", [[0, 20, 21, 254, 255]])
    with pytest.raises(ValueError, match="2 pixels with ids from 21 to 254") as raised:
        decode.class_ids(pascal.root / "semseg/VOC12/a.png", (1, 5))
    one_sentence(raised, "semseg/VOC12/a.png", "wanted", "0..20", "unpack")


# --- human parts -----------------------------------------------------------------------------------------------------


def parts_of(pascal, things, shape=(2, 3)):
    pascal.parts("a", things)
    return decode.human_parts(pascal.root / "human_parts/a.mat", shape)


def test_parts_overwrite_in_file_order(pascal):
    things = [
        (15, ~NONE, [("torso", TOP), ("hair", LEFT)]),
        (12, ~NONE, [("head", ~NONE)]),  # a dog
        (15, ~NONE, [("lhand", ~TOP & LEFT)]),
    ]
    np.testing.assert_array_equal(parts_of(pascal, things), [[1, 2, 2], [4, 0, 0]])


@pytest.mark.parametrize(
    "things",
    [
        [],
        [(12, ~NONE, [("head", LEFT)])],
        [(15, ~NONE, [])],
        [(15, ~NONE, [("head", NONE)])],
    ],
    ids=["no object", "no person", "a person without parts", "an empty mask"],
)
def test_no_annotated_person_is_wholly_ignored(pascal, things):
    np.testing.assert_array_equal(parts_of(pascal, things, shape=(4, 5)), np.full((4, 5), 255))


def test_part_names():
    groups = {
        1: {"hair", "head", "lear", "rear", "lebrow", "rebrow", "leye", "reye", "mouth", "nose"},
        2: {"neck", "torso"},
        3: {"luarm", "ruarm"},
        4: {"llarm", "rlarm", "lhand", "rhand"},
        5: {"luleg", "ruleg"},
        6: {"llleg", "rlleg", "lfoot", "rfoot"},
    }
    assert {i: {n for n, j in decode.PART_IDS.items() if i == j} for i in groups} == groups


def test_parts_are_resized_to_the_image(pascal):
    decoded = parts_of(pascal, [(15, ~NONE, [("neck", LEFT)])], shape=(4, 6))
    np.testing.assert_array_equal(decoded, 2 * LEFT.repeat(2, 0).repeat(2, 1))


def test_unknown_part(pascal, one_sentence):
    with pytest.raises(ValueError, match="'tail'") as raised:
        parts_of(pascal, [(15, ~NONE, [("tail", LEFT)])])
    one_sentence(raised, "human_parts/a.mat", "wanted one of", "torso")


def test_part_masks_of_two_shapes(pascal, one_sentence):
    with pytest.raises(ValueError, match=r"\(3, 2\)") as raised:
        parts_of(pascal, [(15, ~NONE, [("head", LEFT), ("nose", LEFT.T)])])
    one_sentence(raised, "human_parts/a.mat", "'nose'", "(2, 3)")


@pytest.mark.parametrize("anno", [np.eye(3), np.array([["text"]], dtype=object), np.zeros((0, 0))])
def test_struct_of_another_layout(tmp_path, one_sentence, anno):
    savemat(tmp_path / "a.mat", {"anno": anno})
    with pytest.raises(ValueError, match="another layout") as raised:
        decode.human_parts(tmp_path / "a.mat", (2, 3))
    one_sentence(raised, tmp_path / "a.mat", "wanted the PASCAL-Part struct")


# --- saliency --------------------------------------------------------------------------------------------------------


def test_saliency_threshold(pascal):
    pascal.saliency("a", [[0, 1, 127, 128, 255]])
    decoded = decode.mask(pascal.root / "sal_distill/a.png", (1, 5))
    np.testing.assert_array_equal(decoded, [[0, 0, 0, 1, 1]])


# --- edges -----------------------------------------------------------------------------------------------------------


def test_boundary_of_two_halves_is_one_pixel_wide():
    ids = np.zeros((6, 8), np.int32)
    ids[:, 4:] = 431
    edges = decode.boundaries(ids)
    assert edges.dtype == np.uint8
    assert edges.sum(axis=1).max() == 1
    assert edges.sum() >= 5  # thinning takes a corner pixel off the end of a line
    assert set(np.flatnonzero(edges.any(axis=0))) <= {3, 4}


def test_boundaries_equal_the_slow_reference():
    rng = np.random.default_rng(3)
    for shape in [(1, 1), (1, 6), (5, 7), (24, 30)]:
        ids = rng.integers(0, 3, shape).repeat(2, 0).repeat(3, 1).astype(np.int32)
        small = np.pad(ids[:4, :5], ((3, 0), (2, 7)))
        for each in (ids, small, small.T, np.zeros_like(ids)):
            reference = thin_everywhere(laplace(each, mode="mirror") != 0)
            np.testing.assert_array_equal(decode.boundaries(each), reference)


def test_label_map_keeps_sixteen_bits_and_is_resized_nearest(pascal):
    pascal.label_map("a", [[1, 459], [60000, 0]])
    path = pascal.root / "pascal-context/trainval/a.mat"
    np.testing.assert_array_equal(decode.label_map(path, (2, 2)), [[1, 459], [60000, 0]])
    np.testing.assert_array_equal(decode.label_map(path, (2, 4)), [[1, 1, 459, 459], [60000, 60000, 0, 0]])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros((2, 2, 3)), r"shape \(2, 2, 3\)"),
        (np.array([[0.5]]), "0.5"),
        (np.array([[-1]]), "-1"),
        (np.array([[np.nan]]), "nan"),
        (np.array([["x"]], dtype=object), "a cell array in LabelMap"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_label_map_of_another_form(tmp_path, one_sentence, value, said):
    savemat(tmp_path / "a.mat", {"LabelMap": value})
    with pytest.raises(ValueError, match=said) as raised:
        decode.label_map(tmp_path / "a.mat", (2, 2))
    one_sentence(raised, tmp_path / "a.mat", "LabelMap", "wanted")


# --- normals ---------------------------------------------------------------------------------------------------------


def test_normals_ids():
    assert len(decode.NORMALS_IDS) == 170
    assert list(decode.NORMALS_IDS) == sorted(set(decode.NORMALS_IDS))
    assert {3, 213, 457} <= set(decode.NORMALS_IDS)
    assert not {0, 2, 431, 459} & set(decode.NORMALS_IDS)


def test_distilled_normals(pascal):
    pascal.normals("a", [[[255, 128, 128], [0, 0, 0], [127, 128, 127], [10, 200, 30]]])
    ids = np.array([[3, 457, 4, 431]], np.int32)
    codes = decode.distilled_normals(pascal.root / "normals_distill/a.png", ids)
    n = normals_from_codes(codes)
    tiny = 1 / 255
    np.testing.assert_allclose(n[:, 0, 0], np.array([1, tiny, tiny]) / np.sqrt(1 + 2 * tiny**2), atol=1e-6)
    np.testing.assert_allclose(n[:, 0, 1], -np.ones(3) / np.sqrt(3), atol=1e-6)
    np.testing.assert_array_equal(n[:, 0, 2:], 0)  # grey is the zero vector; 431 is not a trusted class


def test_grey_normals_are_rejected(tmp_path, one_sentence):
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="'L'") as raised:
        decode.normals(tmp_path / "a.png", (3, 3))
    one_sentence(raised, "wanted an RGB picture")


def test_normals_survive_their_codes():
    rng = np.random.default_rng(0)
    n = rng.normal(size=(3, 20, 30)).astype(np.float32)
    n /= np.linalg.norm(n, axis=0)
    n[:, 0] = 0
    back = normals_from_codes(codes_from_normals(n))
    np.testing.assert_array_equal(back[:, 0], 0)
    assert np.abs(np.linalg.norm(back[:, 1:], axis=0) - 1).max() < 1e-6
    angles = np.degrees(np.arccos(np.clip((back * n).sum(0)[1:], -1, 1)))
    assert angles.max() < 0.4


def test_resized_normals_lie_between_their_neighbours():
    turn = np.linspace(0, 1, 9)
    n = np.stack([np.sin(turn), 0 * turn, np.cos(turn)])[:, None].repeat(4, 1)
    resized = normals_from_codes(fit_normals(codes_from_normals(n), (8, 18)))
    centres = np.clip((np.arange(18) + 0.5) / 2 - 0.5, 0, 8) / 8
    expected = np.stack([np.sin(centres), 0 * centres, np.cos(centres)])[:, None].repeat(8, 1)
    assert (resized * expected).sum(0).min() > np.cos(np.radians(0.5))


# --- sizes and forms -------------------------------------------------------------------------------------------------


def test_fit_label_takes_the_pixel_under_the_centre():
    label = np.arange(12).reshape(3, 4)
    assert fit_label(label, (3, 4)) is label
    np.testing.assert_array_equal(fit_label(label, (6, 8)), label.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(fit_label(label, (1, 2)), [[5, 7]])


@pytest.mark.parametrize("kind", ["classes", "mask", "edges", "normals", "depth"])
def test_ignored_labels_become_the_tables_ignored_values(kind):
    tensor = label_tensor(kind, ignored_label(kind, (2, 3)))
    shape = {"normals": (3, 2, 3), "depth": (1, 2, 3)}.get(kind, (2, 3))
    assert tuple(tensor.shape) == shape
    assert (tensor == (0 if kind in {"normals", "depth"} else 255)).all()
