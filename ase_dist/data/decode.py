"""Decodes the label files of PASCAL_MT, NYUD_MT and users' own folders to compact labels (``labels.py``).

Every decoder takes the path of one file and ``shape``, the [H, W] of its image; a label of another size is resized to
it (nearest; normals linear). UserError, which names the file, for one that does not hold what it should. Where the
same numbers may mean two things (metres or millimetres, a dark grey picture or a mask) they are refused, not guessed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from skimage.morphology import thin

from ase_dist.data.files import TURN_LABEL, Array, read_array, read_codes, read_matrix, read_variable, reject
from ase_dist.data.labels import ZERO_CODE, codes_from_normals, fit_label, fit_normals, ignored_label
from ase_dist.data.matlab import Struct, Value
from ase_dist.tasks import IGNORE, Kind, Task

PERSON = 15  # the class id of a person in PASCAL-Part
MILLIMETRES = "divide millimetres by 1000, or describe the folder in a dataset.yaml with unit: mm"
DEEPEST = 100  # metres; what is larger is taken for millimetres

# The 24 parts of a person in PASCAL-Part, grouped as the multi-task literature does.
PART_IDS: dict[str, int] = {
    part: group
    for group, parts in {
        1: "hair head lear rear lebrow rebrow leye reye mouth nose",
        2: "neck torso",
        3: "luarm ruarm",
        4: "llarm rlarm lhand rhand",
        5: "luleg ruleg",
        6: "llleg rlleg lfoot rfoot",
    }.items()
    for part in parts.split()
}

# PASCAL-Context ids (of 459) whose distilled normals are trusted: the classes that the teacher's data set knows too.
_NORMALS_IDS_TEXT = """
    3 4 6 9 10 11 13 15 17 18 22 23 29 30 33 34 36 37 38 39 41 43 46 49 50 51 53 55 56 59 61 62 65 66 68 69 72
    73 78 83 84 85 87 88 95 96 101 104 105 107 111 113 115 122 124 135 141 142 143 146 150 154 157 158 159 165
    172 174 181 183 184 191 193 195 197 199 202 213 215 216 219 220 223 225 228 230 232 233 238 239 242 243 246
    250 251 252 255 260 261 263 269 272 273 275 281 283 284 285 286 287 288 290 291 292 293 295 304 307 309 310
    314 315 319 323 329 330 331 336 342 345 349 350 351 352 355 357 368 370 371 374 379 380 383 384 397 401 403
    405 407 408 411 412 413 414 417 419 421 423 427 429 430 432 440 441 442 443 444 446 454 457
"""
NORMALS_IDS = tuple(map(int, _NORMALS_IDS_TEXT.split()))
_LARGEST_MAP_ID = 65535
_NORMALS_VALID = np.isin(np.arange(_LARGEST_MAP_ID + 1), NORMALS_IDS)

Shape = tuple[int, int]
Decoder = Callable[[Path, Shape], Array]


def decoder_of(task: Task) -> Decoder:
    """What decodes the labels of a task whose data set has no decoder for it.

    classes: a PNG or whole numbers in a .npy, ids below ``task.channels``, 255 ignored; mask: a grey PNG, 1 where it is
    above one half, or 0 and 1 in a PNG or .npy; edges: a PNG or .npy of two values, 1 where it is not zero; 0, 1 and
    255 in either: 255 ignored; normals: an
    RGB picture or unit vectors in a .npy; depth: metres in a .npy or a .mat's ``depth``.
    """
    if task.kind == "classes":
        return functools.partial(class_ids, classes=task.channels)
    others: dict[Kind, Decoder] = {"mask": mask, "edges": edge_picture, "normals": normals, "depth": depth}
    return others[task.kind]


# ---------------------------------------------------------------------------------------------------------------------
# PASCAL-Context, and any folder


def class_ids(path: Path, shape: Shape, *, classes: int = 21, unlabelled: int = IGNORE) -> Array:
    """Ids below ``classes`` in a .npy, or as palette indices or grey values of a PNG; ``unlabelled`` is ignored."""
    wanted = f"class ids 0..{classes - 1} and {unlabelled} for ignored pixels"
    if path.suffix == ".npy":
        wanted = f"a matrix of {wanted}"
        ids = _matrix(path, read_array(path), wanted)
        ids = ids if unlabelled == IGNORE else np.where(ids == unlabelled, IGNORE, ids)
    else:
        wanted = f"an 8-bit palette or grey PNG of {wanted}"
        ids = read_codes(path, modes=("P", "L"), wanted=wanted)
    return _fit(path, _checked_ids(path, ids, largest=classes - 1, wanted=wanted), shape)


def human_parts(path: Path, shape: Shape) -> Array:
    """The seven part classes of the PASCAL-Part struct ``anno``; wholly ignored where no person has parts.

    Later parts overwrite earlier ones, and parts of later persons those of earlier ones, as in all published code.
    """
    wanted = "the PASCAL-Part struct: anno(1).objects with class, class_ind, mask and parts of (part_name, mask)"
    anno = read_variable(path, "anno")
    if not isinstance(anno, Struct) or not anno.elements:
        raise reject(path, "a struct of another layout (it is none)", wanted)
    parts: list[tuple[str, Array]] = []
    try:
        for thing in _elements(anno.elements[0]["objects"]):
            if int(np.ravel(np.asarray(thing["class_ind"]))[0]) == PERSON:
                parts += [(str(part["part_name"]), np.asarray(part["mask"])) for part in _elements(thing["parts"])]
    except (IndexError, TypeError, KeyError, ValueError, OverflowError) as error:
        raise reject(path, f"a struct of another layout ({type(error).__name__} at {error})", wanted) from None
    target = np.zeros(parts[0][1].shape if parts else shape, dtype=np.uint8)
    for name, part in parts:
        if name not in PART_IDS:
            raise reject(path, f"a person's part named {name!r}", f"one of {', '.join(PART_IDS)}")
        if part.ndim != 2 or part.shape != target.shape or part.dtype.kind not in "buif":
            raise reject(path, f"a mask of shape {part.shape} for {name!r} after one of {target.shape}", wanted)
        if part.dtype.kind == "f" and np.isnan(part).any():
            raise reject(path, f"a mask with NaN for {name!r}", wanted)
        target[part != 0] = PART_IDS[name]
    if target.size and not target.any():
        return ignored_label("classes", shape)
    return _fit(path, target, shape)


def mask(path: Path, shape: Shape) -> Array:
    """1 on the foreground, 0 elsewhere, 255 where a file of 0, 1 and 255 does not know (``unknown_pixels``).

    A file whose largest value is 1 is a mask as it stands; else a grey PNG has its foreground above one half of 255.
    0 and one value up to 127 may be either: refused.
    """
    wanted = "a mask of 0 and 1 with 255 for unknown, or grey values from 0 to 255 with the foreground above 127"
    if path.suffix == ".npy":
        values = _matrix(path, read_array(path), wanted)
    else:
        values = read_codes(path, modes=("L", "1"), wanted="an 8-bit grey PNG")
    return _fit(path, foreground(path, values, wanted=wanted), shape)


def foreground(path: Path, values: Array, *, wanted: str) -> Array:
    """``mask`` for the stored values of a file, uint8 of their shape."""
    if not values.size or values.dtype == bool:
        return values.astype(np.uint8)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255):  # also where one is NaN
        raise reject(path, f"values from {low:g} to {high:g}", wanted)
    if high <= 1:
        return (values > 0.5).astype(np.uint8)
    if values.dtype.kind == "f" and (values != np.rint(values)).any():
        raise reject(path, f"fractions up to {high:g}", wanted)
    unknown = unknown_pixels(values)
    if unknown.any():
        return np.where(unknown, IGNORE, values == 1).astype(np.uint8)
    if high <= 127 and low == 0 and ((values == 0) | (values == high)).all():
        advice = "write 0 and 255, or describe the folder in a dataset.yaml with a threshold or an id_map"
        raise reject(path, f"the values 0 and {high:g}, a mask or a grey picture below 128", wanted, advice=advice)
    return (values > 127).astype(np.uint8)


def unknown_pixels(values: Array) -> Array:
    """Where a mask or edges are unknown, bool: at 255, if the file holds 1, 255 and else only 0.

    The one rule of what 255 means in such files: with 1 it is unknown, without 1 it is white. A data set whose files
    of 0 and 255 have no white but unknown pixels says so by ``ignore: 255`` in its dataset.yaml.
    """
    at_most = (values == 0) | (values == 1) | (values == IGNORE)
    return (values == IGNORE) & bool((values == 1).any() and at_most.all())


def label_map(path: Path, shape: Shape) -> Array:
    """The 459-class ids ``LabelMap`` as int32 [H, W]."""
    wanted = "the variable LabelMap, a matrix of whole numbers from 0 to 65535"
    ids = read_matrix(path, "LabelMap", wanted)
    if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "uif":
        raise reject(path, f"LabelMap of shape {ids.shape} and type {ids.dtype}", wanted)
    if not (ids.min() >= 0 and ids.max() <= _LARGEST_MAP_ID) or (ids != np.rint(ids)).any():  # also where one is NaN
        raise reject(path, f"LabelMap with values from {ids.min()} to {ids.max()}", wanted)
    return _fit(path, ids.astype(np.int32), shape)


def boundaries(ids_HW: Array) -> Array:
    """1 on the thinned boundaries of a map of ids, else 0: where its 4-neighbour Laplacian is not zero.

    Resizing comes before: boundaries of the resized map stay one pixel wide and unbroken, a resized boundary would not.
    """
    p = np.pad(ids_HW, 1, mode="reflect" if min(ids_HW.shape) > 1 else "edge")
    edges = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] != 4 * ids_HW
    return thinned(edges).astype(np.uint8)


def thinned(lines: Array) -> Array:
    """Lines of any thickness, bool [H, W], thinned to one pixel."""
    rows, columns = np.flatnonzero(lines.any(axis=1)), np.flatnonzero(lines.any(axis=0))
    result = np.zeros(lines.shape, dtype=bool)
    if rows.size:  # thinning only takes pixels away: the box that holds them all is enough
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        result[box] = thin(lines[box])
    return result


def distilled_normals(path: Path, ids_HW: Array) -> Array:
    """Normal codes of an RGB PNG, ignored where ``ids_HW`` is not in NORMALS_IDS."""
    codes = normals(path, ids_HW.shape)
    codes[~_NORMALS_VALID[ids_HW]] = ZERO_CODE
    return codes


# ---------------------------------------------------------------------------------------------------------------------
# NYUD-v2, and any folder


def nyud_classes(path: Path, shape: Shape) -> Array:
    """The 40 classes of a PNG, or of a .mat's ``segmentation``, coded 0 unlabelled (ignored here), 1..40."""
    wanted = "class ids 1..40 and 0 for unlabelled pixels"
    if path.suffix == ".mat":
        ids = _matrix(path, read_matrix(path, "segmentation", wanted), f"a matrix of {wanted}")
    else:
        ids = read_codes(path, modes=("P", "L"), wanted=f"an 8-bit palette or grey PNG of {wanted}")
    ids = _checked_ids(path, ids, largest=40, wanted=wanted)
    ignored = (ids == 0) | (ids == IGNORE)
    return _fit(path, np.where(ignored, IGNORE, ids - 1).astype(np.uint8), shape)


def depth(path: Path, shape: Shape) -> Array:
    """Metres as float32 [H, W] from a .npy or a .mat's ``depth``; values that are not finite and positive become 0.

    Refused above 100 metres, which are most likely millimetres, and where distances are negative: one negative value
    may stand for none, but not several.
    """
    wanted = f"a matrix of metres up to {DEEPEST}, with zero or NaN where there is no depth"
    stored = read_matrix(path, "depth", wanted) if path.suffix == ".mat" else read_array(path)
    values = _matrix(path, stored, wanted)
    if values.dtype.kind == "b":
        raise reject(path, "true and false", wanted)
    metres = np.where(np.isfinite(values), values, 0)
    if metres.size and metres.max() > DEEPEST:
        raise reject(path, f"depths up to {metres.max():g}", wanted, advice=MILLIMETRES)
    negative = metres[metres < 0]
    if negative.size and negative.min() != negative.max():
        raise reject(path, f"depths from {negative.min():g} to {negative.max():g}", wanted)
    return _fit(path, np.where(metres > 0, metres, 0).astype(np.float32), shape)


def disparity(path: Path, shape: Shape) -> Array:
    """Disparities as float32 [H, W] from a .npy; values that are not finite and positive are none, and become 0."""
    wanted = "a matrix of disparities, with zero where there is none"
    values = _matrix(path, read_array(path), wanted)
    if values.dtype.kind != "f":
        raise reject(path, f"numbers of type {values.dtype}", wanted)
    known = np.isfinite(values) & (values > 0)
    return _fit(path, np.where(known, values, 0).astype(np.float32), shape)


def edge_picture(path: Path, shape: Shape) -> Array:
    """1 where a black-and-white PNG is not black, or the matrix of a .npy not zero; refused with more than two values.

    A file of 0, 1 and 255 has unknown pixels (``unknown_pixels``). All 255 may be unknown or edges: refused. Of soft
    edges (grey values, probabilities) the part that is not zero is far too much.
    """
    wanted = "two values, zero where there is no edge, or 0, 1 and 255 for unknown"
    if path.suffix == ".npy":
        values = _matrix(path, read_array(path), wanted)
    else:
        values = read_codes(path, modes=("L", "1", "P"), wanted="an 8-bit grey PNG")
    return _fit(path, edge_pixels(path, values, wanted=wanted), shape)


def edge_pixels(path: Path, values: Array, *, wanted: str) -> Array:
    """``edge_picture`` for the stored values of a file, uint8 of their shape."""
    unknown = unknown_pixels(values)
    if unknown.any():
        return np.where(unknown, IGNORE, values == 1).astype(np.uint8)
    if values.size and (values == IGNORE).all():
        advice = "remove the file (data.partial=true), or set ignore: 255 in a dataset.yaml"
        raise reject(path, "255 in every pixel, unknown or edges", wanted, advice=advice)
    edges = values != 0
    strengths = values[edges]
    if strengths.size and not (0 < strengths.min() == strengths.max() < np.inf):  # also where one is NaN
        raise reject(path, f"values from {strengths.min():g} to {strengths.max():g} besides zero", wanted)
    return edges.astype(np.uint8)


def normals(path: Path, shape: Shape) -> Array:
    """Normal codes of an RGB picture, R, G, B being x, y, z; or of unit vectors [H, W, 3] in a .npy."""
    if path.suffix != ".npy":
        rgb = read_codes(path, modes=("RGB",), wanted="an RGB picture of 8 bits a channel")
        return _fit(path, rgb, shape, resize=fit_normals).copy()
    wanted = "vectors [H, W, 3] with components from -1 to 1, of length 1, or zero where there is none"
    vectors = read_array(path)
    if vectors.ndim != 3 or vectors.shape[2] != 3 or vectors.dtype.kind != "f" or not vectors.size:
        raise reject(path, f"an array of shape {vectors.shape} and type {vectors.dtype}", wanted)
    if not (np.abs(vectors) <= 1.01).all():  # 1.01: some are unit vectors in half precision; false for NaN
        raise reject(path, f"components from {vectors.min():g} to {vectors.max():g}", wanted)
    vectors_3HW = vectors.astype(np.float32).transpose(2, 0, 1)
    length = np.sqrt(np.square(vectors_3HW).sum(0))
    length = length[length > 0.01]
    # Interpolated ones may be a little shorter. Colours from 0 to 1 are neither: (n + 1) / 2 is 0.4 to 1.4 long.
    if length.size and (length.max() > 1.05 or length.mean() < 0.9):
        raise reject(path, f"vectors of length {length.mean():.3g} on average and {length.max():.3g} at most", wanted)
    return _fit(path, codes_from_normals(vectors_3HW), shape, resize=fit_normals)


# ---------------------------------------------------------------------------------------------------------------------


def _elements(value: Value) -> list[dict[str, Value]]:
    """The elements of a struct; none of an empty matrix, as which MATLAB stores an empty list."""
    if isinstance(value, np.ndarray) and not value.size:
        return []
    if not isinstance(value, Struct):
        raise TypeError("no struct")
    return value.elements


def _matrix(path: Path, values: Array, wanted: str) -> Array:
    """A matrix of plain numbers, also where it is stored as [H, W, 1] or [1, H, W]."""
    flat = values
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        flat = values[..., 0] if values.shape[2] == 1 else values[0]
    if flat.ndim != 2 or flat.dtype.kind not in "buif":
        raise reject(path, f"an array of shape {values.shape} and type {values.dtype}", wanted)
    return flat


def _checked_ids(path: Path, ids: Array, *, largest: int, wanted: str) -> Array:
    """``ids`` as uint8, all of them whole numbers from 0 to ``largest``, or 255."""
    if ids.dtype.kind == "f" and not (np.isfinite(ids).all() and (ids == np.rint(ids)).all()):
        raise reject(path, "numbers that are not whole", wanted)
    wrong = ids[((ids > largest) & (ids != IGNORE)) | (ids < 0)]
    if wrong.size:
        raise reject(path, f"{wrong.size} pixels with ids from {wrong.min()} to {wrong.max()}", wanted)
    return ids.astype(np.uint8)


def _fit(path: Path, label: Array, shape: Shape, *, resize: Callable[[Array, Shape], Array] = fit_label) -> Array:
    """``label`` at the image's ``shape``; UserError for an empty label and for one whose sides are exchanged."""
    if label.shape[:2] == shape:
        return label
    height, width = label.shape[:2]
    sizes = f"a label of {width} x {height} pixels for an image of {shape[1]} x {shape[0]}"
    if min(height, width) < min(2, *shape):
        raise reject(path, sizes, "one of the image's size")
    if not _is_scaled((height, width), shape) and _is_scaled((width, height), shape):
        wanted = "the sides of the image as it is stored, before its orientation tag"
        raise reject(path, sizes, wanted, advice=TURN_LABEL)
    return resize(label, shape)


def _is_scaled(size: Shape, shape: Shape) -> bool:
    """Whether ``size`` is ``shape`` times one factor, each side within a pixel."""
    (low_h, high_h), (low_w, high_w) = (((n - 1) / m, (n + 1) / m) for n, m in zip(size, shape, strict=True))
    return low_h <= high_w and low_w <= high_h
