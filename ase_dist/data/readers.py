"""The class that reads a data set, by the name that ``data.name`` has for it."""

from __future__ import annotations

from ase_dist.data.folder import FolderDataset
from ase_dist.errors import UserError
from ase_dist.registries import resolve
from ase_dist.tasks import DATA_SETS


def reader_of(data: str) -> type[FolderDataset]:
    """The reader in ``DATA_SETS``, imported now if it has not been before."""
    reader = DATA_SETS[data].reader
    found = resolve(reader) if isinstance(reader, str) else reader
    if not (isinstance(found, type) and issubclass(found, FolderDataset)):
        raise UserError(f"DATA_SETS[{data!r}].reader: got {found!r}, wanted a subclass of FolderDataset")
    return found
