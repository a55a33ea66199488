"""Which images a rank reads, in which order: the same global order for any number of ranks, resumable anywhere.

Training draws from one endless stream: epoch 0 in its order, then epoch 1 in its own, and so on. The g-th global batch
is the next B * W images of the stream, and rank r takes the r-th slice of B. So every image comes once per epoch, every
rank always has B images, and W ranks of batch B see the global batches of one rank of batch B * W. A batch at the end
of an epoch is completed from the start of the next one, which goes on from there. The position is counted in images,
not in batches, and means the same at any W and B.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ase_dist.errors import UserError
from ase_dist.seeding import generator


class Draw(NamedTuple):
    """One image of the stream: its number in the list, and the epoch it is read in (which seeds its augmentation)."""

    epoch: int
    image: int


class Position(NamedTuple):
    """A place in the stream: ``consumed`` images of ``epoch`` have been used, on all ranks together."""

    epoch: int = 0
    consumed: int = 0


class ResumableSampler:
    """Endless batches of draws for one rank of training; iterating moves the position, ``upcoming`` does not.

    Raises UserError for an empty data set.
    """

    def __init__(self, length: int, *, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        _check(length, batch_size=batch_size, rank=rank, world_size=world_size)
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.global_batch = batch_size * world_size
        self.position = Position()
        self._order = functools.lru_cache(maxsize=2)(_Order(length, seed=seed))

    @property
    def epoch(self) -> int:
        """The epoch that the next image belongs to."""
        return self._settled(self.position).epoch

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch, rounded up."""
        return math.ceil(self.length / self.global_batch)

    def __iter__(self) -> Iterator[list[Draw]]:
        for draws in self.upcoming():
            self.advance()
            yield draws

    def upcoming(self) -> Iterator[list[Draw]]:
        """This rank's batches from the position on; it stays where it is until ``advance``."""
        position = self.position
        while True:
            draws, position = self._global_batch(position)
            yield draws[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def advance(self) -> None:
        """Move the position behind one global batch."""
        self.position = self._global_batch(self.position)[1]

    def state_dict(self) -> dict[str, int]:
        """The position and the length it holds for, as plain integers; equal on all ranks."""
        epoch, consumed = self._settled(self.position)
        return {"epoch": epoch, "consumed": consumed, "length": self.length}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at ``state``, saved at any number of ranks and any batch size.

        Raises UserError if it is not a position in this data set.
        """
        try:
            epoch, consumed, length = (int(state[key]) for key in ("epoch", "consumed", "length"))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"sampler: got the state {dict(state)}, wanted epoch, consumed and length") from None
        if length != self.length:
            raise UserError(
                f"sampler: got a position in {length} images, wanted one in {self.length}; "
                "resume with the data set of the checkpoint, or start afresh with resume=never"
            )
        if epoch < 0 or not 0 <= consumed <= length:
            raise UserError(f"sampler: got image {consumed} of epoch {epoch}, wanted 0..{length} of an epoch from 0 on")
        self.position = Position(epoch, consumed)

    def _settled(self, position: Position) -> Position:
        """The same place, at the start of the next epoch where this one has nothing left."""
        return Position(position.epoch + 1, 0) if position.consumed == self.length else position

    def _global_batch(self, position: Position) -> tuple[list[Draw], Position]:
        draws: list[Draw] = []
        while len(draws) < self.global_batch:
            epoch, start = self._settled(position)
            stop = min(self.length, start + self.global_batch - len(draws))
            draws += [Draw(epoch, image) for image in self._order(epoch)[start:stop]]
            position = Position(epoch, stop)
        return draws, position


class EvalSampler:
    """One pass over the data set: every image on exactly one rank, the same number of batches on every rank.

    The last global batch is divided as evenly as it goes, so a rank's last batch may be smaller, or empty.
    """

    def __init__(self, length: int, *, batch_size: int, rank: int, world_size: int) -> None:
        _check(length, batch_size=batch_size, rank=rank, world_size=world_size)
        self.length = length
        self.rank = rank
        self.world_size = world_size
        self.global_batch = batch_size * world_size

    def __len__(self) -> int:
        return math.ceil(self.length / self.global_batch)

    def __iter__(self) -> Iterator[list[Draw]]:
        for start in range(0, self.length, self.global_batch):
            count = min(self.global_batch, self.length - start)
            mine = range(
                start + count * self.rank // self.world_size, start + count * (self.rank + 1) // self.world_size
            )
            yield [Draw(0, image) for image in mine]


@dataclass(frozen=True)
class _Order:
    """The order of an epoch, which depends on the seed and the epoch alone."""

    length: int
    seed: int

    def __call__(self, epoch: int) -> list[int]:
        order: list[int] = torch.randperm(self.length, generator=generator(self.seed, "order", epoch)).tolist()
        return order


def _check(length: int, *, batch_size: int, rank: int, world_size: int) -> None:
    if length < 1 or batch_size < 1:
        raise UserError(f"sampler: got {length} images in batches of {batch_size}, wanted at least one of each")
    if not 0 <= rank < world_size:
        raise UserError(f"sampler: got rank {rank} of {world_size}, wanted 0..{world_size - 1}")
