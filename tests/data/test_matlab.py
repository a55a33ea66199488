"""The reader of MATLAB files against scipy's, which is an independent one, and on bytes that are no such file."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.io import loadmat, savemat

from ase_dist.data import matlab
from ase_dist.data.matlab import Struct, Unread, read_variables
from ase_dist.errors import UserError

pytestmark = pytest.mark.single_gpu


def mat(compressed=False, **variables):
    buffer = io.BytesIO()
    savemat(buffer, variables, do_compression=compressed)
    return buffer.getvalue()


def struct(fields, rows):
    made = np.empty((1, len(rows)), [(field, object) for field in fields])
    for i, row in enumerate(rows):
        for field, value in zip(fields, row, strict=True):
            made[0, i][field] = value
    return made


def assert_same(ours, theirs):
    """``theirs`` as scipy reads it: structs are record arrays, text is an array of one string."""
    if isinstance(ours, Struct):
        records = theirs.ravel(order="F")
        assert len(records) == len(ours.elements)
        for element, record in zip(ours.elements, records, strict=True):
            assert list(element) == list(theirs.dtype.names)
            for name, value in element.items():
                assert_same(value, record[name])
    elif isinstance(ours, str):
        assert ours == (str(theirs.ravel()[0]) if theirs.size else "")
    else:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


NUMBERS = arrays.arrays(
    st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8", "i8"]),
    arrays.array_shapes(min_dims=2, max_dims=4, min_side=0, max_side=4),
)


@settings(max_examples=60, deadline=None)
@given(NUMBERS, NUMBERS, st.text(st.characters(max_codepoint=0x7E, min_codepoint=0x20), max_size=9), st.booleans())
def test_all_that_labels_hold_is_read_as_scipy_reads_it(one, two, text, compressed):
    parts = struct(("part_name", "mask"), [(text, one), ("nose", two)])
    content = mat(compressed, number=one, anno=struct(("name", "parts", "none"), [(text, parts, np.zeros((0, 0)))]))
    theirs = loadmat(io.BytesIO(content))
    ours = read_variables(content)
    assert list(ours) == ["number", "anno"]
    for name, value in ours.items():
        assert_same(value, theirs[name])
    assert list(read_variables(content, name="number")) == ["number"]


def test_the_other_order_of_bytes():
    """scipy writes this machine's order only: a matrix [2, 3] of double, by hand, as a big-endian machine has it."""
    words = lambda *values: np.array(values, ">u4").tobytes()  # noqa: E731
    body = words(6, 8, 6, 0) + words(5, 8, 2, 3) + words(1, 1) + b"d".ljust(8, b"\0")
    body += words(9, 48) + np.arange(6, dtype=">f8").tobytes()
    content = b"MATLAB 5.0".ljust(124) + b"\x01\x00MI" + words(14, len(body)) + body
    (value,) = read_variables(content).values()
    np.testing.assert_array_equal(value, [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(value, loadmat(io.BytesIO(content))["d"])


@pytest.mark.parametrize(
    ("value", "what"), [(np.array([["a"], [2]], object), "cell"), (np.array([[1 + 2j]]), "complex")]
)
def test_kinds_that_no_label_has_are_named(value, what):
    (found,) = read_variables(mat(x=value)).values()
    assert isinstance(found, Unread) and what in found.what


def test_version_7_3_and_4_are_refused_with_advice():
    with pytest.raises(UserError, match=r"7\.3.*save it again with -v7"):
        read_variables(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400))
    buffer = io.BytesIO()
    savemat(buffer, {"x": np.eye(3)}, format="4")
    with pytest.raises(UserError, match="no MATLAB file of version 5"):
        read_variables(buffer.getvalue())


def test_a_bomb_is_not_unpacked(monkeypatch):
    """1 MB of zeros in 1 kB, where 100 kB are allowed."""
    monkeypatch.setattr(matlab, "MOST_BYTES", 100_000)
    packed = zlib.compress(bytes(1 << 20))
    element = np.array([matlab.COMPRESSED, len(packed)], "<u4").tobytes() + packed
    with pytest.raises(UserError, match="more than 100000 bytes"):
        read_variables(b"MATLAB 5.0".ljust(124) + b"\x00\x01IM" + element)


def test_structs_without_end_are_refused():
    value = np.eye(1)
    for _ in range(matlab.DEEPEST + 2):
        value = struct(("in",), [(value,)])
    with pytest.raises(UserError, match="deep"):
        read_variables(mat(x=value))
