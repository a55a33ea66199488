"""NYUD_MT opened and read, in each of the published file types."""

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from ase_dist.data.labels import normals_from_codes
from ase_dist.data.nyud import NYUD
from ase_dist.tasks import select_tasks

pytestmark = pytest.mark.single_gpu

ALL = select_tasks("nyud")
SEMSEG = np.array([[0, 1, 40], [2, 255, 3]])
CLASSES = np.array([[255, 0, 39], [1, 255, 2]])
DEPTH = np.array([[0.5, np.nan, 9.9], [-1, np.inf, 0]])
METRES = np.array([[0.5, 0, 9.9], [0, 0, 0]], np.float32)


@pytest.fixture
def one(nyud):
    normals = np.full((2, 3, 3), 128)
    normals[0, 0] = (0, 128, 128)
    nyud.add("12", semseg=SEMSEG, depth=DEPTH, normals=normals, edge=[[0, 255, 0], [255, 0, 0]])
    return nyud


def test_every_label(one):
    labels = NYUD(one.root, "val", ALL)[0].labels
    np.testing.assert_array_equal(labels["semseg"], CLASSES)
    assert labels["semseg"].dtype == np.uint8
    np.testing.assert_array_equal(labels["depth"], METRES)
    assert labels["depth"].dtype == np.float32
    np.testing.assert_array_equal(labels["edge"], [[0, 1, 0], [1, 0, 0]])
    n = normals_from_codes(labels["normals"])
    np.testing.assert_allclose(n[:, 0, 0], [-1, 0, 0], atol=0.01)
    np.testing.assert_array_equal(n.reshape(3, -1)[:, 1:], 0)


def test_the_other_file_types(one):
    for folder, suffix in (("segmentation", "png"), ("depth", "npy"), ("images", "jpg")):
        (one.root / f"{folder}/12.{suffix}").unlink()
    savemat(one.path("segmentation/12.mat"), {"segmentation": SEMSEG.astype(np.uint16)})
    savemat(one.path("depth/12.mat"), {"depth": DEPTH})
    Image.fromarray(np.full((2, 3, 3), 9, np.uint8)).save(one.path("images/12.png"))
    record = NYUD(one.root, "train", ALL)[0]
    np.testing.assert_array_equal(record.labels["semseg"], CLASSES)
    np.testing.assert_array_equal(record.labels["depth"], METRES)
    assert (record.image == 9).all()


def test_vectors_and_edges_as_arrays(one):
    """As the repack of MTI-Net and ATRC has them."""
    n = np.zeros((2, 3, 3), np.float32)
    n[0, 1], n[1, 2] = (0.6, 0, -0.8), (0, 1, 0)
    np.save(one.path("normals/12.npy"), n)
    np.save(one.path("edge/12.npy"), np.array([[0, 0, 1], [0, 1, 0]], np.float64)[..., None])
    for folder in ("normals", "edge"):
        (one.root / f"{folder}/12.png").unlink()
    labels = NYUD(one.root, "val", ALL)[0].labels
    np.testing.assert_array_equal(labels["edge"], [[0, 0, 1], [0, 1, 0]])
    decoded = normals_from_codes(labels["normals"]).transpose(1, 2, 0)
    np.testing.assert_allclose(decoded, n, atol=0.01)
    np.testing.assert_array_equal(decoded[n.any(-1) == 0], 0)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((3, 2, 3), np.uint8), "type uint8"),
        (np.zeros((3, 2), np.float32), r"shape \(3, 2\)"),
        (np.full((2, 3, 3), 127.0), "from 127 to 127"),
        (np.full((2, 3, 3), np.nan), "from nan to nan"),
    ],
)
def test_vectors_of_another_form(one, one_sentence, array, said):
    np.save(one.path("normals/12.npy"), array)
    with pytest.raises(ValueError, match=said) as raised:
        NYUD(one.root, "val", ALL)[0]
    one_sentence(raised, "normals/12.npy", "components from -1 to 1")


def test_depth_of_another_size_is_resized(one):
    np.save(one.path("depth/12.npy"), DEPTH.repeat(2, 0).repeat(2, 1)[..., None])
    np.testing.assert_array_equal(NYUD(one.root, "val", ALL)[0].labels["depth"], METRES)


def test_class_out_of_range(one, one_sentence):
    Image.fromarray(np.full((2, 3), 41, np.uint8)).save(one.path("segmentation/12.png"))
    with pytest.raises(ValueError, match="from 41 to 41") as raised:
        NYUD(one.root, "val", ALL)[0]
    one_sentence(raised, "segmentation/12.png", "1..40")


def test_negative_class(one, one_sentence):
    (one.root / "segmentation/12.png").unlink()
    savemat(one.path("segmentation/12.mat"), {"segmentation": np.full((2, 3), -3)})
    with pytest.raises(ValueError, match="from -3 to -3") as raised:
        NYUD(one.root, "val", ALL)[0]
    one_sentence(raised, "segmentation/12.mat")


@pytest.mark.parametrize("array", [np.zeros((2, 3, 4)), np.array([["a"]])])
def test_depth_of_another_form(one, one_sentence, array):
    np.save(one.path("depth/12.npy"), array)
    with pytest.raises(ValueError, match="wanted a matrix of metres") as raised:
        NYUD(one.root, "val", ALL)[0]
    one_sentence(raised, "depth/12.npy", array.shape)


def test_missing_label(one, one_sentence):
    (one.root / "depth/12.npy").unlink()
    with pytest.raises(ValueError, match=r"depth/12\.npy") as raised:
        NYUD(one.root, "val", ALL)
    one_sentence(raised, "leave depth out with tasks=[semseg,normals,edge]")
