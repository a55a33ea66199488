"""Text to plain values by the type that is wanted, from YAML and from the command line.

YAML 1.1 silently reads ``no`` as false, ``0100`` as 64, ``12:30`` as 750, ``2024-11-25`` as a date, and drops what
follows `` #``. Where text is wanted, a YAML file gives the source text of such a value, and the command line gives what
was typed. Where a number is wanted, only decimal, 0x, 0o and 0b notation count. Values of the wrong type are passed on
as text, for the owner of the setting to refuse by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml

from ase_dist.errors import UserError

TypeOf = Callable[[str], Any]  # dotted key -> the annotation of its value; Any where nothing is known of it

_TAG = "tag:yaml.org,2002:"
_DECIMAL = re.compile(r"[-+]?[0-9][0-9_]*", re.ASCII)
_PREFIXED = re.compile(r"[-+]?0(?:x[0-9a-f_]+|o[0-7_]+|b[01_]+)", re.ASCII | re.IGNORECASE)
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+")  # YAML 1.1 wants a point and a sign
_NULL = ("null", "none", "~")
_EXACT = 2.0**53  # up to here a float holds every whole number
_TOO_LARGE = 2**64  # no setting, and nothing that a seed or a size goes to, takes a larger whole number
MOST_BYTES = 1 << 18  # of a YAML file; a config with every setting has 5 kB
MOST_VALUES = 20_000  # in a tree; aliases let a few lines stand for billions
DEEPEST = 32  # mappings and lists in each other


class WrittenAs(NamedTuple):
    """In the annotations of a pydantic field: the plain types in which its value is written, where it has its own."""

    type: Any


class _Loader(yaml.SafeLoader):
    """Safe YAML that knows 1e-4 as a number."""


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads back, so text such as 1e-4 is quoted."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(f"{_TAG}float", _EXPONENT, list("-+.0123456789"))  # type: ignore[no-untyped-call]


def to_yaml(tree: dict[str, Any]) -> str:
    """A plain tree as YAML in ASCII, which ``from_yaml`` reads back as it was."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False))


def from_yaml(text: str, type_of: TypeOf, *, key: str = "") -> Any:
    """The value of a YAML document; its parts have the types of their dotted keys, the whole that of ``key``.

    Raises yaml.YAMLError where ``text`` is not YAML, and UserError by key for tags other than plain YAML's, for a key
    that stands twice in one mapping, for an untyped number whose notation other readers take for another number, for
    more values than settings have (aliases count as what they stand for), and for text that no file can hold.
    """
    if len(text) > MOST_BYTES:
        raise UserError(f"{key or 'settings'}: got {len(text):,} characters of YAML, wanted at most {MOST_BYTES:,}")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is not None and (rest := text[node.end_mark.index :].partition("\n")[0].strip()) and key:
            raise UserError(f"{key}: {rest!r} after the value would not be read; leave it out")
        return None if node is None else _Reader(loader, type_of).value(node, type_of(key), key)
    except RecursionError:
        raise UserError(f"{key or 'settings'}: nested too deeply") from None
    except (ValueError, OverflowError) as error:  # \U00110000 and other characters that there are not
        if isinstance(error, UserError):
            raise
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def from_argument(text: str, type_of: TypeOf, *, key: str) -> Any:
    """The value of ``key=text`` on a command line.

    Text and paths are taken as typed; only ``null`` means no value where that is allowed. Lists and dictionaries are
    YAML. Raises UserError for these where they are not.
    """
    kinds = alternatives(type_of(key))
    if _take_text(kinds):
        return None if text == "null" and NoneType in kinds else text
    if Any in kinds and text.lstrip()[:1] not in ("[", "{", '"', "'"):
        return _untyped(text.strip(), _tag(text.strip()), key)
    if Any in kinds or any(_is_container(kind) for kind in kinds):
        try:
            return from_yaml(text, type_of, key=key)
        except yaml.YAMLError:
            raise UserError(f"{key}: {text!r} is not a YAML value; write lists as [a,b]") from None
    return None if NoneType in kinds and text.strip().lower() in _NULL else _number(text.strip(), kinds)


class _Reader:
    """Turns composed YAML nodes into plain values."""

    def __init__(self, loader: _Loader, type_of: TypeOf) -> None:
        self.loader, self.type_of = loader, type_of
        self.open: list[yaml.Node] = []  # the mappings and sequences around the node
        self.read: dict[tuple[int, Any], tuple[Any, int]] = {}  # a node is read once: an alias is no second one
        self.pairs: dict[int, dict[str, yaml.Node]] = {}  # of the mappings, merged ones included
        self.count = 0  # of the values so far, those that aliases stand for included

    def value(self, node: yaml.Node, wanted: Any, key: str) -> Any:
        known = (id(node), key if isinstance(node, yaml.MappingNode) and wanted is not Any else str(wanted))
        if known not in self.read:
            if node in self.open:
                raise UserError(f"{key}: the value is a part of itself")
            if len(self.open) > DEEPEST:
                raise UserError(f"{key or 'settings'}: nested more than {DEEPEST} deep")
            before = self.count
            self.open.append(node)
            found = self._value(node, wanted, key)
            self.open.pop()
            self.read[known] = found, self.count - before + 1
            self.count += 1
        else:
            self.count += self.read[known][1]
        if self.count > MOST_VALUES:
            raise UserError(
                f"{key or 'settings'}: more than {MOST_VALUES:,} values, those that aliases (*) stand for included"
            )
        return self.read[known][0]

    def _value(self, node: yaml.Node, wanted: Any, key: str) -> Any:
        kinds = alternatives(wanted)
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, wanted, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            lists = [get_args(kind) for kind in kinds if get_origin(kind) in (tuple, list)]
            inner = lists[0][0] if lists else Any
            return [self.value(each, inner, f"{key}.{i}") for i, each in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or node.tag.removeprefix(_TAG) not in (
            "str", "null", "bool", "int", "float", "timestamp", "value", "merge",
        ):  # fmt: skip
            raise UserError(f"{key}: not plain YAML: the tag {node.tag!r}")
        if node.tag == f"{_TAG}null":
            return None
        try:
            node.value.encode(errors="surrogateescape")  # which stand for bytes in names of files
        except UnicodeEncodeError:
            raise UserError(f"{key}: got {node.value!a:.80}, which has half a surrogate pair; leave it out") from None
        if _take_text(kinds):
            return str(node.value)
        return _untyped(node.value, node.tag, key) if Any in kinds else _number(node.value, kinds)

    def _mapping(self, node: yaml.MappingNode, wanted: Any, key: str) -> dict[str, Any]:
        found = {}
        for name, value in self._pairs(node, key).items():
            inner = f"{key}.{name}" if key else name
            found[name] = self.value(value, Any if wanted is Any else self.type_of(inner), inner)
        return found

    def _pairs(self, node: yaml.Node, key: str, *, depth: int = 0) -> dict[str, yaml.Node]:
        """The entries of a mapping, those that it merges (<<) first, so that its own win; of two merged the first wins.

        Own code, because PyYAML's lists every merged entry again: a few lines of merges can stand for billions.
        """
        if not isinstance(node, yaml.MappingNode) or depth > DEEPEST:
            raise UserError(f"{key or 'settings'}: got {'no mapping' if depth <= DEEPEST else 'a circle'} after <<")
        if id(node) in self.pairs:
            return self.pairs[id(node)]
        own: dict[str, yaml.Node] = {}
        merged: dict[str, yaml.Node] = {}
        lines: dict[str, int] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise UserError(f"{key or 'settings'}: got a list or a mapping as a key, wanted a name")
            if name.tag == f"{_TAG}merge":
                for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    merged = {**self._pairs(one, key, depth=depth + 1), **merged}
                continue
            text = str(name.value)
            where = f"{key}.{text}" if key else text
            if text in own:
                raise UserError(
                    f"{where}: stands twice, in lines {lines[text]} and {name.start_mark.line + 1}; keep one"
                )
            if not text.isprintable():
                raise UserError(f"{key or 'settings'}: got the key {text!a:.80}, wanted a name")
            lines[text] = name.start_mark.line + 1
            own[text] = value
        self.pairs[id(node)] = {**merged, **own}
        return self.pairs[id(node)]


def _tag(text: str) -> str:
    """YAML's tag for a plain scalar."""
    return str(_Loader("").resolve(yaml.ScalarNode, text, (True, False)))  # type: ignore[no-untyped-call]


def alternatives(wanted: Any) -> list[Any]:
    """The members of a union, what is annotated without its annotations."""
    if get_origin(wanted) is Annotated:
        return alternatives(get_args(wanted)[0])
    if get_origin(wanted) in (Union, UnionType):
        return [kind for each in get_args(wanted) for kind in alternatives(each)]
    return [wanted]


def annotation_at(wanted: Any, path: Sequence[str]) -> Any:
    """The annotation of what lies at ``path`` below a value of the type ``wanted``; Any where nothing is known of it.

    Goes through pydantic models by field, dictionaries by any key, lists and tuples by number.
    """
    for name in path:
        found = Any
        for kind in alternatives(wanted):
            if hasattr(kind, "model_fields") and name in kind.model_fields:
                field = kind.model_fields[name]
                found = next((m.type for m in field.metadata if isinstance(m, WrittenAs)), field.annotation)
            elif get_origin(kind) is dict:
                found = get_args(kind)[1]
            elif get_origin(kind) in (tuple, list) and name.isdigit():
                found = get_args(kind)[0]
        wanted = found
    return wanted


def _take_text(kinds: list[Any]) -> bool:
    return any(kind in (str, Path) or get_origin(kind) is Literal for kind in kinds)


def _is_container(kind: Any) -> bool:
    return get_origin(kind) in (tuple, list, dict) or (isinstance(kind, type) and hasattr(kind, "model_fields"))


def _number(text: str, kinds: list[Any]) -> Any:
    """The number that ``text`` is to a reader; ``text`` itself where it is none or none is wanted."""
    if int not in kinds and float not in kinds:
        return text
    base = 10 if _DECIMAL.fullmatch(text) else 0 if _PREFIXED.fullmatch(text) else None
    try:
        number = float(text if text.isascii() else "") if base is None else int(text.replace("_", ""), base)
    except ValueError:  # no number, or one of thousands of digits
        return text
    if abs(number) >= _TOO_LARGE and isinstance(number, int):
        return text
    if float in kinds or not (math.isfinite(number) and float(number).is_integer()):
        return number
    return int(number) if isinstance(number, int) or abs(number) <= _EXACT else text


def _untyped(text: str, tag: str, key: str) -> Any:
    """A plain scalar as YAML reads it, but dates stay text and no number is read by two bases."""
    kind = tag.removeprefix(_TAG)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("yes", "true", "on")
    if kind not in ("int", "float"):
        return text
    if ":" in text or (kind == "int" and re.fullmatch(r"[-+]?0[0-9_]+", text)):
        raise UserError(f"{key}: got {text}, which YAML does not read in base 10; write a decimal number, or quote it")
    number = re.sub(r"\.(inf|nan)", r"\1", text.lower()).replace("_", "")
    try:
        found = float(number) if kind == "float" else int(number, 0)
    except ValueError:
        raise UserError(f"{key}: got {text!r:.80}, wanted a number") from None
    if isinstance(found, int) and abs(found) >= _TOO_LARGE:
        raise UserError(f"{key}: got a number of {len(text)} digits, wanted one of at most 64 bits")
    return found
