"""No command replaces a file that it did not write: how each recognises its own, and the refusal."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ase_dist.errors import UserError
from ase_dist.files import open_regular

if TYPE_CHECKING:
    from PIL import PngImagePlugin

PNG_MARK = ("Software", "ase_dist")  # a text chunk of the pictures that commands write under names that users choose


def refuse_foreign(paths: Iterable[Path], *, is_own: Callable[[Path], bool], option: str) -> None:
    """Raise UserError where something lies at one of ``paths`` that ``is_own`` does not recognise.

    To be called before any work. ``option`` is what the user can change; links and folders are never our own.
    """
    there = [path for path in paths if path.exists() or path.is_symlink()]
    foreign = [path for path in there if path.is_symlink() or not path.is_file() or not is_own(path)]
    if foreign:
        others = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise UserError(
            f"{option}: {str(foreign[0])!r}{others} would be replaced and is not what this command wrote there; name "
            "another place, or move it away"
        )


def contains(mark: bytes) -> Callable[[Path], bool]:
    """Whether a file has ``mark`` in it, as a test for ``refuse_foreign``."""

    def found(path: Path) -> bool:
        with open_regular(path) as file:
            if not path.stat().st_size:
                return False
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(mark) >= 0

    return found


def png_mark() -> PngImagePlugin.PngInfo:
    """``PNG_MARK`` for Pillow's ``save(pnginfo=...)``; matplotlib takes ``metadata=dict([PNG_MARK])``."""
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text(*PNG_MARK)
    return info


is_own_png = contains("\0".join(PNG_MARK).encode())
