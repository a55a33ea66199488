"""Reading a packed data set: its files mapped into memory by each process that reads, labels decompressed."""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ase_dist.data.batch import Record
from ase_dist.data.dataset import RecordDataset, leave_out
from ase_dist.data.file_check import PARTIAL
from ase_dist.data.files import read_image
from ase_dist.data.packed.layout import PackedManifest, index_path, read_index, read_manifest, unpack_label
from ase_dist.data.packed.verify import wrong_sizes
from ase_dist.data.readers import reader_of
from ase_dist.description import DataSetDescription, described, differences
from ase_dist.errors import UserError
from ase_dist.tasks import DATA_SETS, Task


class _Place(NamedTuple):
    file: Path
    shape: tuple[int, int]
    offsets: tuple[int, ...]
    checksum: int


class PackedDataset(RecordDataset):
    """The images of one list of a packed data set; records are those of the folder that was packed, read-only.

    Opening it compares the sizes of its files with the manifest's. It may be sent to other processes: each maps the
    files for itself, and the system keeps one copy of them in memory for all.
    ``partial`` as FolderDataset's; without it every image must have a label of each task.
    Raises UserError for a damaged folder, for another data set than ``data`` and for a task that was not packed.
    """

    def __init__(
        self,
        root: Path | str,
        split: str,
        tasks: Sequence[Task],
        *,
        data: str,
        description: DataSetDescription | None = None,
        limit: int | None = None,
        cache_in_memory: bool = False,
        partial: bool = False,
    ) -> None:
        self.root = Path(root)
        manifest = read_manifest(self.root)
        self._check(manifest, data, description, split, [task.name for task in tasks])
        self.title = reader_of(data if description is None else described(description)).title
        self._pictures = manifest.pictures
        self._fields = {name: i + 1 for i, name in enumerate(manifest.tasks)}
        self._maps: dict[Path, mmap.mmap] = {}
        self._checked: set[int] = set()  # images whose bytes this process has compared with their sum
        self._places: list[_Place] = []
        names: list[str] = []
        for wrong in wrong_sizes(self.root, manifest):
            raise UserError(f"{wrong}; make it again with launch/prepare_data.py")
        for shard in manifest.splits[split]:
            path = self.root / shard.file
            index = read_index(path, sha256=shard.index_sha256)
            if index.bytes != shard.bytes or any(len(starts) != len(manifest.tasks) + 2 for starts in index.offsets):
                raise UserError(f"{index_path(path)}: not of the file that its manifest names; make it again")
            names += index.names
            self._places += [
                _Place(path, *where) for where in zip(index.shapes, index.offsets, index.sums, strict=True)
            ]
        super().__init__(split, tasks, names[:limit], cache_in_memory=cache_in_memory)
        lacking = {
            task.name: {
                name for name, place in zip(self.names, self._places, strict=False) if self._is_empty(place, task)
            }
            for task in self.tasks
        }
        some = [task for task, without in lacking.items() if without]
        if some and not partial:
            raise UserError(
                f"{self.root}: {len(set.union(*lacking.values()))} images were packed without a label of "
                f"{' or '.join(some)}; accept that with {PARTIAL}, or {leave_out(some, list(lacking))}"
            )
        if some:
            kept = self.keep_labelled(lacking, where=f"{self.root}, {split}")
            self._places = [self._places[i] for i in kept]

    def read(self, index: int) -> Record:
        """As RecordDataset's."""
        place, name = self._places[index], self.names[index]
        if place.file not in self._maps:
            with place.file.open("rb") as file:
                self._maps[place.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = memoryview(self._maps[place.file])

        def field(number: int) -> memoryview:
            return data[place.offsets[number] : place.offsets[number + 1]]

        try:
            labels = {
                task.name: unpack_label(field(self._fields[task.name]), task.kind, place.shape)
                for task in self.tasks
                if self.has_label(index, task.name)
            }
            if index not in self._checked:  # once: later epochs read the same pages of memory
                if zlib.crc32(data[place.offsets[0] : place.offsets[-1]]) != place.checksum:
                    raise UserError("damaged picture")
                self._checked.add(index)
        except UserError as error:
            raise UserError(
                f"{place.file}: got a {error} of {name!r}, wanted what was packed; "
                "make it again with launch/prepare_data.py"
            ) from None
        if self._pictures == "files":
            image = read_image(place.file / name, content=bytes(field(0)))
        else:
            image = np.frombuffer(field(0), np.uint8).reshape(*place.shape, 3)
        return Record(index, name, image, labels)

    def _is_empty(self, place: _Place, task: Task) -> bool:
        """Whether the image has no label of ``task``."""
        field = self._fields[task.name]
        return place.offsets[field] == place.offsets[field + 1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_checked": set()}

    def _check(
        self,
        manifest: PackedManifest,
        data: str,
        description: DataSetDescription | None,
        split: str,
        tasks: list[str],
    ) -> None:
        if (data, description is None) != (manifest.data, manifest.description is None):
            there, wanted = (reader_of(name).title if name in DATA_SETS else name for name in (manifest.data, data))
            raise UserError(
                f"data.root: {self.root} is {there} packed, wanted {wanted}; set data.name={manifest.data}, or name "
                "another folder"
            )
        if description is not None and manifest.description is not None:
            refused, _ = differences(manifest.description.model_dump(mode="json"), description.model_dump(mode="json"))
            for difference in refused.values():
                raise UserError(
                    f"data.root: {self.root} was packed by another dataset.yaml ({difference}); "
                    "make it again with launch/prepare_data.py"
                )
        if split not in manifest.splits:
            raise UserError(f"{self.root}: got the lists {', '.join(manifest.splits)} packed, wanted {split}")
        absent = [task for task in tasks if task not in manifest.tasks]
        if absent:
            raise UserError(
                f"{self.root}: this data set was packed without labels for {', '.join(absent)}; "
                f"{leave_out(absent, tasks)}, or pack them with launch/prepare_data.py"
            )
