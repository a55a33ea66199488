"""The data sets that lie in folders of files, by the name that ``data.name`` has for them."""

from __future__ import annotations

from ase_dist.data.folder import FolderDataset
from ase_dist.data.nyud import NYUD
from ase_dist.data.pascal_context import PascalContext

KINDS: dict[str, type[FolderDataset]] = {"scenes": PascalContext, "pascal_context": PascalContext, "nyud": NYUD}
