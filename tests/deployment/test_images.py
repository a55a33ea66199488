"""Whatever form a picture has, it becomes upright RGB of 8 bits; what is none is told."""

import numpy as np
import pytest
from PIL import Image

from ase_dist.deployment.images import find_images, formats, read_rgb, to_rgb

from .conftest import photo

pytestmark = pytest.mark.single_gpu
RGB = photo()
GREY = RGB[:, :, 0]


def grey3(values):
    return np.repeat(values[:, :, None], 3, axis=2)


@pytest.mark.parametrize("form", ["png", "bmp", "tiff", "webp", "ppm"])
def test_lossless_files_come_back_as_they_were(form, tmp_path):
    path = tmp_path / f"a.{form}"
    Image.fromarray(RGB).save(path, **({"lossless": True} if form == "webp" else {}))
    np.testing.assert_array_equal(read_rgb(path), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_tag_is_applied(orientation, tmp_path):
    """The stored pixels are those of a camera that was held otherwise; read, the picture stands as it was seen."""
    stored = {
        1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, 1), 7: RGB[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(RGB, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), RGB)


def test_grey_palette_and_bits(tmp_path):
    for name, picture in {
        "grey": Image.fromarray(GREY),
        "palette": Image.fromarray(RGB).quantize(16),
        "bits": Image.fromarray(GREY > 100),
        "cmyk": Image.fromarray(RGB).convert("CMYK"),
    }.items():
        path = tmp_path / f"{name}.{'tiff' if name == 'cmyk' else 'png'}"
        picture.save(path)
        np.testing.assert_array_equal(read_rgb(path), np.asarray(picture.convert("RGB")))
    np.testing.assert_array_equal(read_rgb(tmp_path / "grey.png"), grey3(GREY))
    np.testing.assert_array_equal(read_rgb(tmp_path / "bits.png"), grey3(np.where(GREY > 100, 255, 0)))


def test_sixteen_bits_are_the_whole_range(tmp_path):
    deep = GREY.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), grey3(GREY))
    for values in (deep, deep.astype(np.int32)):
        np.testing.assert_array_equal(to_rgb(values), grey3(GREY))


def test_transparent_pixels_lie_on_white(tmp_path):
    alpha = np.zeros_like(GREY)
    alpha[:, 20:] = 255
    expected = np.where(alpha[:, :, None] == 255, RGB, 255)
    rgba = np.dstack((RGB, alpha))
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), expected)
    np.testing.assert_array_equal(to_rgb(rgba), expected)
    Image.fromarray(np.dstack((GREY, alpha))).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "b.png"), np.where(alpha[:, :, None] == 255, grey3(GREY), 255))
    palette = Image.fromarray(RGB).quantize(8)
    palette.info["transparency"] = int(np.asarray(palette)[0, 0])
    assert (to_rgb(palette)[np.asarray(palette) == palette.info["transparency"]] == 255).all()


@pytest.mark.parametrize("values", [RGB, GREY, GREY[:, :, None], GREY > 100, RGB / 255, (RGB / 255).astype(np.float32)])
def test_arrays_of_every_kind(values):
    expected = RGB if values.shape[-1:] == (3,) else grey3(GREY if values.dtype == np.uint8 else 255 * (GREY > 100))
    got = to_rgb(values)
    assert got.dtype == np.uint8 and got.flags.writeable
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 3, 4, 3), np.uint8), r"got an array \[2, 3, 4, 3\], wanted \[H, W\]"),
        (np.zeros((3, 40, 50), np.uint8), r"got an array \[3, 40, 50\]"),
        (np.zeros((0, 5), np.uint8), r"got an array \[0, 5\]"),
        (np.full((4, 4), 3.0), r"got float64 from 3.0 to 3.0, wanted bytes"),
        (np.full((4, 4), np.nan), r"got float64 from nan"),
        (np.full((4, 4), -1), r"got int64 from -1"),
        (np.full((4, 4), "a"), r"got an array of <U1"),
    ],
)
def test_arrays_that_are_no_picture_are_told(values, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(values)


def test_broken_files_are_one_sentence(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(RGB).save(whole)
    for name, data in {
        "cut.jpg": whole.read_bytes()[:200], "empty.png": b"", "text.png": b"hello", "eps.eps": b"%!PS-Adobe-3.0 EPSF",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name) as error:
            read_rgb(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"gone\.png: .*No such file"):
        read_rgb(tmp_path / "gone.png")
    bomb = tmp_path / "bomb.pgm"
    bomb.write_bytes(b"P5 60000 60000 255\n")
    with pytest.raises(ValueError, match=r"bomb\.pgm: .*exceeds limit"):
        read_rgb(bomb)


def test_files_that_another_program_would_open_are_not():
    assert "EPS" not in formats() and {"JPEG", "PNG", "TIFF", "WEBP", "GIF"} <= set(formats())


def test_folders_are_searched_in_order_without_what_is_no_picture(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.png", "sub/c.webp", "out/d.png", "doc.pdf", ".git/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path, without=tmp_path / "out")]
    assert found == ["a.png", "b.JPG", "sub/c.webp"]
