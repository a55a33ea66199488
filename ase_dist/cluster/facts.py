"""What a node reports about itself before a job: versions, code, data, devices, cores, its interface to the others.

``check`` runs ``python -m ase_dist.cluster.facts JSON`` on every node; the answer is the last line of its output.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ase_dist.cluster.network import interface_towards
from ase_dist.cores import usable_cores
from ase_dist.versions import PACKAGES, version_of

CODE = ("*.py", "*.yaml")  # of the package; no caches or bytecode
NO_FOLDER = "missing"


@dataclass(frozen=True)
class Question:
    """What a node is asked: which interface leads to the host ``towards``, and what the folders of ``data`` hold."""

    towards: str = ""
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeFacts:
    """A node's answer. ``machine`` is equal for two names of one machine.

    ``data`` has a digest, or ``NO_FOLDER``, of each folder that was asked for.
    """

    host: str
    machine: str
    user: str
    python: str
    code: str
    devices: int
    cores: int
    interface: str = ""
    address: str = ""
    data: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)


def _user() -> str:
    """This user's name, or the number where the host does not know it, as in a container of any user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the second: Python 3.13
        return str(os.getuid())


def gather(question: Question) -> NodeFacts:
    """This node's facts."""
    interface = interface_towards(question.towards) if question.towards else None
    return NodeFacts(
        host=platform.node(),
        machine=_machine(),
        user=_user(),
        python=platform.python_version(),
        code=digest_code(Path(__file__).parents[1]),
        devices=devices(),
        cores=usable_cores(),
        interface=interface.name if interface else "",
        address=interface.address if interface else "",
        data={folder: digest_folder(Path(folder)) for folder in question.data},
        packages={name: version_of(name) or "missing" for name in PACKAGES},
    )


def digest_code(package: Path) -> str:
    """SHA-256 of the package's sources: names and bytes."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in package.rglob(pattern)):
        digest.update(f"{path.relative_to(package)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def digest_folder(folder: Path) -> str:
    """SHA-256 of the name and size of every file in a folder, or of one file's size; the bytes would take hours.

    Hidden files, which file servers and locks leave behind, are ignored. ``NO_FOLDER`` where nothing is there.
    """
    if not folder.exists():
        return NO_FOLDER
    sizes = [("", folder.stat().st_size)] if folder.is_file() else []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(root) / name for name in names if not name.startswith(".")]
        sizes += [(str(path.relative_to(folder)), path.stat().st_size) for path in paths]
    digest = hashlib.sha256()
    for name, size in sorted(sizes):
        digest.update(f"{name}\0{size}\0".encode())
    return digest.hexdigest()


def _machine() -> str:
    """Equal for two names of one machine; a container or a network namespace is a machine of its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:
        return platform.node()


def devices() -> int:
    """How many accelerators this machine has, 0 on a CPU host."""
    import torch

    return torch.accelerator.device_count() if hasattr(torch, "accelerator") else torch.cuda.device_count()


def main(arguments: list[str]) -> int:
    """Answer the question that stands in ``arguments`` as JSON."""
    sys.stdout.write(json.dumps(asdict(gather(Question(**json.loads(arguments[0]))))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
