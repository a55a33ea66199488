"""Labels as bytes: the same back, and no changed byte unnoticed."""

import numpy as np
import pytest

from ase_dist.data.labels import compact_form
from ase_dist.data.packed.layout import pack_label, unpack_label

pytestmark = pytest.mark.single_gpu


def label_of(kind, shape=(6, 9)):
    full, dtype = compact_form(kind, shape)
    return np.random.default_rng(0).integers(0, 256, full).astype(dtype)


@pytest.mark.parametrize("kind", ["classes", "mask", "edges", "normals", "depth"])
def test_labels_come_back(kind):
    label = label_of(kind)
    for stored in (label, label.copy(order="F")):
        back = unpack_label(memoryview(pack_label(stored)), kind, (6, 9))
        assert back.dtype == label.dtype
        np.testing.assert_array_equal(back, label)


@pytest.mark.parametrize("smooth", [False, True])
def test_any_changed_or_missing_byte_is_found(smooth):
    label = np.repeat(label_of("classes", (6, 3)), 3, axis=1) if smooth else label_of("classes")
    frame = pack_label(label)
    damaged = [frame[:i] + bytes([frame[i] ^ (1 << bit)]) + frame[i + 1 :] for i in range(len(frame)) for bit in (0, 5)]
    for one in (*damaged, *(frame[:keep] for keep in range(len(frame)))):
        try:
            back = unpack_label(memoryview(one), "classes", (6, 9))
        except ValueError:
            continue
        np.testing.assert_array_equal(back, label)  # a bit that says nothing


def test_another_size_is_found():
    with pytest.raises(ValueError, match="another size"):
        unpack_label(memoryview(pack_label(label_of("mask"))), "mask", (6, 8))
