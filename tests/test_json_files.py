"""JSON of others: what is JSON is read as Python reads it, what breaks later is refused in one sentence."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_dist.errors import UserError
from ase_dist.json_files import DEEPEST, json_digest, parse_json, read_json, read_object

pytestmark = pytest.mark.single_gpu

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(plain)
def test_plain_trees_come_back_as_they_were(tree):
    for text in (
        json.dumps(tree),
        json.dumps(tree, ensure_ascii=False).encode(),
        "\ufeff".encode() + json.dumps(tree).encode(),
    ):
        assert parse_json(text) == tree
    assert json_digest({"a": 1, "b": tree}) == json_digest({"b": tree, "a": 1})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the file is empty"),
        (b"{", "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested more than"),
        (b"[" * (DEEPEST + 2) + b"]" * (DEEPEST + 2), "nested more than"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' stands twice"),
        (b'{"a": NaN}', "nan is not finite"),
        (b"[-Infinity]", "-inf is not finite"),
        (b"[1e400]", "inf is not finite"),
        (b"[1%s]" % (b"0" * 400), "bits"),
        (b"[1%s]" % (b"0" * 9000), "not JSON"),
        (b'["\\ud800"]', "half a surrogate pair"),
        (b'{"\\ud800": 1}', "half a surrogate pair"),
    ],
)
def test_what_breaks_later_is_refused(tmp_path, one_sentence, data, said):
    with pytest.raises(UserError, match=said):
        parse_json(data)
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=said) as raised:
        read_json(path)
    one_sentence(raised, path)


def test_nan_is_read_where_it_is_allowed_and_bytes_of_file_names_always():
    assert str(parse_json('{"a": NaN}', allow_nan=True)) == "{'a': nan}"
    assert parse_json('["\\udcff"]') == ["\udcff"]


@pytest.mark.parametrize(
    ("text", "said"), [("[1]", "a list"), ("7", "a number"), ("true", "true or false"), ("null", "null")]
)
def test_an_object_is_wanted(tmp_path, one_sentence, text, said):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=f"holds {said}, wanted an object") as raised:
        read_object(tmp_path / "a.json")
    one_sentence(raised, tmp_path / "a.json")
