"""Changes of a file's bytes, as Hypothesis draws and shrinks them and as a seeded generator draws thousands of them."""

import contextlib
import json
import math
import random

import yaml
from hypothesis import strategies as st

# What stands where something else is wanted. Text is inserted as it is; values replace one in a tree.
TOKENS = (
    *(b"", b"\0", b"\xff\xfe", b"[" * 5000, b"{" * 300, b'{"a":' * 3000, b"1" + b"0" * 400, b"9" * 5000),
    *(b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"-1", b"0", b"[]", b"{}", b'""', b'"\\ud800"', b"\n", b"\r\n"),
    *(b"  ", b"# ", b"- ", b"&a ", b"*a", b"<<: *a", b"!!python/object:os.system ", b"../../x", b"x" * 300),
    *(b"\xed\xa0\x80", b"\xc3", b"\x1b[31m"),
)
VALUES = (
    *(None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64, 10**400, -(10**20), math.nan, math.inf, 1e308),
    *("", "x", "x" * 300, "\ud800", "\n", "../x"),
    *([], {}, [[]], [None], {"a": 1}, {"": []}, [1, 2, 3], ["a"], [-1, 10**30]),
)
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40)
KINDS = ("flip", "byte", "number", "delete", "repeat", "insert", "cut", "zero", "value", "drop", "deepen")

change = st.tuples(st.sampled_from(KINDS), st.floats(0, 1, exclude_max=True), st.integers(0, 2**16 - 1))
changes = st.lists(change, min_size=1, max_size=4)


def drawn(rng: random.Random):
    """As ``changes`` draws them."""
    return [(rng.choice(KINDS), rng.random(), rng.randrange(2**16)) for _ in range(rng.choice((1, 1, 1, 2, 4)))]


def mutated(data: bytes, drawn_changes) -> bytes:
    """``data`` with each of the changes (kind, place between 0 and 1, number) made in turn."""
    for kind, place, number in drawn_changes:
        if kind in ("value", "drop", "deepen"):
            data = _changed_tree(data, kind, place, number)
            continue
        at, length = int(place * len(data)), 1 + number % 64
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << number % 8]) + data[at + 1 :]
        elif kind == "byte":
            data = data[:at] + bytes([number % 256]) + data[at + 1 :]
        elif kind == "number":
            size = (1, 2, 4, 8)[number % 4]
            value = NUMBERS[number // 4 % len(NUMBERS)] % 256**size
            data = data[:at] + value.to_bytes(size, ("little", "big")[number % 2]) + data[at + size :]
        elif kind == "delete":
            data = data[:at] + data[at + length :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + length] * (1 + number % 9) + data[at + length :]
        elif kind == "insert":
            data = data[:at] + TOKENS[number % len(TOKENS)] + data[at:]
        elif kind == "cut":
            data = data[:at]
        elif kind == "zero":
            data = data[:at] + bytes(length) + data[at + length :]
    return data


def _changed_tree(data: bytes, kind: str, place: float, number: int) -> bytes:
    """A value of a JSON or YAML tree replaced, left out or wrapped in lists; other data as they were."""
    try:
        text = data.decode()
        lines = text.splitlines(keepends=True)
        line = int(place * 977 % 1 * len(lines)) if len(lines) > 1 and all(x.startswith("{") for x in lines) else None
        part = text if line is None else lines[line]  # of a file with one object a line, one of them
        tree = json.loads(part) if part.startswith(("{", "[")) else yaml.safe_load(part)
    except (ValueError, yaml.YAMLError, RecursionError, AttributeError):
        return data
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)) and len(places) < 5000:
                walk(node[key])

    if isinstance(tree, (dict, list)):
        with contextlib.suppress(RecursionError):
            walk(tree)
    if not places:
        return data
    node, key = places[int(place * len(places))]
    if kind == "value":
        node[key] = VALUES[number % len(VALUES)]
    elif kind == "drop":
        del node[key]
    else:
        for _ in range((3, 40, 200)[number % 3]):
            node[key] = [node[key]]
    try:
        new = json.dumps(tree, default=str)
    except (ValueError, RecursionError):
        return data
    return (new if line is None else "".join([*lines[:line], new + "\n", *lines[line + 1 :]])).encode()
