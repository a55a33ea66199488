"""A data set as the loaders see it: a list of names, and a record for each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from torch.utils.data import Dataset

from ase_dist.data.batch import Record
from ase_dist.tasks import Task


class RecordDataset(Dataset[Record]):
    """The images ``names`` of one list with the labels of ``tasks``, at their original size.

    A subclass defines ``read`` and ``title``. With ``cache_in_memory`` a record stays in memory once it was read (in
    each process that reads it).
    """

    title: str

    def __init__(self, split: str, tasks: Sequence[Task], names: Sequence[str], *, cache_in_memory: bool) -> None:
        self.split = split
        self.tasks = tuple(tasks)
        self.names = list(names)
        self._cache: dict[int, Record] | None = {} if cache_in_memory else None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Record:
        if self._cache is None:
            return self.read(index)
        if index not in self._cache:
            self._cache[index] = self.read(index)
        return self._cache[index]

    def read(self, index: int) -> Record:
        """The record of ``names[index]``, decoded now; UserError for a file that does not hold what it should."""
        raise NotImplementedError


def data_fingerprint(dataset: RecordDataset) -> str:
    """SHA-256 of what is read: kind of data set, list, tasks and every name in order; the folder's path is not in it.

    Ranks compare it at the start: two nodes with different copies of the data must not train together. A packed data
    set has the fingerprint of the folder it was packed from.
    """
    facts = {
        "title": dataset.title,
        "split": dataset.split,
        "tasks": [task.name for task in dataset.tasks],
        "names": dataset.names,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def leave_out(tasks: Sequence[str], given: Sequence[str], *, how: str = "tasks=[{}]") -> str:
    """What to try where ``tasks``, some of ``given``, have no labels: the tail of an error; ``how`` to name tasks."""
    rest = [task for task in given if task not in tasks]
    if not rest:
        return f"name other tasks with {how.format('...')}"
    return f"leave {', '.join(tasks)} out with {how.format(','.join(rest))}"
