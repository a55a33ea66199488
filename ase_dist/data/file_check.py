"""Whether a data folder has every file that its lists and tasks need."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from ase_dist.data.dataset import leave_out
from ase_dist.errors import UserError

PARTIAL = "data.partial=true"
Patterns = tuple[str, ...]  # alternatives, the first that exists is read; see ``expand``


def expand(pattern: str, name: str) -> str:
    """The path of the file of the image ``name``, which may have folders: ``{}`` is the name, ``{stem}`` its last part.

    In a pattern with ``{split}`` that is the first folder of the name, and ``{}`` the rest.
    """
    split, _, rest = name.partition("/") if "{split}" in pattern else ("", "", name)
    words = {"": rest, "split": split, "stem": name.rpartition("/")[2]}
    return re.sub(r"\{(split|stem|)\}", lambda found: words[found[1]], pattern)


def top_folder(pattern: str) -> PurePosixPath:
    """The folder of a pattern that has no place for a name in it, with all above it."""
    return PurePosixPath(pattern.partition("{")[0] + "_").parent


class FileCheck:
    """Compares the needed files with listings of the folders: one listing per folder, no look-up per file."""

    def __init__(self, root: Path, title: str, *, remedy: str, how: str = "tasks=[{}]") -> None:
        self.root = root
        self.title = title
        self._remedy = remedy  # what to do about a file that is missing
        self._how = how  # to name tasks, in advice
        self._listings: dict[PurePosixPath, frozenset[str] | None] = {}
        self._spellings: dict[PurePosixPath, dict[str, str]] = {}

    def folders(self, image: Patterns, labels: Mapping[str, tuple[Patterns, ...]]) -> None:
        """Raise UserError if the folder of the images is missing, or that of a task's labels: which to leave out."""
        if self._absent(image):
            raise UserError(
                f"{self.root}: got no folder {_folders(image)}, wanted the folder of {self.title}; "
                f"check data.root, or {self._remedy}"
            )
        absent = {
            task: folders
            for task, needs in labels.items()
            if (folders := [_folders(patterns) for patterns in needs if self._absent(patterns)])
        }
        if absent:
            folder_names = ", no folder ".join(dict.fromkeys(folder for many in absent.values() for folder in many))
            raise UserError(
                f"{self.root}: this data set has no label for {', '.join(absent)} (there is no folder {folder_names}); "
                f"{leave_out(list(absent), list(labels), how=self._how)}"
            )

    def spelling(
        self, names: Sequence[str], image: Patterns, labels: Mapping[str, tuple[Patterns, ...]], path: Path
    ) -> None:
        """Raise UserError if a file for a line of the list ``path`` is only missing because of how either is written.

        1. A line with several columns, with the file's ending, with quotes or a comment. 2. A file with another ending
        than is read, or in other letters (``a1.JPG``).
        """
        for name, _ in self._missing(names, image):
            bare = name.strip("'\"#,; ")
            starts = [bare, *(bare[: gap.start()] for gap in re.finditer(r"[\s,;]+", bare))]
            stems = [stem for start in starts for stem in (start, PurePosixPath(start).stem) if stem != name]
            right = next((stem for stem in stems if not any(self._missing([stem], image))), None)
            if right is not None or name.startswith("#"):
                advice = "remove it" if name.startswith("#") else f"write {right!r}"
                raise UserError(f"{path}: got the line {name!r}, wanted one image name and nothing else; {advice}")
        for patterns in (image, *(need for needs in labels.values() for need in needs)):
            missing = list(self._missing(names, patterns))
            for name, _ in missing:
                found = self.similar(name, patterns)
                if found is not None:
                    either = " or ".join(dict.fromkeys(expand(pattern, name) for pattern in patterns[:4]))
                    is_alike = unicodedata.normalize("NFC", found) == unicodedata.normalize(
                        "NFC", PurePosixPath(either).name
                    )
                    shown = ascii(found) if is_alike else repr(found)  # only escapes show accents composed otherwise
                    raise UserError(
                        f"{self.root}: got the file {shown} for {name!r}, wanted {either}; convert or rename it"
                    )

    def similar(self, name: str, patterns: Patterns) -> str | None:
        """A file in the folders of ``patterns`` written like that of ``name`` but for ending, case or accents."""
        for wanted in dict.fromkeys(PurePosixPath(expand(pattern, name)) for pattern in patterns):
            if wanted.parent not in self._spellings:
                files = sorted(self._listing(wanted.parent) or ())
                self._spellings[wanted.parent] = {_spelling(file): file for file in files}
            found = self._spellings[wanted.parent].get(_spelling(wanted.name))
            if found is not None:
                return found
        return None

    def lacking(self, names: Sequence[str], labels: Mapping[str, tuple[Patterns, ...]]) -> dict[str, set[str]]:
        """The names that lack a file of a label, by task."""
        return {
            task: {name for need in needs for name, _ in self._missing(names, need)} for task, needs in labels.items()
        }

    def misspelt(
        self, lacking: Mapping[str, Collection[str]], image: Patterns, labels: Mapping[str, tuple[Patterns, ...]]
    ) -> list[str]:
        """The files that may be meant for a label of ``lacking``: written like it, and of no other use."""
        found: dict[str, None] = {}
        every = [image, *(need for needs in labels.values() for need in needs)]
        for task, names in lacking.items():
            for name in names:
                used = {PurePosixPath(expand(pattern, name)).name for patterns in every for pattern in patterns}
                for need in labels[task]:
                    similar = self.similar(name, need) if any(self._missing([name], need)) else None
                    if similar is not None and similar not in used:
                        found[str(PurePosixPath(expand(need[0], name)).parent / similar)] = None
        return sorted(found)

    def files(self, names: Sequence[str], image: Patterns, labels: Mapping[str, tuple[Patterns, ...]]) -> None:
        """Raise UserError if a file is missing: what, how many, and which tasks to leave out."""
        lacking = {
            task: [file for need in needs for _, file in self._missing(names, need)] for task, needs in labels.items()
        }
        missing = list(
            dict.fromkeys(
                [
                    *(file for _, file in self._missing(names, image)),
                    *(file for many in lacking.values() for file in many),
                ]
            )
        )
        if missing:
            first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            tasks = [task for task, files in lacking.items() if files]
            advice = (
                f", or {leave_out(tasks, list(labels), how=self._how)}, or accept that with {PARTIAL}" if tasks else ""
            )
            raise UserError(
                f"{self.root}: {len(missing)} of the files that the list needs are missing ({first}); "
                f"{self._remedy}{advice}"
            )

    def _absent(self, patterns: Patterns) -> bool:
        return all(self._listing(top_folder(pattern)) is None for pattern in patterns)

    def _missing(self, names: Sequence[str], patterns: Patterns) -> Iterator[tuple[str, str]]:
        """Each name without any of the files, and the first of them."""
        for name in names:
            paths = [PurePosixPath(expand(pattern, name)) for pattern in patterns]
            if not any(path.name in (self._listing(path.parent) or ()) for path in paths):
                yield name, str(paths[0])

    def _listing(self, folder: PurePosixPath) -> frozenset[str] | None:
        if folder not in self._listings:
            path = self.root / folder
            self._listings[folder] = frozenset(file.name for file in path.iterdir()) if path.is_dir() else None
        return self._listings[folder]


def _folders(patterns: Patterns) -> str:
    return " or ".join(dict.fromkeys(str(top_folder(pattern)) for pattern in patterns))


def _spelling(file: str) -> str:
    """A file's name without its ending, case and way of composing accents."""
    return unicodedata.normalize("NFC", PurePosixPath(file).stem).casefold()
