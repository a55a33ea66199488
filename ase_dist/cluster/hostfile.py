"""Reads, checks and writes hostfiles: lines of ``host slots=N`` that DeepSpeed, pdsh and a shell do not misread.

DeepSpeed (0.19.8) takes any text without spaces for a host and hands it to pdsh, which expands ``n[1-3]``, and to a
shell; it stops reading after the digits of ``slots=2x``. So names are checked here first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ase_dist import files
from ase_dist.errors import UserError, file_error

MOST_SLOTS = 64  # per machine: more is a typing error
_HOST = re.compile(r"(?:[A-Za-z_][A-Za-z0-9_-]*@)?[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_LOCAL = ("localhost", "127.0.0.1")
_WANTED = "wanted 'host slots=N'"


class Node(NamedTuple):
    """A machine of the job, and how many ranks it runs."""

    host: str
    slots: int

    @property
    def address(self) -> str:
        """The host without the user to log in as."""
        return self.host.rpartition("@")[2]


def read_hostfile(path: str | Path) -> tuple[Node, ...]:
    """The nodes of a hostfile in its order; UserError for the first mistake in it."""
    nodes, problems = parse_hostfile(read_text(path), name=str(path))
    if problems:
        raise UserError(problems[0])
    return nodes


def read_text(path: str | Path) -> str:
    """A hostfile's text; UserError where it cannot be read."""
    try:
        return files.read_text(path)
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        sentence = f"hostfile: cannot read {str(path)!r} ({reason}); wanted lines such as 'n1 slots=8'"
        raise file_error(error, sentence) from None


def parse_hostfile(text: str, *, name: str = "hostfile") -> tuple[tuple[Node, ...], list[str]]:
    """The nodes of a hostfile's text, and one sentence for each line that cannot be used, ``name`` and number first."""
    nodes: list[Node] = []
    problems: list[str] = []
    lines = {number: line.split("#")[0].split() for number, line in enumerate(text.splitlines(), 1)}
    for number, words in lines.items():
        if not words:
            continue
        try:
            nodes.append(_parse_line(words, taken={node.host: node for node in nodes}))
        except UserError as error:
            problems.append(f"{name}, line {number}: {error}")
    local = next((node.host for node in nodes if node.host in _LOCAL), None)
    if local and len(nodes) > 1:
        problems.append(f"{name}: {local!r} among {len(nodes)} hosts means another machine on each of them; name it")
    if not nodes and not problems:
        problems.append(f"{name}: got no host, {_WANTED} on at least one line")
    return tuple(nodes), problems


def write_hostfile(path: str | Path, nodes: Iterable[Node]) -> None:
    """Write a hostfile atomically."""
    files.write_atomic(path, "".join(f"{node.host} slots={node.slots}\n" for node in nodes))


def _parse_line(words: list[str], *, taken: dict[str, Node]) -> Node:
    host, *rest = words
    if not _HOST.fullmatch(host):
        odd = sorted(set(re.sub(r"[A-Za-z0-9._-]", "", host)))
        what = f"the characters {' '.join(odd):.80} in it" if odd else "such a beginning or end"
        raise UserError(f"got the host {host!r:.80}, and {what} mean something else to a shell or to pdsh; {_WANTED}")
    if len(rest) != 1 or not (found := re.fullmatch(r"slots=(.*)", rest[0])):
        raise UserError(f"got {' '.join(words)!r:.80}, {_WANTED}")
    if not re.fullmatch(r"[0-9]{1,9}", found[1]) or not 1 <= int(found[1]) <= MOST_SLOTS:
        raise UserError(f"got slots={found[1]:.80} for {host:.80}, wanted a whole number from 1 to {MOST_SLOTS}")
    if host in taken:
        raise UserError(f"{host:.80} is listed twice; write one line with the sum of its slots")
    return Node(host, int(found[1]))
