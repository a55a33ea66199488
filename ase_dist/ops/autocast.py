"""Autocast as it is wanted, entered only where it is not so already."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """``torch.autocast`` to ``dtype``, or off for None.

    Where that is the mode already nothing is entered: a program of ``torch.export`` would keep a graph of its own for
    what is inside, and ONNX has none.
    """
    now = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return nullcontext() if now == dtype else torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)
