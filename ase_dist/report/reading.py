"""Reads files that may be missing, half-written or damaged, and keeps a sentence about each that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ase_dist.errors import UserError
from ase_dist.training.record.metrics import read_metrics

T = TypeVar("T")


class Reader:
    """Reads files; ``problems`` are sentences about the files that it could not read; missing files are no problem."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def json(self, path: Path) -> dict[str, Any]:
        """The object in a JSON file; {} where there is none."""
        return self.parsed(path, _object) or {}

    def parsed(self, path: Path, parse: Callable[[str], T]) -> T | None:
        """A file's text, parsed by ``parse``; None where there is no such file or it cannot be parsed."""
        if not path.exists():
            return None
        try:
            return parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            self.problems.append(f"{path.name} cannot be read: {' '.join(str(error).split())[:300]}.")
            return None

    def metrics(self, path: Path) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; none where it is damaged before its end."""
        try:
            return read_metrics(path)
        except (OSError, ValueError) as error:
            self.problems.append(f"{' '.join(str(error).split())}; the page shows no number of it.")
            return []


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise UserError("it holds no object")
    return found
