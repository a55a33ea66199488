"""What a kept copy of weights was made of, so that it is made again when they are others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


class Origin:
    """The tensors that a copy was made of, and other facts that it depends on.

    They count as others where memory, version, type, device or shape of one is another than it was: so ``.to``, loading
    and changes in place are seen, a change through ``.data`` is not. Memory that was freed has its address given out
    again, as ``.half().float()`` does; so whether it was freed is looked at too.
    """

    def __init__(self) -> None:
        self._facts: tuple[object, ...] = ()
        self._memory: list[StorageWeakRef] = []

    def is_same(self, tensors: Sequence[Tensor], *facts: object) -> bool:
        """Whether a copy made at the last ``take`` is one of these."""
        return self._facts == _facts(tensors, facts) and not any(memory.expired() for memory in self._memory)

    def take(self, tensors: Sequence[Tensor], *facts: object) -> None:
        """From now on the copy is of these."""
        self._facts = _facts(tensors, facts)
        self._memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]


def can_tell_changes(tensor: Tensor) -> bool:
    """Whether an ``Origin`` can tell changes of ``tensor``: not of fake tensors and those of inference mode."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()


def _facts(tensors: Sequence[Tensor], facts: tuple[object, ...]) -> tuple[object, ...]:
    return (*facts, *((t.data_ptr(), t._version, t.dtype, t.device, t.shape) for t in tensors))
