"""Label files of a described data set, decoded to compact labels (``labels.py``) as the ``dataset.yaml`` says.

Stored values are the numbers of a grey or palette picture (a palette's indices), of an RGB picture whose channels are
equal, or of a .npy. What the description does not explain is refused with the file's name, not guessed.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from scipy.ndimage import binary_dilation

from ase_dist.data import decode
from ase_dist.data.decode import DEEPEST, Decoder, Shape, _fit, _matrix
from ase_dist.data.files import Array, read_array, read_codes, read_image, reject
from ase_dist.data.labels import ignored_label
from ase_dist.description import FILE_NAME, KINDS, UNITS, TaskDescription
from ase_dist.tasks import IGNORE

GREY_MODES = ("1", "L", "P", "I;16", "I;16B", "I;16L", "I", "LA", "RGB", "RGBA")  # of ids
DEPTH_MODES = ("L", "I;16", "I;16B", "I;16L", "I", "F")
DEEPEST_OUTDOORS = 10 * DEEPEST  # metres; what is larger was most likely not stored in metres
MOST_SHOWN = 5  # values in a sentence
UNLISTED = -1


def label_decoder(task: TaskDescription) -> Decoder:
    """What decodes the label files of ``task``."""
    kind = KINDS[task.kind].kind
    if kind == "normals":
        return decode.normals
    if kind == "depth":
        scale = task.unit if isinstance(task.unit, float) else UNITS[str(task.unit)]
        return functools.partial(_depth, scale=scale, is_sure=task.unit != "m", ignore=task.ignored_ids)
    if kind == "classes":
        return _Classes(task)
    return functools.partial(_two_values, task=task, mapped=_Mapping(task) if task.id_map else None)


class _Mapping:
    """Stored ids, or colours, to labels."""

    def __init__(self, task: TaskDescription) -> None:
        self.task = task
        self.by_color = task.rgb_map is not None
        targets = task.targets()
        stored = {_code(value): IGNORE if label is None else label for value, label in targets.items()}
        self.keys = np.array(sorted(stored), dtype=np.int64)
        self.labels = np.array([stored[key] for key in sorted(stored)], dtype=np.int16)
        self._tables: dict[int, Array] = {}

    def __call__(self, path: Path, values: Array) -> Array:
        """uint8 labels of whole numbers; UserError, with the file's name, for values that the description lacks."""
        if values.dtype in (np.uint8, np.uint16):
            size = 1 << (8 * values.dtype.itemsize)
            if size not in self._tables:
                self._tables[size] = self._look_up(np.arange(size))
            labels = self._tables[size][values]
        else:
            labels = self._look_up(values.astype(np.int64))
        unlisted = labels == UNLISTED
        if unlisted.any():
            if self.task.unlisted == "refuse":
                raise self._refuse(path, values[unlisted])
            labels = np.where(unlisted, IGNORE, labels)
        return labels.astype(np.uint8)

    def _look_up(self, values: Array) -> Array:
        if not len(self.keys):
            return np.full(values.shape, UNLISTED, dtype=np.int16)
        places = np.searchsorted(self.keys, values).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == values, self.labels[places], np.int16(UNLISTED))

    def _refuse(self, path: Path, values: Array) -> Exception:
        found, counts = np.unique(values, return_counts=True)
        order = np.argsort(-counts)
        texts = [str(_color(int(found[i])) if self.by_color else int(found[i])) for i in order[:MOST_SHOWN]]
        shown = ", ".join(texts) + (f" and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else "")
        what = "colours" if self.by_color else "ids"
        key = "rgb_map" if self.by_color else "id_map or ignore"
        wanted = f"only {what} of {_shown_keys(self.keys, by_color=self.by_color)}"
        advice = f"add them to {key} in {FILE_NAME}, or set unlisted: ignore"
        return reject(path, f"{len(values)} pixels of the {what} {shown}", wanted, advice=advice)


class _Classes:
    """Class ids by id or by colour; of parts, an image that is all background is ignored as a whole."""

    def __init__(self, task: TaskDescription) -> None:
        self.task = task
        self.mapped = _Mapping(task)

    def __call__(self, path: Path, shape: Shape) -> Array:
        if self.mapped.by_color:
            _refuse_lossy(path, "a PNG of the colours of rgb_map")
            rgb = read_image(path).astype(np.int64)
            values = (rgb[..., 0] << 16) + (rgb[..., 1] << 8) + rgb[..., 2]
        else:
            wanted = "class ids, a grey or palette PNG or whole numbers in a .npy"
            values = _whole(path, _stored_values(path, wanted), wanted)
        label = self.mapped(path, values)
        if self.task.kind == "parts" and not ((label > 0) & (label != IGNORE)).any():
            return ignored_label("classes", shape)
        return _fit(path, label, shape)


def _two_values(path: Path, shape: Shape, *, task: TaskDescription, mapped: _Mapping | None) -> Array:
    """A mask or edges: 1 by the map, above the threshold, or as ``decode.mask`` and ``decode.edge_picture`` decide."""
    values = _stored_values(path, "a mask, a grey or black-and-white PNG or a .npy")
    if mapped is not None:
        label = mapped(path, _whole(path, values, "ids as in id_map"))
    else:
        ignored = np.isin(values, task.ignored_ids)
        rest = np.where(ignored, 0, values)
        if task.threshold is not None:
            label = (rest > task.threshold).astype(np.uint8)
        elif task.kind == "mask":
            wanted = "0 and 1 or grey values with the foreground above 127 (or a threshold, an ignore or an id_map)"
            label = decode.foreground(path, rest, wanted=wanted)
        else:
            wanted = "two values, zero where there is no edge (or a threshold or an id_map)"
            label = decode.edge_pixels(path, rest, wanted=wanted)
        label[ignored] = IGNORE
    label = _fit(path, label, shape)
    return label if task.thickness is None else _with_thickness(label, task.thickness)


def _with_thickness(label: Array, thickness: int) -> Array:
    """Edges thinned to lines of one pixel, then widened to ``thickness`` pixels; ignored pixels stay ignored."""
    lines = decode.thinned(label == 1)
    square = np.ones((thickness, thickness), dtype=bool)
    wide = binary_dilation(lines, square) if thickness > 1 else lines
    return np.where(label == IGNORE, IGNORE, wide).astype(np.uint8)


def _depth(path: Path, shape: Shape, *, scale: float, is_sure: bool, ignore: tuple[int, ...]) -> Array:
    """Metres as float32 [H, W]: stored values times ``scale``; 0 where they are ignored, not finite or not positive.

    Above a kilometre they are refused unless ``is_sure`` that the unit is none that was taken for metres by mistake.
    """
    wanted = "a matrix of distances, zero or NaN where there is none"
    if path.suffix.lower() == ".mat":
        return decode.depth(path, shape)
    if path.suffix.lower() == ".npy":
        values = _matrix(path, read_array(path), wanted)
    else:
        _refuse_lossy(path, "a 16-bit grey PNG, a floating-point TIFF or a .npy of distances")
        values = read_codes(path, modes=DEPTH_MODES, wanted="a 16-bit grey PNG, a floating-point TIFF or a .npy")
    if values.dtype.kind == "b":
        raise reject(path, "true and false", wanted)
    is_known = np.isfinite(values) & ~np.isin(values, ignore)
    known = np.where(is_known, values, 0)
    negative = known[known < 0]
    if negative.size and negative.min() != negative.max():
        raise reject(path, f"distances from {negative.min():g} to {negative.max():g}", wanted)
    metres = np.where(known > 0, known, 0).astype(np.float32) * np.float32(scale)
    if not is_sure and metres.size and metres.max() > DEEPEST_OUTDOORS:
        advice = f"set unit: mm in {FILE_NAME}, or unit: 1.0 where they are metres"
        raise reject(path, f"distances up to {metres.max():g}", "metres, as its unit says", advice=advice)
    return _fit(path, metres, shape)


# ---------------------------------------------------------------------------------------------------------------------
# Stored values


def _stored_values(path: Path, wanted: str) -> Array:
    """The numbers of a label file as a matrix."""
    if path.suffix.lower() == ".npy":
        return _matrix(path, read_array(path), wanted)
    _refuse_lossy(path, wanted)
    values = read_codes(path, modes=GREY_MODES, wanted=wanted)
    if values.ndim == 2:
        return values
    color, alpha = (values[..., :-1], values[..., -1]) if values.shape[2] in (2, 4) else (values, None)
    if alpha is not None and (alpha != 255).any():
        raise reject(path, "a picture with transparent pixels", wanted, advice="save it without transparency")
    if (color != color[..., :1]).any():
        advice = f"give an rgb_map in {FILE_NAME} where colours stand for classes"
        raise reject(path, "a picture in colours", wanted, advice=advice)
    return color[..., 0]


def _whole(path: Path, values: Array, wanted: str) -> Array:
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.rint(values)).all()):
        raise reject(path, "numbers that are not whole", wanted)
    return values


def _refuse_lossy(path: Path, wanted: str) -> None:
    """Raise UserError for a JPEG or WebP under any name: they do not keep values exactly."""
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(12)
        if head[:2] == b"\xff\xd8" or (head[:4] == b"RIFF" and head[8:] == b"WEBP"):
            kind = "JPEG" if head[:2] == b"\xff\xd8" else "WebP"
            raise reject(path, f"a {kind}, which does not keep values exactly", wanted, advice="save labels as PNG")


def _code(value: int | tuple[int, int, int]) -> int:
    return value if isinstance(value, int) else (value[0] << 16) + (value[1] << 8) + value[2]


def _color(code: int) -> list[int]:
    return [code >> 16, code >> 8 & 255, code & 255]


def _shown_keys(keys: Array, *, by_color: bool) -> str:
    """The keys as a range where they are one, else the first of them."""
    whole = [int(key) for key in keys]
    if by_color:
        texts = [str(_color(key)) for key in whole]
    else:
        breaks = [i for i, key in enumerate(whole) if i == 0 or key != whole[i - 1] + 1]
        runs = [whole[i:j] for i, j in zip(breaks, [*breaks[1:], len(whole)], strict=True)]
        texts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return ", ".join(texts[:MOST_SHOWN]) + (", ..." if len(texts) > MOST_SHOWN else "")
