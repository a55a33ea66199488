"""Which images a rank reads, in which order: the same global order for any number of ranks, resumable anywhere.

Training draws from one endless stream: epoch 0 in its order, then epoch 1 in its own, and so on. The g-th global batch
is the next B * W images of the stream, and rank r takes the r-th slice of B. So every image comes once per epoch, every
rank always has B images, and W ranks of batch B see the global batches of one rank of batch B * W. A batch at the end
of an epoch is completed from the start of the next one, which goes on from there. The position is counted in images,
not in batches, and means the same at any W and B. Of several data sets each has such a stream, and the images of the
one that is drawn from are taken from these by weight.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from ase_dist.errors import UserError
from ase_dist.seeding import derive_seed, generator


class Draw(NamedTuple):
    """One image of the stream: its number in the list, and the epoch it is read in (which seeds its augmentation)."""

    epoch: int
    image: int


class Position(NamedTuple):
    """A place in the stream: ``consumed`` images of ``epoch`` have been used, on all ranks together."""

    epoch: int = 0
    consumed: int = 0


PositionT = TypeVar("PositionT")


class TrainSampler(ABC, Generic[PositionT]):
    """Endless batches of draws for one rank of training; iterating moves the position, ``upcoming`` does not.

    ``length`` is the number of images in an epoch. Raises UserError where there is none.
    """

    def __init__(
        self, length: int, position: PositionT, *, batch_size: int, rank: int, world_size: int, seed: int
    ) -> None:
        _check(length, batch_size=batch_size, rank=rank, world_size=world_size)
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.global_batch = batch_size * world_size
        self.position = position
        self.seed = seed

    @property
    @abstractmethod
    def epoch(self) -> int:
        """The epoch that the next image belongs to."""

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

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position and the length it holds for, as plain integers; equal on all ranks."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at ``state``, saved at any number of ranks and any batch size.

        Raises UserError if it is not a position in this data set.
        """

    @abstractmethod
    def _global_batch(self, position: PositionT) -> tuple[list[Draw], PositionT]:
        """The next global batch after ``position``, and the position behind it."""


class ResumableSampler(TrainSampler[Position]):
    """The sampler of one data set."""

    def __init__(self, length: int, *, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        super().__init__(length, Position(), batch_size=batch_size, rank=rank, world_size=world_size, seed=seed)
        self._order = functools.lru_cache(maxsize=2)(_Order(length, seed=seed))

    @property
    def epoch(self) -> int:
        """As TrainSampler's."""
        return self._settled(self.position).epoch

    def state_dict(self) -> dict[str, Any]:
        """As TrainSampler's."""
        epoch, consumed = self._settled(self.position)
        return {"epoch": epoch, "consumed": consumed, "length": self.length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As TrainSampler's."""
        self.position = _position(state, self.length, where="sampler")

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


class MixedSampler(TrainSampler[tuple[int, ...]]):
    """The sampler of several data sets, mixed by weight, whose images are numbered one set after the other.

    Each set is an endless stream of epochs of its own. The next image comes from the set that is furthest behind its
    share of the images so far, the first of several; so the number of images from a set never differs from its share by
    as much as one, apart from what sets share among them, and follows from the numbers taken so far alone. The position
    is these numbers. An epoch is as many images as the sets have together; a set's own epoch seeds its order and its
    augmentation.

    ``weights`` None: by the number of images, so that an epoch is one of each set.
    """

    def __init__(
        self,
        lengths: Mapping[str, int],
        weights: Sequence[float] | None,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        for title, length in lengths.items():
            if length < 1:
                raise UserError(f"sampler: got no image of {title}, wanted at least one")
        place = {"batch_size": batch_size, "rank": rank, "world_size": world_size, "seed": seed}
        super().__init__(sum(lengths.values()), (0,) * len(lengths), **place)
        self.lengths = dict(lengths)
        shares = [Fraction(str(weight)) for weight in weights or lengths.values()]
        scale = math.lcm(*(share.denominator for share in shares))
        self._shares = [int(share * scale) for share in shares]  # whole numbers: no rounding, however long a run
        starts = itertools.accumulate(lengths.values(), initial=0)
        self._sets = [
            (start, length, functools.lru_cache(maxsize=2)(_Order(length, seed=derive_seed(seed, "set", title))))
            for start, (title, length) in zip(starts, lengths.items(), strict=False)
        ]

    @property
    def epoch(self) -> int:
        """As TrainSampler's."""
        return sum(self.position) // self.length

    def state_dict(self) -> dict[str, Any]:
        """As TrainSampler's: the position in each set."""
        return {
            "sets": {
                title: {"epoch": taken // length, "consumed": taken % length, "length": length}
                for taken, (title, length) in zip(self.position, self.lengths.items(), strict=True)
            }
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As TrainSampler's."""
        sets = state.get("sets")
        if not isinstance(sets, Mapping) or list(sets) != list(self.lengths):
            got = ", ".join(map(str, sets)) if isinstance(sets, Mapping) else "one data set"
            raise UserError(
                f"sampler: got a position in {got}, wanted one in {', '.join(self.lengths)}; resume with the data.sets "
                "of the checkpoint, or start afresh with resume=never"
            )
        positions = [
            _position(sets[title], length, where=f"sampler, {title}") for title, length in self.lengths.items()
        ]
        lengths = self.lengths.values()
        self.position = tuple(
            epoch * length + consumed for (epoch, consumed), length in zip(positions, lengths, strict=True)
        )

    def _global_batch(self, position: tuple[int, ...]) -> tuple[list[Draw], tuple[int, ...]]:
        taken, whole = list(position), sum(self._shares)
        draws = []
        for total in range(sum(taken) + 1, sum(taken) + 1 + self.global_batch):
            i = max(range(len(taken)), key=lambda i: (self._shares[i] * total - taken[i] * whole, -i))
            start, length, order = self._sets[i]
            epoch, place = divmod(taken[i], length)
            draws.append(Draw(epoch, start + order(epoch)[place]))
            taken[i] += 1
        return draws, tuple(taken)


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


def _position(state: Mapping[str, Any], length: int, *, where: str) -> Position:
    """The position in ``length`` images that ``state`` says; UserError, which begins with ``where``, for another's."""
    try:
        epoch, consumed, saved = (int(state[key]) for key in ("epoch", "consumed", "length"))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where}: got the state {state!r:.200}, wanted epoch, consumed and length") from None
    if saved != length:
        raise UserError(
            f"{where}: got a position in {saved} images, wanted one in {length}; "
            "resume with the data set of the checkpoint, or start afresh with resume=never"
        )
    if epoch < 0 or not 0 <= consumed <= length:
        raise UserError(f"{where}: got image {consumed} of epoch {epoch}, wanted 0..{length} of an epoch from 0 on")
    return Position(epoch, consumed)
