"""A data set as the loaders see it: a list of names, and a record for each."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence

from torch.utils.data import Dataset

from ase_dist.data.batch import Record
from ase_dist.errors import UserError
from ase_dist.tasks import Task

LOGGER = logging.getLogger("ase_dist")


class RecordDataset(Dataset[Record]):
    """The images ``names`` of one list with the labels of ``tasks``, at their original size.

    A subclass defines ``read`` and ``title``. With ``cache_in_memory`` a record stays in memory once it was read (in
    each process that reads it). ``absent`` has, by task, the indices of the images that lack a label of it; their
    records are without it.
    """

    title: str
    sets: Mapping[str, frozenset[str]] = {}  # the tasks of each of several data sets that are mixed
    absent: Mapping[str, frozenset[int]]

    def __init__(self, split: str, tasks: Sequence[Task], names: Sequence[str], *, cache_in_memory: bool) -> None:
        self.split = split
        self.tasks = tuple(tasks)
        self.names = list(names)
        self.absent = {}
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

    def has_label(self, index: int, task: str) -> bool:
        """Whether the image ``index`` has a label of ``task``."""
        return index not in self.absent.get(task, ())

    def set_of(self, index: int) -> str:
        """Which of several mixed data sets the image ``index`` is of; "" where there is one only."""
        return ""

    def labelled_images(self) -> dict[str, int]:
        """How many images have a label, by task."""
        return {task.name: len(self) - len(self.absent.get(task.name, ())) for task in self.tasks}

    def keep_labelled(self, lacking: Mapping[str, Collection[str]], *, where: str) -> list[int]:
        """Leave out the images that have a label of none of the tasks; the indices of those that stay.

        ``lacking`` has the names of the images without a label, by task; what stays of it is ``absent``. ``where`` is
        what messages call the list. Raises UserError where no image that is trained on has a label of a task.
        """
        tasks = [task.name for task in self.tasks]
        kept = [i for i, name in enumerate(self.names) if not tasks or any(name not in lacking[task] for task in tasks)]
        if len(kept) < len(self):
            LOGGER.info("%s: %d images have labels of other tasks only and are left out", where, len(self) - len(kept))
        self.names = [self.names[i] for i in kept]
        absent = {task: frozenset(i for i, name in enumerate(self.names) if name in lacking[task]) for task in tasks}
        self.absent = {task: images for task, images in absent.items() if images}
        unlabelled = [task for task, images in absent.items() if len(images) == len(self)]
        if unlabelled and self.split == "train":
            raise UserError(f"{where}: no image has a label of {', '.join(unlabelled)}; {leave_out(unlabelled, tasks)}")
        if unlabelled:
            LOGGER.warning("%s: no image has a label of %s, which is not scored", where, ", ".join(unlabelled))
        return kept


def data_fingerprint(dataset: RecordDataset) -> str:
    """SHA-256 of what is read: kind of data set, list, tasks and every name in order; the folder's path is not in it.

    Ranks compare it at the start: two nodes with different copies of the data must not train together. A packed data
    set has the fingerprint of the folder it was packed from.
    """
    facts: dict[str, object] = {
        "title": dataset.title,
        "split": dataset.split,
        "tasks": [task.name for task in dataset.tasks],
        "names": dataset.names,
    }
    if any(dataset.absent.values()):
        facts["absent"] = {task: sorted(images) for task, images in dataset.absent.items()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def leave_out(tasks: Sequence[str], given: Sequence[str], *, how: str = "tasks=[{}]") -> str:
    """What to try where ``tasks``, some of ``given``, have no labels: the tail of an error; ``how`` to name tasks."""
    rest = [task for task in given if task not in tasks]
    if not rest:
        return f"name other tasks with {how.format('...')}"
    return f"leave {', '.join(tasks)} out with {how.format(','.join(rest))}"


def labelled_text(labelled: Mapping[str, int]) -> str:
    """Numbers of images by task as tables and logs show them."""
    return ", ".join(f"{task} {images}" for task, images in labelled.items())
