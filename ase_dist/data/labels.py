"""Labels as kept in memory and as trained on: compact numpy arrays, and the tensors of the table in ``tasks.py``.

| kind                 | compact               | ignored value                      |
|----------------------|-----------------------|------------------------------------|
| classes, mask, edges | uint8 [H, W]          | 255                                |
| normals              | uint8 [H, W, 3] codes | the code 128 in all three channels |
| depth                | float32 [H, W] metres | 0                                  |

A code c stands for the component 2 c / 255 - 1, as in the data sets' own files: a quarter of the memory of float32,
and a nearest-neighbour warp moves a quarter of the bytes. Eight bits have no exact zero; vectors whose components are
all 127 or 128 stand for it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ase_dist.data.files import Array
from ase_dist.tasks import IGNORE, Kind

ZERO_CODE = 128
_ZERO_SQUARED = np.float32(3 * (1.5 / 255) ** 2)  # above (127, 128, ...), below every other code


def ignored_value(kind: Kind) -> int:
    """The compact value that no loss and no metric counts."""
    return {"normals": ZERO_CODE, "depth": 0}.get(kind, IGNORE)


def compact_form(kind: Kind, shape: tuple[int, int]) -> tuple[tuple[int, ...], npt.DTypeLike]:
    """The shape and type of the compact label of an image of ``shape`` [H, W]."""
    return (*shape, 3) if kind == "normals" else shape, np.float32 if kind == "depth" else np.uint8


def ignored_label(kind: Kind, shape: tuple[int, int]) -> Array:
    """A compact label for an image of ``shape`` [H, W], ignored everywhere."""
    full, dtype = compact_form(kind, shape)
    return np.full(full, ignored_value(kind), dtype=dtype)


def label_tensor(kind: Kind, compact: Array, *, turn: Array | None = None, zoom: float = 1.0) -> Tensor:
    """The tensor of ``tasks.py``'s table for a compact label; ``turn`` and ``zoom`` as ``normals_from_codes``.

    It never shares memory with ``compact``, which may be kept for the next epoch.
    """
    if kind == "normals":
        return torch.from_numpy(normals_from_codes(compact, turn=turn, zoom=zoom))
    if kind == "depth":
        return torch.from_numpy(compact[None].copy())
    return torch.from_numpy(compact.copy())


def normals_from_codes(codes_HW3: Array, *, turn: Array | None = None, zoom: float = 1.0) -> Array:
    """Unit vectors float32 [3, H, W], zero where the code stands for the zero vector.

    ``turn`` [2, 2] is applied to their (x, y); z is multiplied by ``zoom``, and they are made unit vectors again.
    """
    n = codes_HW3.transpose(2, 0, 1).astype(np.float32, order="C")
    n *= np.float32(2 / 255)
    n -= np.float32(1)
    squared = n[0] * n[0]
    squared += n[1] * n[1]
    squared += n[2] * n[2]
    inverse = np.divide(1, np.sqrt(squared), out=np.zeros_like(squared), where=squared > _ZERO_SQUARED)
    n *= inverse
    if turn is not None:
        (a, b), (c, d) = turn.astype(np.float32)
        n[0], n[1] = a * n[0] + b * n[1], c * n[0] + d * n[1]
    if zoom != 1:
        n[2] *= np.float32(zoom)
        n /= np.sqrt(np.square(n).sum(0)).clip(min=np.float32(1e-6))  # zero vectors stay zero
    return n


def codes_from_normals(normals_3HW: Array) -> Array:
    """The nearest codes uint8 [H, W, 3] of vectors with components in [-1, 1]; shorter than 0.01 is zero."""
    codes = np.rint((normals_3HW + 1) * 127.5).clip(0, 255).astype(np.uint8)
    codes[:, np.square(normals_3HW).sum(0) < 1e-4] = ZERO_CODE
    return np.ascontiguousarray(codes.transpose(1, 2, 0))


def fit_label(label: Array, shape: tuple[int, int]) -> Array:
    """``label`` [h, w, ...] at ``shape`` [H, W]: each pixel takes the value under its centre."""
    if label.shape[:2] == shape:
        return label
    sides = zip(shape, label.shape[:2], strict=True)
    rows, columns = (((np.arange(n) + 0.5) * (m / n)).astype(np.intp) for n, m in sides)
    return np.ascontiguousarray(label[rows[:, None], columns])


def fit_normals(codes_HW3: Array, shape: tuple[int, int]) -> Array:
    """Normal codes at ``shape``: vectors interpolated linearly, then made unit vectors again.

    Rounding them to codes again costs no more than the file's own rounding did (0.3 degrees at most).
    """
    if codes_HW3.shape[:2] == shape:
        return codes_HW3
    field = torch.from_numpy(normals_from_codes(codes_HW3))[None]
    resized = F.interpolate(field, size=shape, mode="bilinear", align_corners=False)[0]
    length = resized.norm(dim=0, keepdim=True)
    unit = torch.where(length > 0.01, resized / length.clamp(min=0.01), torch.zeros(()))
    return codes_from_normals(unit.numpy())
