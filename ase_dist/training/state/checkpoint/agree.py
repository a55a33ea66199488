"""Work that may fail on one rank only: every rank learns of it and raises the same sentence, so none waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from ase_dist.collectives import gather_objects, rank

T = TypeVar("T")
LONGEST_REASON = 400  # characters; safetensors and pydantic can write pages


class RankError(RuntimeError):
    """Something failed on at least one rank; the sentence is the same on all of them."""


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    result: T | None
    problem: str | None


def on_every_rank(work: Callable[[], T]) -> list[T]:
    """Run ``work`` on each rank and return everyone's result in order of rank. Collective.

    ``work`` may raise any Exception and must not wait for another rank. Raises RankError on all ranks if it failed on
    one, with the sentence of the first that failed and the number of the others.
    """
    outcomes = [cast("_Outcome[T]", outcome) for outcome in gather_objects(_attempt(work))]
    failed = [(index, outcome.problem) for index, outcome in enumerate(outcomes) if outcome.problem is not None]
    if failed:
        others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
        raise RankError(f"rank {failed[0][0]}{others}: {failed[0][1]}")
    return [cast("T", outcome.result) for outcome in outcomes]


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 alone; every rank gets its result, or raises its error as RankError. Collective."""
    return cast("T", on_every_rank(lambda: work() if rank() == 0 else None)[0])


def describe(error: Exception) -> str:
    """An exception as the tail of a sentence: one line, not too long, with its type where the text needs it."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    elif not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def _attempt(work: Callable[[], T]) -> _Outcome[T]:
    try:
        return _Outcome(work(), None)
    except Exception as error:  # whatever it was, the other ranks are waiting to hear of it
        return _Outcome(None, describe(error))
