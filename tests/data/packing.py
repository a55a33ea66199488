"""What the tests of packing share: a look at what is on disk, archives, the command."""

import subprocess
import sys
import tarfile
from pathlib import Path

from ase_dist.commands import prepare_data
from ase_dist.data.packed.dataset import PackedDataset
from ase_dist.data.packed.prepare import Request
from ase_dist.tasks import select_tasks

ALL = select_tasks("pascal_context")
COMMAND = Path(__file__).parents[2] / "launch" / "prepare_data.py"


def state(root):
    """Of every file and folder below, whether it was touched."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


def contents(place):
    return {path.name: path.read_bytes() for path in place.iterdir() if path.name != "packed.json"}


def packed_names(place, tasks=ALL):
    dataset = PackedDataset(place, "train", tasks, data="pascal_context")
    return [dataset[i].name for i in range(len(dataset))]


def archive(root, path):
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root, arcname="PASCALContext")
    return path


def request(path, **options):
    return Request("pascal_context", path, subset=True, workers=1, **options)


def start(*arguments):
    command = [sys.executable, str(COMMAND), "pascal-context", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def command(*arguments):
    return prepare_data.main(["pascal-context", *map(str, arguments)])
