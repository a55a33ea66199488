"""Several data sets as one: their images one set after the other, each with the labels that its own set has."""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ase_dist.data.batch import Record
from ase_dist.data.dataset import RecordDataset
from ase_dist.errors import UserError
from ase_dist.tasks import Task

LOGGER = logging.getLogger("ase_dist")


@dataclass(frozen=True)
class Member:
    """One of the data sets: what it is called, its images, and what the run calls its tasks, by its own names."""

    title: str
    dataset: RecordDataset
    names: Mapping[str, str]


class MixedDataset(RecordDataset):
    """The images of ``members``, one member after the other; a name has that of its set before it.

    A record has the index that it has in its own set, and the run's names of its tasks. Raises UserError where no
    member that is trained on has a label of a task.
    """

    def __init__(self, split: str, tasks: Sequence[Task], members: Sequence[Member]) -> None:
        names = [f"{member.title}/{name}" for member in members for name in member.dataset.names]
        super().__init__(split, tasks, names, cache_in_memory=False)  # each member keeps its own
        self.title = "+".join(member.title for member in members)
        self.members = tuple(members)
        self.starts = list(itertools.accumulate((len(member.dataset) for member in members), initial=0))
        self.sets = {member.title: frozenset(member.names.values()) for member in members}
        absent: dict[str, frozenset[int]] = {}
        for task in self.tasks:
            lacking: set[int] = set()
            for start, member in zip(self.starts, members, strict=False):
                own = next((own for own, name in member.names.items() if name == task.name), None)
                without = range(len(member.dataset)) if own is None else member.dataset.absent.get(own, ())
                lacking.update(start + i for i in without)
            absent[task.name] = frozenset(lacking)
        self.absent = {name: images for name, images in absent.items() if images}
        unlabelled = [name for name, images in absent.items() if len(images) == len(self)]
        if unlabelled and split == "train":
            raise UserError(f"data.sets: no set that is trained on has a label of {', '.join(unlabelled)}")
        if unlabelled:
            LOGGER.warning("no set that is validated on has a label of %s, which is not scored", ", ".join(unlabelled))

    @property
    def lengths(self) -> dict[str, int]:
        """The number of images of each member."""
        return {member.title: len(member.dataset) for member in self.members}

    def set_of(self, index: int) -> str:
        """As RecordDataset's: the title of the member that has the image."""
        return self.members[bisect.bisect_right(self.starts, index) - 1].title

    def read(self, index: int) -> Record:
        """As RecordDataset's."""
        number = bisect.bisect_right(self.starts, index) - 1
        member = self.members[number]
        record = member.dataset[index - self.starts[number]]
        labels = {member.names[task]: label for task, label in record.labels.items()}
        return replace(record, name=self.names[index], labels=labels)
