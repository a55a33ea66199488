"""Whether the files of a packed data set are those that its manifest names: by size, which is fast, or by hash."""

from __future__ import annotations

from pathlib import Path

from ase_dist.data.packed.layout import PackedManifest, index_path, read_manifest
from ase_dist.errors import UserError
from ase_dist.files import sha256_of


def wrong_sizes(root: Path, manifest: PackedManifest) -> list[str]:
    """Every file of images that is missing or has another size, in words: what was got, what wanted."""
    wrong = []
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        path = root / shard.file
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            got = "no such file" if size is None else f"{size} bytes"
            wrong.append(f"{path}: got {got}, wanted {shard.bytes} bytes as its manifest says")
    return wrong


def verify(root: Path) -> int:
    """Read every byte of a packed data set and return the number of its files; UserError names the damaged ones."""
    manifest = read_manifest(root)
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    wanted = {root / shard.file: shard.sha256 for shard in shards}
    wanted |= {index_path(root / shard.file): shard.index_sha256 for shard in shards}
    damaged = [path.name for path, digest in wanted.items() if not path.is_file() or sha256_of(path) != digest]
    if damaged:
        raise UserError(
            f"{root}: {len(damaged)} of {len(wanted)} packed files are damaged ({', '.join(damaged)}); "
            "remove them, and launch/prepare_data.py makes them again"
        )
    return len(wanted)
