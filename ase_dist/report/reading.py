"""Reads files that may be missing, half-written or damaged, and keeps a sentence about each that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ase_dist.files import read_text
from ase_dist.json_files import read_object
from ase_dist.training.record.metrics import read_metrics

T = TypeVar("T")


class Reader:
    """Reads files; ``problems`` are sentences about the files that it could not read; missing files are no problem."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def json(self, path: Path) -> dict[str, Any]:
        """The object in a JSON file; {} where there is none, or where it cannot be read."""
        return self._tried(path, lambda: read_object(path, allow_nan=True)) or {}

    def parsed(self, path: Path, parse: Callable[[str], T]) -> T | None:
        """A file's text, parsed by ``parse``; None where there is no such file or it cannot be parsed."""
        return self._tried(path, lambda: parse(read_text(path)))

    def _tried(self, path: Path, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).replace(f"{path}: ", "").split()).rstrip(".")
            self.problems.append(f"{path.name} cannot be read: {reason:.300}.")
            return None

    def metrics(self, path: Path) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; none where it is damaged before its end."""
        try:
            return read_metrics(path)
        except (OSError, ValueError) as error:
            self.problems.append(f"{' '.join(str(error).split())}; the page shows no number of it.")
            return []
