"""The label files of PASCAL_MT and NYUD_MT decoded to compact labels (``labels.py``).

Every function takes the path of one file and ``shape``, the [H, W] of its image; a label of another size is resized to
it (nearest; normals linear). ValueError, one sentence, for a file that does not hold what it should.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from skimage.morphology import thin

from ase_dist.data.files import Array, read_array, read_codes, read_variable, reject
from ase_dist.data.labels import ZERO_CODE, codes_from_normals, fit_label, fit_normals, ignored_label
from ase_dist.tasks import IGNORE, Kind, Task

PERSON = 15  # the class id of a person in PASCAL-Part

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
NORMALS_IDS = (
    3,
    4,
    6,
    9,
    10,
    11,
    13,
    15,
    17,
    18,
    22,
    23,
    29,
    30,
    33,
    34,
    36,
    37,
    38,
    39,
    41,
    43,
    46,
    49,
    50,
    51,
    53,
    55,
    56,
    59,
    61,
    62,
    65,
    66,
    68,
    69,
    72,
    73,
    78,
    83,
    84,
    85,
    87,
    88,
    95,
    96,
    101,
    104,
    105,
    107,
    111,
    113,
    115,
    122,
    124,
    135,
    141,
    142,
    143,
    146,
    150,
    154,
    157,
    158,
    159,
    165,
    172,
    174,
    181,
    183,
    184,
    191,
    193,
    195,
    197,
    199,
    202,
    213,
    215,
    216,
    219,
    220,
    223,
    225,
    228,
    230,
    232,
    233,
    238,
    239,
    242,
    243,
    246,
    250,
    251,
    252,
    255,
    260,
    261,
    263,
    269,
    272,
    273,
    275,
    281,
    283,
    284,
    285,
    286,
    287,
    288,
    290,
    291,
    292,
    293,
    295,
    304,
    307,
    309,
    310,
    314,
    315,
    319,
    323,
    329,
    330,
    331,
    336,
    342,
    345,
    349,
    350,
    351,
    352,
    355,
    357,
    368,
    370,
    371,
    374,
    379,
    380,
    383,
    384,
    397,
    401,
    403,
    405,
    407,
    408,
    411,
    412,
    413,
    414,
    417,
    419,
    421,
    423,
    427,
    429,
    430,
    432,
    440,
    441,
    442,
    443,
    444,
    446,
    454,
    457,
)
_LARGEST_MAP_ID = 65535
_NORMALS_VALID = np.isin(np.arange(_LARGEST_MAP_ID + 1), NORMALS_IDS)

Shape = tuple[int, int]
Decoder = Callable[[Path, Shape], Array]


def decoder_of(task: Task) -> Decoder:
    """What decodes the labels of a task whose data set has no decoder for it.

    classes: a PNG of ids below ``task.channels``, 255 ignored; mask: a grey PNG, 1 where it is above one half; edges: a
    PNG or .npy, 1 where it is not zero; normals: an RGB picture or vectors in a .npy; depth: metres in a .npy.
    """
    if task.kind == "classes":
        return functools.partial(voc_classes, classes=task.channels)
    others: dict[Kind, Decoder] = {"mask": saliency, "edges": edge_picture, "normals": normals, "depth": depth}
    return others[task.kind]


# ---------------------------------------------------------------------------------------------------------------------
# PASCAL-Context


def voc_classes(path: Path, shape: Shape, *, classes: int = 21) -> Array:
    """Palette indices of a VOC-coded PNG: ids below ``classes``, 255 ignored."""
    wanted = f"an 8-bit palette or grey PNG of class ids 0..{classes - 1} and {IGNORE} for ignored pixels"
    ids = read_codes(path, modes=("P", "L"), wanted=wanted)
    _check_ids(path, ids, largest=classes - 1, wanted=wanted)
    return fit_label(ids, shape)


def human_parts(path: Path, shape: Shape) -> Array:
    """The seven part classes of the PASCAL-Part struct ``anno``; wholly ignored where no person has parts.

    Later parts overwrite earlier ones, and parts of later persons those of earlier ones, as in all published code.
    """
    wanted = "the PASCAL-Part struct: anno(1).objects with class, class_ind, mask and parts of (part_name, mask)"
    anno = read_variable(path, "anno")
    try:
        parts = _person_parts(anno)
    except (IndexError, TypeError, AttributeError, ValueError) as error:
        raise reject(path, f"a struct of another layout ({error})", wanted) from None
    target = np.zeros(parts[0][1].shape if parts else shape, dtype=np.uint8)
    for name, mask in parts:
        if name not in PART_IDS:
            raise reject(path, f"a person's part named {name!r}", f"one of {', '.join(PART_IDS)}")
        if mask.ndim != 2 or mask.shape != target.shape or mask.dtype.kind not in "buif":
            raise reject(path, f"a mask of shape {mask.shape} for {name!r} after one of {target.shape}", wanted)
        target[mask != 0] = PART_IDS[name]
    if not target.any():
        return ignored_label("classes", shape)
    return fit_label(target, shape)


def saliency(path: Path, shape: Shape) -> Array:
    """1 where the grey value is above one half of 255, else 0."""
    grey = read_codes(path, modes=("L", "1"), wanted="an 8-bit grey PNG")
    return fit_label((grey > 127).astype(np.uint8), shape)


def label_map(path: Path, shape: Shape) -> Array:
    """The 459-class ids ``LabelMap`` as int32 [H, W]."""
    wanted = "the variable LabelMap, a matrix of whole numbers from 0 to 65535"
    ids = read_variable(path, "LabelMap")
    if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "uif":
        raise reject(path, f"LabelMap of shape {ids.shape} and type {ids.dtype}", wanted)
    whole = ids.astype(np.int32)
    if (whole != ids).any() or whole.min() < 0 or whole.max() > _LARGEST_MAP_ID:
        raise reject(path, f"LabelMap with values from {ids.min()} to {ids.max()}", wanted)
    return fit_label(whole, shape)


def boundaries(ids_HW: Array) -> Array:
    """1 on the thinned boundaries of a map of ids, else 0: where its 4-neighbour Laplacian is not zero.

    Resizing comes before: boundaries of the resized map stay one pixel wide and unbroken, a resized boundary would not.
    """
    p = np.pad(ids_HW, 1, mode="reflect" if min(ids_HW.shape) > 1 else "edge")
    laplacian = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] - 4 * ids_HW
    return thin(laplacian != 0).astype(np.uint8)


def distilled_normals(path: Path, ids_HW: Array) -> Array:
    """Normal codes of an RGB PNG, ignored where ``ids_HW`` is not in NORMALS_IDS."""
    codes = normals(path, ids_HW.shape)
    codes[~_NORMALS_VALID[ids_HW]] = ZERO_CODE
    return codes


# ---------------------------------------------------------------------------------------------------------------------
# NYUD-v2


def nyud_classes(path: Path, shape: Shape) -> Array:
    """The 40 classes of a PNG, or of a .mat's ``segmentation``, coded 0 unlabelled (ignored here), 1..40."""
    wanted = "class ids 1..40 and 0 for unlabelled pixels"
    if path.suffix == ".mat":
        ids = read_variable(path, "segmentation")
    else:
        ids = read_codes(path, modes=("P", "L"), wanted=f"an 8-bit palette or grey PNG of {wanted}")
    if ids.ndim != 2 or ids.dtype.kind not in "uif":
        raise reject(path, f"an array of shape {ids.shape} and type {ids.dtype}", f"a matrix of {wanted}")
    _check_ids(path, ids, largest=40, wanted=wanted)
    unlabelled = (ids == 0) | (ids == IGNORE)
    return fit_label(np.where(unlabelled, IGNORE, ids.astype(np.int32) - 1).astype(np.uint8), shape)


def depth(path: Path, shape: Shape) -> Array:
    """Metres as float32 [H, W] from a .npy or a .mat's ``depth``; values that are not finite and positive become 0."""
    metres = _flat(path, read_variable(path, "depth") if path.suffix == ".mat" else read_array(path), "metres")
    metres = metres.astype(np.float32)
    return fit_label(np.where(np.isfinite(metres) & (metres > 0), metres, np.float32(0)), shape)


def edge_picture(path: Path, shape: Shape) -> Array:
    """1 where a black-and-white PNG is not black, or the matrix of a .npy not zero."""
    if path.suffix == ".npy":
        values = _flat(path, read_array(path), "edges, not zero where there is one")
    else:
        values = read_codes(path, modes=("L", "1", "P"), wanted="an 8-bit grey PNG")
    return fit_label((values != 0).astype(np.uint8), shape)


def normals(path: Path, shape: Shape) -> Array:
    """Normal codes of an RGB picture, R, G, B being x, y, z; or of vectors [H, W, 3] in a .npy."""
    if path.suffix == ".npy":
        return fit_normals(_codes_of_vectors(path, read_array(path)), shape)
    rgb = read_codes(path, modes=("RGB",), wanted="an RGB picture of 8 bits a channel")
    return fit_normals(rgb, shape).copy()


# ---------------------------------------------------------------------------------------------------------------------


def _person_parts(anno: Array) -> list[tuple[str, Array]]:
    """(name, mask) of every part of every person, in file order; scipy gives structs as object arrays of records."""
    persons = [thing for thing in anno[0][0][1].ravel() if int(thing[1].ravel()[0]) == PERSON]
    return [(str(part[0].ravel()[0]), np.asarray(part[1])) for person in persons for part in person[3].ravel()]


def _flat(path: Path, values: Array, what: str) -> Array:
    """A matrix of plain numbers, also where it is stored as [H, W, 1] or [1, H, W]."""
    flat = values.squeeze() if values.ndim == 3 else values
    if flat.ndim != 2 or flat.dtype.kind not in "buif":
        raise reject(path, f"an array of shape {values.shape} and type {values.dtype}", f"a matrix of {what}")
    return flat


def _codes_of_vectors(path: Path, vectors: Array) -> Array:
    wanted = "vectors [H, W, 3] with components from -1 to 1, zero where there is none"
    if vectors.ndim != 3 or vectors.shape[2] != 3 or vectors.dtype.kind != "f":
        raise reject(path, f"an array of shape {vectors.shape} and type {vectors.dtype}", wanted)
    if not (np.abs(vectors) <= 1.01).all():  # 1.01: some are unit vectors in half precision; false for NaN
        raise reject(path, f"components from {vectors.min():g} to {vectors.max():g}", wanted)
    return codes_from_normals(vectors.astype(np.float32).transpose(2, 0, 1))


def _check_ids(path: Path, ids: Array, *, largest: int, wanted: str) -> None:
    wrong = ids[((ids > largest) & (ids != IGNORE)) | (ids < 0)]
    if wrong.size:
        raise reject(path, f"{wrong.size} pixels with ids from {wrong.min()} to {wrong.max()}", wanted)
