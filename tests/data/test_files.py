"""Reading files: what is accepted, and one sentence for each kind of damage."""

import errno
import io
import os

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from ase_dist.data.files import read_array, read_codes, read_image, read_variable
from ase_dist.errors import ExitCode, RunError, UserError

pytestmark = pytest.mark.single_gpu

GREY = {"modes": ("L", "P"), "wanted": "an 8-bit grey PNG"}


def test_grey_and_cmyk_pictures_become_rgb(tmp_path):
    Image.fromarray(np.full((4, 6), 77, np.uint8)).save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png") == np.full((4, 6, 3), 77)).all()
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(tmp_path / "grey.jpg")
    assert np.abs(read_image(tmp_path / "grey.jpg").astype(int) - 77).max() <= 1
    Image.new("CMYK", (6, 4), (0, 0, 0, 255)).save(tmp_path / "cmyk.jpg")
    assert read_image(tmp_path / "cmyk.jpg").shape == (4, 6, 3)


def test_one_bit_pictures_are_black_and_white(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_codes(tmp_path / "bits.png", modes=("1",), wanted="bits"), [[255, 0]])


def test_truncated_jpeg(tmp_path, one_sentence):
    path = tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match="unreadable") as raised:
        read_image(path)
    one_sentence(raised, path, "700 bytes", "wanted a picture")


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_empty_and_foreign_png(tmp_path, one_sentence, content):
    path = tmp_path / "label.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="unreadable") as raised:
        read_codes(path, **GREY)
    one_sentence(raised, path, f"{len(content)} bytes", "wanted an 8-bit grey PNG", "unpack the archive again")


def test_sixteen_bits(tmp_path, one_sentence):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((3, 3), 300, np.uint16)).save(path)
    with pytest.raises(ValueError, match="16-bit") as raised:
        read_codes(path, **GREY)
    one_sentence(raised, path, "wanted an 8-bit grey PNG")
    with pytest.raises(ValueError, match="wanted a picture of 8 bits"):
        read_image(path)


def test_wrong_colours(tmp_path, one_sentence):
    path = tmp_path / "colour.png"
    Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(path)
    with pytest.raises(ValueError, match="'RGB'") as raised:
        read_codes(path, **GREY)
    one_sentence(raised, path, "wanted an 8-bit grey PNG")


@pytest.mark.parametrize("read", [read_image, read_array, lambda path: read_variable(path, "x")])
def test_missing_file(tmp_path, one_sentence, read):
    with pytest.raises(ValueError, match="no such file") as raised:
        read(tmp_path / "2008_000008.xyz")
    one_sentence(raised, tmp_path / "2008_000008.xyz", "take '2008_000008' out of the list")


def test_matlab_file_without_the_variable(tmp_path, one_sentence):
    path = tmp_path / "other.mat"
    savemat(path, {"other": np.eye(2)})
    with pytest.raises(ValueError, match="without that variable") as raised:
        read_variable(path, "LabelMap")
    one_sentence(raised, path, "'LabelMap'")


@pytest.mark.parametrize("keep", [0, 10, 130, 190])
def test_truncated_matlab_file(tmp_path, one_sentence, keep):
    path = tmp_path / "cut.mat"
    savemat(path, {"LabelMap": np.arange(400).reshape(20, 20)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="LabelMap") as raised:
        read_variable(path, "LabelMap")
    one_sentence(raised, path, "got")


def test_arrays_are_never_unpickled(tmp_path, one_sentence):
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "many.npz", a=np.eye(2))
    for name in ("objects.npy", "many.npz"):
        with pytest.raises(ValueError, match="unreadable") as raised:
            read_array(tmp_path / name)
        one_sentence(raised, tmp_path / name, "plain numbers")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_network_that_fails_for_a_moment_is_no_fault_of_the_file(tmp_path, monkeypatch, code):
    """A RunError of the code after which a run is tried again; it names the file."""
    for name in ("a.png", "a.npy", "a.mat"):
        (tmp_path / name).write_bytes(b"x")

    def fails(*_args, **_options):
        raise OSError(code, "of the moment")

    monkeypatch.setattr(os, "open", fails)
    for read, name in ((read_image, "a.png"), (read_array, "a.npy"), (lambda path: read_variable(path, "x"), "a.mat")):
        with pytest.raises(RunError, match="of the moment") as raised:
            read(tmp_path / name)
        assert raised.value.exit_code is ExitCode.IO_ERROR and str(tmp_path / name) in str(raised.value)


def test_a_damaged_orientation_tag_is_none(tmp_path):
    picture = Image.fromarray(np.full((4, 6, 3), 9, np.uint8))
    picture.save(tmp_path / "a.jpg", exif=b"Exif\0\0not a tag at all")
    assert read_image(tmp_path / "a.jpg", labelled=True).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2),", "unreadable"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", "24 bytes, of which 16 are there"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 99999), }", "of which 0 are there"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2), }", "shape"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }", "of object"),
        ("[" * 2000, "unreadable"),
    ],
)
def test_headers_of_arrays_that_are_not_what_follows(tmp_path, one_sentence, header, said):
    """Nothing is allocated for a shape that is not there; numpy parses the header as Python and may raise anything."""
    text = header.ljust(9 + len(header)).encode() + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16))
    with pytest.raises(ValueError, match=said) as raised:
        read_array(tmp_path / "a.npy")
    one_sentence(raised, tmp_path / "a.npy", "NumPy .npy file")


@pytest.mark.parametrize(
    "array", [np.arange(6, dtype=">i4").reshape(2, 3), np.asfortranarray(np.eye(3)[:2]), np.array(7.0)]
)
def test_arrays_of_every_order_are_read_as_numpy_reads_them(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy"), np.load(tmp_path / "a.npy"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_too_many_pixels_and_a_program_are_not_opened(tmp_path, one_sentence):
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue())
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")
    for name, said in (("bomb.png", "12000 x 12000 pixels"), ("eps.png", "cannot identify")):
        for read in (read_image, lambda path: read_codes(path, **GREY)):
            with pytest.raises(UserError, match=said) as raised:
                read(tmp_path / name)
            one_sentence(raised, tmp_path / name)
