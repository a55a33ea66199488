"""Operators of this package: what a tracer sees whole, and a plain function where nothing watches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ase_dist.ops import modes


class Operator:
    """The decorated function as the operator ``ase_dist::NAME``, NAME being its own.

    ``register_fake`` is that of ``torch.library.custom_op``. Where nothing watches the first argument
    (``modes.is_watched``) the function is called at once: passing torch's dispatcher in Python takes some 50
    microseconds of the host's time.
    """

    def __init__(self, function: Callable[..., Any], *, mutates: Sequence[str] = ()) -> None:
        self.__doc__, self._function = function.__doc__, function
        self.dispatched = torch.library.custom_op(f"ase_dist::{function.__name__}", function, mutates_args=mutates)
        self.register_fake = self.dispatched.register_fake

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns."""
        return (self.dispatched if modes.is_watched(arguments[0]) else self._function)(*arguments)
