"""MATLAB files of version 5 to 7, as far as labels need them: matrices of numbers, text, and structs of these.

scipy's compiled reader can end the process on a damaged file. Here every length is checked against the bytes that there
are before anything is made of them. Source: MathWorks, "MAT-File Format" (2022), chapter 1.

A file is a header of 128 bytes and data elements. An element is a tag (type, number of bytes) and its content, padded
to 8 bytes; up to 4 bytes of content lie in the tag itself. A variable is an element of the type matrix, perhaps inside
a compressed one; its content is elements again: flags, sizes, name, and then the numbers, or the fields of a struct.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ase_dist.errors import UserError

HEADER = 128
MOST_BYTES = 1 << 28  # of all compressed variables of a file, unpacked
DEEPEST = 16  # structs in structs; those of the labels are 3 deep
COMPRESSED, MATRIX = 15, 14
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
TEXTS = {1: "latin-1", 2: "latin-1", 3: "utf-16", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
CELL, STRUCT, TEXT = 1, 2, 4
NUMERIC = range(6, 16)  # double, single, and whole numbers of 8 to 64 bits, signed and unsigned
OTHERS = {CELL: "a cell array", 3: "an object", 5: "a sparse matrix", 16: "a function", 17: "an object"}
IS_COMPLEX = 0x0800


@dataclass(frozen=True)
class Struct:
    """An array of structs: the fields of each element, column by column as MATLAB counts them."""

    elements: list[dict[str, Value]]


@dataclass(frozen=True)
class Unread:
    """A value of a kind that no label has; ``what`` it is."""

    what: str


Value = npt.NDArray[Any] | str | Struct | Unread


class _Element(NamedTuple):
    type: int
    content: memoryview


def read_variables(content: bytes, *, name: str | None = None) -> dict[str, Value]:
    """The variables of a file by name, or the one called ``name`` alone where it is there.

    Numbers have the type in which they are stored, which for whole numbers is often smaller than MATLAB's, and the
    shape that MATLAB shows. Raises UserError with a clause that says what is wrong with the bytes.
    """
    if content[HEADER - 4 : HEADER] == b"\x00\x02IM" or content[:8] == b"\x89HDF\r\n\x1a\n":
        raise UserError("MATLAB version 7.3, which is HDF5: save it again with -v7")
    order = {b"IM": "<", b"MI": ">"}.get(content[HEADER - 2 : HEADER])
    if order is None:
        raise UserError("no MATLAB file of version 5 to 7")
    found: dict[str, Value] = {}
    left = MOST_BYTES
    for element in _elements(memoryview(content)[HEADER:], order):
        inner = element
        if element.type == COMPRESSED:
            unpacker = zlib.decompressobj()
            unpacked = unpacker.decompress(element.content, left + 1)
            left -= len(unpacked)
            if left < 0:
                raise UserError(f"more than {MOST_BYTES} bytes when unpacked")
            if not unpacker.eof:
                raise UserError("a compressed variable is cut short")
            inner = next(_elements(memoryview(unpacked), order), element)
        if inner.type == MATRIX:
            variable, value = _matrix(inner.content, order, depth=0, only=name)
            if value is not None:
                found[variable] = value
    return found


def _elements(data: memoryview, order: str) -> Iterator[_Element]:
    """The elements that lie one after another in ``data``; UserError where one is longer than what is left."""
    position = 0
    while position + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, position)
        if kind >> 16:  # up to 4 bytes in the tag itself
            kind, size, start, end = kind & 0xFFFF, kind >> 16, position + 4, position + 8
            if size > 4:
                raise UserError(f"a short element of {size} bytes")
        else:
            start = position + 8
            end = start + size + (0 if kind == COMPRESSED else -size % 8)
        if start + size > len(data):
            raise UserError(f"an element of {size} bytes where {len(data) - start} are left")
        yield _Element(kind, data[start : start + size])
        position = end
    if position < len(data) and any(data[position:]):
        raise UserError("bytes after the last element")


def _part(parts: Iterator[_Element], what: str, types: Container[int]) -> _Element:
    """The next of the elements that a matrix consists of; UserError where it is none of these types."""
    element = next(parts, None)
    if element is None or element.type not in types:
        raise UserError(f"no {what} where it should be")
    return element


def _matrix(data: memoryview, order: str, *, depth: int, only: str | None = None) -> tuple[str, Value | None]:
    """Name and value of a matrix element; the value is None where ``only`` is another name."""
    if not data:
        return "", np.zeros((0, 0))
    parts = _elements(data, order)
    flags_bytes = _part(parts, "array flags", (6,)).content
    sizes = [size for (size,) in struct.iter_unpack(f"{order}i", _whole(_part(parts, "sizes", (5,)).content))]
    if len(flags_bytes) != 8 or not 2 <= len(sizes) <= 8 or min(sizes) < 0:
        raise UserError(f"a matrix of the sizes {sizes[:8]}")
    (flags,) = struct.unpack_from(f"{order}I", flags_bytes)
    kind = flags & 0xFF
    value: Value | None = None
    name = bytes(_part(parts, "name", (1, 2, 16)).content).decode("latin-1")
    if only is None or name == only:
        if kind in NUMERIC:
            value = Unread("complex numbers") if flags & IS_COMPLEX else _numbers(parts, order, sizes)
        elif kind == TEXT:
            value = _text(parts, order) if sizes[0] <= 1 else Unread("text of several lines")
        elif kind == STRUCT:
            value = _struct(parts, order, count=math.prod(sizes), size=len(data), depth=depth)
        else:
            value = Unread(OTHERS.get(kind, f"a value of the class {kind}"))
    return name, value


def _numbers(parts: Iterator[_Element], order: str, sizes: list[int]) -> npt.NDArray[Any]:
    element = _part(parts, "numbers", NUMBERS)
    dtype = np.dtype(order + NUMBERS[element.type])
    if len(element.content) != math.prod(sizes) * dtype.itemsize:
        raise UserError(f"{len(element.content)} bytes of numbers for a matrix of the sizes {sizes}")
    return np.frombuffer(element.content, dtype).astype(dtype.newbyteorder("=")).reshape(sizes, order="F")


def _text(parts: Iterator[_Element], order: str) -> str:
    element = next(parts, _Element(16, memoryview(b"")))  # an empty text may have none
    if element.type not in TEXTS:
        raise UserError("no text where it should be")
    codec = TEXTS[element.type]
    if codec in ("utf-16", "utf-32"):
        codec += "-le" if order == "<" else "-be"
    return bytes(element.content).decode(codec, errors="replace")


def _struct(parts: Iterator[_Element], order: str, *, count: int, size: int, depth: int) -> Struct:
    if depth >= DEEPEST:
        raise UserError(f"structs more than {DEEPEST} deep in each other")
    length_bytes = _part(parts, "length of field names", (5,)).content
    names = bytes(_part(parts, "field names", (1,)).content)
    length = struct.unpack(f"{order}i", length_bytes)[0] if len(length_bytes) == 4 else 0
    if not 0 < length <= max(64, len(names)) or len(names) % length:
        raise UserError("field names of another length than they say")
    starts = range(0, len(names), length)
    fields = [names[start : start + length].split(b"\0")[0].decode("latin-1") for start in starts]
    if count * max(1, len(fields)) * 8 > size:  # each field has a tag of its own
        raise UserError(f"a struct of {count} elements in {size} bytes")
    elements: list[dict[str, Value]] = []
    for _ in range(count):
        contents = [_part(parts, "field", (MATRIX,)).content for _ in fields]
        values = [_matrix(content, order, depth=depth + 1)[1] for content in contents]
        elements.append({key: value for key, value in zip(fields, values, strict=True) if value is not None})
    return Struct(elements)


def _whole(data: memoryview) -> memoryview:
    """Bytes of whole numbers of 32 bits."""
    if len(data) % 4:
        raise UserError(f"sizes of {len(data)} bytes")
    return data
