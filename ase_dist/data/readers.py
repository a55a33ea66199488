"""The class that reads a data set: a data set's own, or that of a description."""

from __future__ import annotations

from ase_dist.data.described import described_reader
from ase_dist.data.folder import FolderDataset
from ase_dist.description import DescribedDataSet
from ase_dist.errors import UserError
from ase_dist.registries import resolve
from ase_dist.tasks import DataSet, find_data_set


def reader_of(data: str | DataSet) -> type[FolderDataset]:
    """The reader of a data set, given itself or by name, imported now if it has not been before."""
    data_set = find_data_set(data) if isinstance(data, str) else data
    if isinstance(data_set, DescribedDataSet):
        assert data_set.description is not None
        return described_reader(data_set.description)
    found = resolve(data_set.reader) if isinstance(data_set.reader, str) else data_set.reader
    if not (isinstance(found, type) and issubclass(found, FolderDataset)):
        raise UserError(f"the reader of the data set: got {found!r}, wanted a subclass of FolderDataset")
    return found
