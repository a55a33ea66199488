"""What pydantic has refused, in words for one sentence."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import ValidationError


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
