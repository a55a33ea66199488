"""The size of an image that a model sees or a scene is rendered at, and the one form in which it is written.

Height comes before width, as in the shape of a tensor. A square is written as its side, 224. A rectangle is the list
[448, 576] in YAML and JSON and 448x576 in text; both are read everywhere.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ase_dist.errors import UserError

WANTED = "the side of a square such as 224, or height x width such as 448x576 or [448, 576]"
_TEXT = re.compile(r"([0-9]{1,9})(?:\s*[xX]\s*([0-9]{1,9}))?|\[\s*([0-9]{1,9})\s*,\s*([0-9]{1,9})\s*\]", re.ASCII)


class ImageSize(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int

    @classmethod
    def read(cls, value: object) -> ImageSize:
        """The size that a number, [height, width], a text such as 448x576 or a size says; UserError for all else."""
        sides: list[object]
        if isinstance(value, str):
            found = _TEXT.fullmatch(value.strip())
            texts = [] if found is None else [text for text in found.groups() if text]
            sides = [int(text) for text in (texts * 2 if len(texts) == 1 else texts)]
        else:
            sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
        whole = [int(side) for side in sides if isinstance(side, (int, float)) and _is_whole(side)]
        if len(sides) != 2 or len(whole) != 2:
            raise UserError(f"got {value!r:.80}, wanted {WANTED}")
        return cls(*whole)

    @property
    def is_square(self) -> bool:
        """Whether both sides are equal."""
        return self.height == self.width

    @property
    def written(self) -> int | list[int]:
        """What YAML and JSON hold: the side of a square, [height, width] of a rectangle."""
        return self.height if self.is_square else [self.height, self.width]

    def within(self, least: int, most: int) -> ImageSize:
        """The size itself; UserError where a side has fewer than ``least`` or more than ``most`` pixels."""
        if min(self) < least or max(self) > most:
            raise UserError(f"got {self}, wanted sides of {least} to {most:,} pixels")
        return self

    def require_divisible(self, by: int, *, what: str) -> None:
        """UserError for ``data.size``, with the nearest sizes that fit, where ``by`` pixels do not divide a side."""
        if self.height % by or self.width % by:
            below = ImageSize(self.height // by * by, self.width // by * by)
            above = ImageSize(-(-self.height // by) * by, -(-self.width // by) * by)
            near = " or ".join(str(fit) for fit in (below, above) if min(fit))
            raise UserError(f"data.size: got {self}, which {what} do not divide; take {near}")

    def __str__(self) -> str:
        """The text form: 224, 448x576."""
        return str(self.height) if self.is_square else f"{self.height}x{self.width}"


def _is_whole(side: float) -> bool:
    return not isinstance(side, bool) and abs(side) < 1e9 and side == int(side)
