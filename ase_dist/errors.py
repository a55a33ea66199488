"""What ends a command, and how it is told: mistakes of users, faults of the moment, pydantic's refusals in words.

A ``UserError`` becomes one sentence and exit code 2. Every other exception is a bug, of this package or of an
extension: it keeps its traceback and ends the command with 1 (see ``ase_dist.training.process.exit_codes``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(ValueError):
    """A mistake that the user can mend: settings, options, files or shapes that do not fit.

    The message is one sentence: what, what was got, what was wanted, what to try.
    """


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """``, did you mean 'x'?`` for the closest of ``names``, or an empty string: the tail of an error message."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


class Problem(NamedTuple):
    """The first thing wrong with a tree of values."""

    kind: str  # pydantic's name of it, such as "extra_forbidden"
    keys: tuple[str, ...]  # from the top down to the value; none where the whole is wrong
    got: Any
    why: str  # a clause: "input should be a valid integer"

    @property
    def where(self) -> str:
        """The keys joined by dots."""
        return ".".join(self.keys)


def first_problem(error: ValidationError) -> Problem:
    """The first problem of a validation; a validator's own ValueError gives its words unchanged."""
    first = error.errors(include_url=False)[0]
    said = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"][0].lower() + first["msg"][1:]
    return Problem(first["type"], tuple(map(str, first["loc"])), first["input"], said)
