"""A first ``dataset.yaml`` for a folder, guessed from its files: what ``prepare_data FOLDER --init`` writes.

1. The pictures are the folder, or the endings in it, that looks most like photographs.
2. Label files are those whose names are a picture's, perhaps with a tail: ``a_mask.png`` of ``a.jpg``.
3. The kind of a label follows from its values, where these leave it open from the words in its path.
4. Lists named train and val, else folders of these names, else every fifth image for validation, are the splits.

What cannot be told is a note for the user, not a guess. Nothing here is read again: the file says everything.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags

from ase_dist.data.described import ANY, LABELS, PICTURES, described_reader
from ase_dist.data.files import Array, read_array
from ase_dist.data.folder import LONGEST_LIST
from ase_dist.data.packed.sizes import stored_size
from ase_dist.description import DataSetDescription
from ase_dist.errors import UserError
from ase_dist.files import read_text
from ase_dist.picture_files import open_picture
from ase_dist.tasks import IGNORE, voc_color

MOST_FILES = 1_000_000
SAMPLE = 200  # label files of a task that are read, evenly spread
ENOUGH = 0.5  # share of the pictures that must have a label for a task to be described
VAL_EVERY = 5
TRAIN = ("train", "training", "trn")
VAL = ("val", "valid", "validation", "dev", "test", "testing")  # the first that is there
# A folder of a split, alone or with what lies in it: train, train_labels, trainannot.
SPLIT_FOLDER = re.compile(
    rf"({'|'.join(sorted((*TRAIN, *VAL), key=len, reverse=True))})((?:[_\-. ]\w+|annot\w*)?)", re.IGNORECASE
)
PHOTOGRAPHS = ("jpg", "jpeg", "webp")
PICTURE_WORDS = r"images?|imgs?|jpegimages|rgb|photos?|pictures?|leftimg8bit|inputs?|frames|colou?rs?|data"
LABEL_WORDS = r"labels?|masks?|gt\w*|seg\w*|annotations?|ann|depth\w*|disp\w*|normals?|edges?|boundar\w*|parts?|sal\w*"
WORDS = {
    "depth": r"depth|disp|distance",
    "normals": r"normal",
    "edges": r"edge|boundar|contour",
    "parts": r"part",
    "mask": r"mask|salien|foreground|matte|alpha|object",
}
NAMES = {"classes": "semseg", "parts": "human_parts", "edges": "edge", "normals": "normals", "depth": "depth"}
CLASS_FILES = r"(class|label|categor|name)\w*"  # .txt, a class a line
MANY_GREYS = 64  # different values of a grey picture that is no map of classes
MANY_COLORS = 256
DEEPEST_METRES = 100
UNIT_SHARE = 0.9  # of the pixels of normals


class FirstDescription(NamedTuple):
    """What ``--init`` writes: the text of the file, lists of names by file, and what the user should know."""

    text: str
    lists: dict[str, list[str]]
    notes: list[str]


@dataclass
class _Files:
    """Files that belong together: by image name, under one pattern without its ending."""

    start: str  # of the pattern: labels/{}_mask
    paths: dict[str, str] = field(default_factory=dict)

    @property
    def pattern(self) -> str:
        endings = {PurePosixPath(path).suffix for path in self.paths.values()}
        return self.start + (endings.pop() if len(endings) == 1 else ANY)


def first_description(root: Path) -> FirstDescription:
    """Look at ``root`` and describe it. Raises UserError where there are no pictures, or none with a label."""
    files = _files_below(root)
    images, labels, notes = _match(files, root)
    splits, lists, chosen = _splits(root, images, labels, files)
    tasks: dict[str, dict[str, Any]] = {}
    for group in labels:
        there = len(chosen & group.paths.keys())
        if there < ENOUGH * len(chosen):
            notes.append(f"{group.pattern}: only {there} of {len(chosen)} images have one; left out")
            continue
        try:
            found, note = _describe_task(root, group, files)
        except UserError as error:
            notes.append(f"{group.pattern}: left out, {error}")
            continue
        if note:
            notes.append(f"{group.pattern}: {note}")
        if found is not None:
            name = NAMES.get(found["kind"], "")
            if not name or name in tasks:
                name = _as_name(group.start, taken=tasks)
            tasks[name] = found
            if there < len(chosen):
                notes.append(
                    f"tasks.{name}: {len(chosen) - there} of {len(chosen)} images have no label; take them out of the "
                    "splits, or add the labels"
                )
    if not tasks:
        raise UserError(
            f"{root}: got {len(images.paths)} images like {images.pattern} and no labels of the same names, wanted "
            "label files such as labels/NAME.png" + "".join(f"; {note}" for note in notes)
        )
    tree = {"name": root.resolve().name, "images": images.pattern, "splits": splits, "tasks": tasks}
    orientation, note = _orientation(root, images, labels)
    notes += [note] if note else []
    if orientation:
        tree["orientation"] = orientation
    description = DataSetDescription.model_validate(tree)
    if not lists:
        reader = described_reader(description)
        counts = {split: len(reader.read_names(root, split)) for split in ("train", "val")}
    else:
        counts = {PurePosixPath(name).stem: len(names) for name, names in lists.items()}
    notes.insert(0, f"{counts['train']} images for training, {counts['val']} for validation, tasks {', '.join(tasks)}")
    return FirstDescription(_as_text(tree), lists, notes)


# ---------------------------------------------------------------------------------------------------------------------
# Which files belong together


def _files_below(root: Path) -> list[str]:
    """The paths of all files that are not hidden, relative to ``root``."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        place = Path(folder).relative_to(root)
        found += [(place / name).as_posix() for name in sorted(names) if not name.startswith(".")]
        if len(found) > MOST_FILES:
            raise UserError(f"{root}: got more than {MOST_FILES} files, wanted the folder of one data set")
    return found


def _match(files: Sequence[str], root: Path) -> tuple[_Files, list[_Files], list[str]]:
    """The pictures, the groups of label files, and notes about files that belong to neither."""
    usable = [path for path in files if _ending(path) in {*PICTURES, *LABELS}]
    if not any(_ending(path) in PICTURES for path in usable):
        raise UserError(f"{root}: got no picture in it, wanted files such as images/NAME.jpg ({', '.join(PICTURES)})")
    units = defaultdict(dict)  # type: ignore[var-annotated]
    common = os.path.commonpath([f"./{path}" for path in usable]).removeprefix(".").lstrip("/")
    common = common if (root / common).is_dir() else str(PurePosixPath(common).parent)
    above = "" if common in ("", ".") else f"{common}/"
    by_folder: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path in usable:
        start, name = _place(path.removeprefix(above))
        by_folder[start].append((name, path))
    for start, entries in by_folder.items():
        photographs = {name for name, path in entries if _ending(path) in PHOTOGRAPHS}
        others = {name for name, path in entries if _ending(path) not in PHOTOGRAPHS}
        is_mixed = bool(photographs) and any(_base_of(name, photographs) for name in others)
        for name, path in entries:
            units[start, is_mixed and _ending(path) not in PHOTOGRAPHS][name] = path
    chosen = max(units, key=lambda unit: (_picture_score(unit[0], units[unit].values()), len(units[unit])))
    stems = units.pop(chosen)
    tails = Counter(stem[len(base) :] for stem in stems if (base := _base_of(stem, stems.keys() - {stem})))
    labels_tails = [tail for tail, count in tails.items() if _has_letter(tail) and count >= ENOUGH * len(stems) / 3]
    pictures = {stem: path for stem, path in stems.items() if not stem.endswith(tuple(labels_tails) or ("\0",))}
    tail = _common_tail(list(pictures))
    images = _Files(f"{above}{chosen[0]}{{}}{tail}", {stem.removesuffix(tail): path for stem, path in pictures.items()})
    last_parts = Counter(name.rpartition("/")[2] for name in images.paths)
    by_last = {name.rpartition("/")[2]: name for name in images.paths if last_parts[name.rpartition("/")[2]] == 1}

    groups: dict[str, _Files] = {}
    left: Counter[str] = Counter()
    rest = [(chosen[0], stem, path) for stem, path in stems.items() if stem not in pictures]
    rest += [(start, stem, path) for (start, _), unit in units.items() for stem, path in unit.items()]
    for start, stem, path in rest:
        base, place = _base_of(stem, images.paths), "{}"
        tail = stem[len(base or "") :]
        if base is None and "{split}" not in start:
            last = _base_of(stem.rpartition("/")[2], by_last)
            if last is not None and "/" not in stem:
                base, place, tail = by_last[last], "{stem}", stem[len(last) :]
        if base is None:
            left[f"{above}{start}"] += 1
            continue
        pattern = f"{above}{start}{place}{tail}"
        groups.setdefault(pattern, _Files(pattern)).paths[base] = path
    notes = [
        f"{start or 'the folder itself'}: {count} files have no image of their name" for start, count in left.items()
    ]
    return images, list(groups.values()), notes


def _place(path: str) -> tuple[str, str]:
    """The beginning of a file's pattern, and its name: (labels/, train/a), ({split}/labels/, train/a), ("", a)."""
    stem = path[: -len(_ending(path)) - 1]
    first, _, rest = stem.partition("/")
    if not rest:
        return "", stem
    of_split = SPLIT_FOLDER.fullmatch(first)
    if of_split is None:
        return f"{first}/", rest
    second, _, name = rest.partition("/") if "/" in rest else ("", "", rest)
    return f"{{split}}{of_split[2]}/{second}{'/' if second else ''}", f"{of_split[1]}/{name}"


def _ending(path: str) -> str:
    return PurePosixPath(path).suffix[1:].lower()


def _base_of(stem: str, names: Iterable[str]) -> str | None:
    """The longest of ``names`` that is ``stem``, or its beginning up to a sign such as _."""
    known = names if isinstance(names, (set, dict)) else set(names)
    cuts = [len(stem), *(found.start() for found in reversed([*re.finditer(r"[_.\- ]", stem)]))]
    return next((stem[:cut] for cut in cuts if stem[:cut] in known), None)


def _common_tail(stems: Sequence[str]) -> str:
    """What all stems end with, from a sign such as _ on, as in ``_leftImg8bit``; empty for a single one."""
    if len(stems) < 2:
        return ""
    shared = zip(*(stem[::-1] for stem in stems), strict=False)
    tail = "".join(each[0] for each in itertools.takewhile(lambda each: len({*each}) == 1, shared))[::-1]
    start = re.search(r"[_.\- ][A-Za-z][^/]*$", tail)
    return tail[start.start() :] if start else ""


def _has_letter(text: str) -> bool:
    return re.search(r"[A-Za-z]", text) is not None


def _picture_score(start: str, paths: Iterable[str]) -> float:
    words = re.split(r"[/_\-. ]", start.lower())
    known = [path for path in paths if _ending(path) in PICTURES]
    photographs = sum(_ending(path) in PHOTOGRAPHS for path in known) / max(1, len(known))
    is_picture = any(re.fullmatch(PICTURE_WORDS, word) for word in words)
    is_label = any(re.fullmatch(LABEL_WORDS, word) for word in words)
    return (2 if is_picture else 0) - (3 if is_label else 0) + photographs + (0 if known else -10)


# ---------------------------------------------------------------------------------------------------------------------
# What a label is


@dataclass
class _Values:
    """What the sampled label files of a task hold."""

    values: set[int] = field(default_factory=set)  # of maps of whole numbers
    colors: Counter[tuple[int, int, int]] = field(default_factory=Counter)  # files that have each
    floats: bool = False
    sixteen: bool = False
    vectors: bool = False
    many: bool = False  # more values or colours than classes
    high: float = 0.0
    unit: float = 0.0  # share of pixels whose colour c, as 2 c / 255 - 1, is a vector of length 1 within a tenth
    palette: list[int] | None = None


def _describe_task(root: Path, group: _Files, files: Sequence[str]) -> tuple[dict[str, Any] | None, str]:
    """The description of a group's labels as plain values, None where it cannot be told; and a note."""
    paths = sorted(group.paths.values())
    step = -(-len(paths) // SAMPLE)
    seen = _look(root, paths[::step])
    hint = next((kind for kind, words in WORDS.items() if re.search(words, group.start.lower())), "")
    common: dict[str, Any] = {"files": group.pattern}
    part = f" (seen in {-(-len(paths) // step)} of {len(paths)} files)" if step > 1 else ""
    if re.search(r"instance|segmentationobject", group.start.lower()):
        return None, "left out, instances are no classes"
    if seen.vectors or seen.colors:
        return _describe_colors(seen, common, hint=hint, part=part)
    if hint == "depth" or (not hint and (seen.floats or seen.sixteen or seen.high > 1000)):
        unit = "m" if seen.floats and seen.high <= DEEPEST_METRES else "mm"
        return {"kind": "depth", **common, "unit": unit}, f"see that {seen.high:g}, the largest, is in {unit}{part}"
    is_plain = seen.values <= {0, 1} or seen.values <= {0, 255}
    if (hint in ("mask", "edges") or is_plain) and (seen.many or seen.values <= {0, 1, 255}):
        kind = "edges" if hint == "edges" else "mask"
        further: dict[str, Any] = {} if is_plain or kind == "mask" else {"threshold": 127}
        if not is_plain and not seen.many:
            further = {"ignore": [255]}
        notes = {"threshold": "grey values above threshold are edges", "ignore": "255 is taken for unknown pixels"}
        return {"kind": kind, **common, **further}, "".join(notes[key] for key in further)
    if seen.many:
        return None, "left out, grey pictures of many values; set kind: mask or kind: depth"
    return _describe_classes(root, seen, common, files, kind="parts" if hint == "parts" else "classes", part=part)


def _describe_colors(
    seen: _Values, common: Mapping[str, Any], *, hint: str, part: str
) -> tuple[dict[str, Any] | None, str]:
    """Normals, or classes by colour."""
    if seen.vectors or (seen.many and (hint == "normals" or seen.unit > UNIT_SHARE)):
        return {"kind": "normals", **common}, ""
    if seen.many:
        return None, "left out, pictures of many colours are no map of classes; as normals set kind: normals"
    codes = sorted(seen.colors, key=lambda color: (color != (0, 0, 0), color))
    if len(codes) < 2:
        return None, f"left out, there is one colour only{part}"
    classes = {f"class {i}": list(color) for i, color in enumerate(codes)}
    rgb_map = {", ".join(map(str, color)): i for i, color in enumerate(codes)}  # by number: names are to be changed
    task = {"kind": "classes", **common, "classes": classes, "rgb_map": rgb_map}
    return task, f"name the {len(codes)} colours{part}"


def _describe_classes(
    root: Path, seen: _Values, common: Mapping[str, Any], files: Sequence[str], *, kind: str, part: str
) -> tuple[dict[str, Any] | None, str]:
    ids = sorted(seen.values - {IGNORE})
    if len(ids) < 2:
        return None, f"left out, there is one id only, {ids[0] if ids else IGNORE}{part}"
    names = _names_in(root, files)
    first = 1 if ids[0] > 0 and ids[0] == 1 else 0
    count = ids[-1] + 1 - first
    is_dense = ids[0] >= 0 and count <= max(2 * len(ids), len(names or []))
    stored = list(range(first, ids[-1] + 1)) if is_dense else ids
    if names is not None and is_dense and len(names) > count:
        stored = list(range(first, first + len(names)))
    called = names if names is not None and len(names) == len(stored) else [f"class {i}" for i in stored]
    palette = seen.palette if seen.palette and stored[-1] * 3 + 2 < len(seen.palette) and stored[0] >= 0 else None
    colors = [palette[3 * i : 3 * i + 3] if palette else list(voc_color(i % 256)) for i in stored]
    task: dict[str, Any] = {"kind": kind, **common, "classes": dict(zip(called, colors, strict=True))}
    if not is_dense:
        task["id_map"] = {str(value): i for i, value in enumerate(stored)}
    elif first:
        task["first_id"] = 1
    note = "" if called is names else f"name the {len(called)} classes{part}"
    return task, note


def _look(root: Path, paths: Sequence[str]) -> _Values:
    """The values of label files; UserError for one that cannot be read."""
    seen = _Values()
    shares = []
    for path in paths:
        values = _values_of(root / path, seen)
        if values.ndim == 3 and values.shape[2] == 3 and values.dtype.kind == "f":
            seen.vectors = True
            continue
        if values.ndim == 3 and values.shape[2] == 3 and (values != values[..., :1]).any():
            flat = values.reshape(-1, 3)
            lengths = np.sqrt(np.square(flat[::7] / 127.5 - 1).sum(1))
            shares.append(float((np.abs(lengths - 1) < 0.1).mean()))
            colors = np.unique(flat, axis=0)
            seen.many = seen.many or len(colors) > MANY_COLORS
            if not seen.many:
                seen.colors.update(map(tuple, colors.tolist()))
            else:
                seen.colors[0, 0, 0] += 1
            seen.many = seen.many or len(seen.colors) > MANY_COLORS
            continue
        values = values[..., 0] if values.ndim == 3 else values
        finite = values[np.isfinite(values)]
        if values.ndim != 2 or not finite.size:
            continue
        seen.high = max(seen.high, float(finite.max()))
        if values.dtype.kind == "f" and (finite != np.rint(finite)).any():
            seen.floats = True
            continue
        unique = np.unique(finite)
        if len(unique) <= MANY_COLORS:
            seen.values.update(int(value) for value in unique)
        seen.sixteen = seen.sixteen or (values.dtype.itemsize > 1 and len(unique) > MANY_COLORS)
        seen.many = seen.many or (len(unique) > MANY_GREYS and seen.palette is None)
    seen.unit = float(np.mean(shares)) if shares else 0.0
    if seen.colors and seen.values:  # some files of a colour-coded map are grey: black is one of its colours
        seen.colors.update((value, value, value) for value in seen.values if 0 <= value <= 255)
    return seen


def _values_of(path: Path, seen: _Values) -> Array:
    if path.suffix.lower() == ".npy":
        return read_array(path)
    try:
        with open_picture(path) as picture:
            if picture.mode == "P" and seen.palette is None:
                seen.palette = list(picture.getpalette() or ())
            plain = picture.convert("RGB") if picture.mode in ("RGBA", "CMYK", "PA") else picture
            values = np.asarray(plain.convert("L") if picture.mode in ("1", "LA") else plain)
    except Exception as error:  # decoders raise errors of any type for broken files
        raise UserError(f"{path.name} cannot be read ({' '.join(str(error).split())})") from None
    return values


def _orientation(root: Path, images: _Files, labels: Sequence[_Files]) -> tuple[str, str]:
    """How labels lie on pictures with an orientation tag, by their sizes; or a note that these leave it open."""
    votes: Counter[str] = Counter()
    names = sorted(images.paths)
    for name in names[:: -(-len(names) // SAMPLE)]:
        with contextlib.suppress(OSError, ValueError, SyntaxError), open_picture(root / images.paths[name]) as picture:
            tag = picture.getexif().get(ExifTags.Base.Orientation, 1)
            stored = (picture.height, picture.width)
            sizes = {stored_size(root / group.paths[name]) for group in labels if name in group.paths}
            if tag not in (2, 3, 4, 5, 6, 7, 8) or len(sizes) != 1:
                continue
            upright = stored[::-1] if tag > 4 else stored
            fits = [how for how, size in (("stored", stored), ("upright", upright)) if size in sizes]
            votes[fits[0] if len(fits) == 1 else "open"] += 1
    certain = [how for how in ("stored", "upright") if votes[how]]
    if len(certain) == 1:
        return certain[0], f"orientation: {certain[0]}, as the sizes of labels show"
    return "", "pictures have orientation tags: add orientation: upright or stored, as the labels lie" if votes else ""


def _names_in(root: Path, files: Sequence[str]) -> list[str] | None:
    """The lines of a file such as classes.txt; None where there is none."""
    for path in files:
        if re.fullmatch(rf"{CLASS_FILES}\.txt", PurePosixPath(path).name.lower()):
            try:
                lines = read_text(root / path).splitlines()
            except (OSError, UserError):
                continue
            names = [line.strip() for line in lines if line.strip()]
            if len(set(names)) == len(names) >= 2:
                return names
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Splits and text


def _splits(
    root: Path, images: _Files, labels: Sequence[_Files], files: Sequence[str]
) -> tuple[dict[str, Any], dict[str, list[str]], set[str]]:
    """The splits; lists to be written where pictures and labels cannot be told apart by a pattern; the chosen images.

    Of several pairs of lists, as PASCAL VOC has, the one whose images have the most labels.
    """
    listed = _listed_splits(root, images, labels, files)
    if listed is not None:
        return listed[0], {}, listed[1]
    everything = set(images.paths)
    folders = {path: PurePosixPath(path).parts[:-1] for path in images.paths.values()}
    places = {}
    for words in (TRAIN, VAL):
        for word in words:
            at = {place for parts in folders.values() if (place := _up_to(parts, word)) is not None}
            if at:
                places[words[0]] = sorted(at)
                break
    if len(places) == 2:
        return {key: where[0] if len(where) == 1 else where for key, where in places.items()}, {}, everything
    above = os.path.commonpath(["/".join(parts) or "." for parts in folders.values()])
    regex = re.compile(re.escape(images.start).replace(r"\{\}", "(.+)").replace(r"\{split\}", "[^/]+") + r"\.[^./]+")
    is_mixed = any(regex.fullmatch(path) for group in labels for path in group.paths.values()
                   if images.pattern.endswith(ANY) or path.endswith(PurePosixPath(images.pattern).suffix))  # fmt: skip
    if not is_mixed:
        return {"train": above or ".", "val_every": VAL_EVERY}, {}, everything
    names = sorted(images.paths)
    val = names[VAL_EVERY - 1 :: VAL_EVERY]
    lists = {"train.txt": [name for name in names if name not in set(val)], "val.txt": val}
    return {"train": "train.txt", "val": "val.txt"}, lists, everything


def _listed_splits(
    root: Path, images: _Files, labels: Sequence[_Files], files: Sequence[str]
) -> tuple[dict[str, str], set[str]] | None:
    """The lists of a folder called train.txt and val.txt or the like, and the images that they name."""
    pairs: dict[str, dict[str, str]] = defaultdict(dict)
    for words in (TRAIN, VAL):
        for word in reversed(words):  # the first is to stay
            for path in files:
                if PurePosixPath(path).name.lower() == f"{word}.txt":
                    pairs[str(PurePosixPath(path).parent)][words[0]] = path
    best, found = -1.0, None
    for pair in pairs.values():
        names = {name for path in pair.values() for name in _listed(root / path, images)}
        score = sum(len(names & group.paths.keys()) / len(names) for group in labels) if names else 0.0
        if len(pair) == 2 and names and (score, len(names)) > (best, len(found[1]) if found else 0):
            best, found = score, (pair, names)
    return found


def _listed(path: Path, images: _Files) -> list[str]:
    """The names of images in a list, whose lines may be names or end with one, as paths do."""
    try:
        lines = read_text(path, max_bytes=LONGEST_LIST).splitlines()
    except (OSError, UserError):
        return []
    last = {name.rpartition("/")[2]: name for name in images.paths}
    stems = [re.sub(rf"\.({'|'.join(PICTURES)})$", "", line.strip(), flags=re.IGNORECASE) for line in lines]
    found = [stem if stem in images.paths else last.get(stem.rpartition("/")[2]) for stem in stems]
    return [name for name in found if name is not None]


def _up_to(parts: Sequence[str], word: str) -> str | None:
    """The path up to the folder of the split ``word``, with what lies in it; None where there is none."""
    found = [SPLIT_FOLDER.fullmatch(part) for part in parts]
    at = next((i for i, match in enumerate(found) if match is not None and match[1].lower() == word), None)
    if at is None:
        return None
    return "/".join(parts[: at + 2] if at == 0 else parts[: at + 1])


def _as_name(start: str, *, taken: Iterable[str]) -> str:
    words = re.sub(r"\{\w*\}", "", start).rstrip("/").rpartition("/")[2]
    last = [word for word in re.split(r"[^A-Za-z0-9]+", words) if word and not word.isdigit()]
    name = "_".join(last[-2:]).lower() or "labels"
    name = name if re.match(r"[a-z_]", name) else f"labels_{name}"
    return next(each for i in range(1, 99) if (each := name if i == 1 else f"{name}_{i}") not in taken)


def _as_text(tree: Mapping[str, Any]) -> str:
    """YAML with what a user has to know; colours and lists of numbers in one line."""
    lines = [
        "# Written by prepare_data --init from what is in this folder: look it through (docs/own_data.md explains it).",
        f"name: {_quoted(tree['name'])}",
        f"images: {_quoted(tree['images'])}  # {{}} is the name of an image",
        "splits:",
        *(f"  {key}: {_quoted(value)}" for key, value in tree["splits"].items()),
        *([f"orientation: {tree['orientation']}"] if "orientation" in tree else []),
        "tasks:",
    ]
    for name, task in tree["tasks"].items():
        lines.append(f"  {name}:")
        for key, value in task.items():
            if isinstance(value, Mapping):
                lines.append(f"    {key}:")
                lines += [f"      {_quoted(each)}: {_quoted(what)}" for each, what in value.items()]
            else:
                lines.append(f"    {key}: {_quoted(value)}")
    return "\n".join(lines) + "\n"


def _quoted(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_quoted, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_]([\w/ .-]*\w)?", value, re.ASCII):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off", "true", "false", "null", "none"):
        return f'"{value}"'
    return str(value)
