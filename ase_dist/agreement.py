"""What all ranks decide together: work that may fail on one of them, and facts that must be the same on all.

If one rank fails all raise, so that none waits for ever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn, TypeVar, cast

from ase_dist.collectives import gather_objects, rank
from ase_dist.errors import ExitCode, RunError, UserError, describe, exit_code_of

T = TypeVar("T")


class RankError(RunError):
    """Something failed on at least one rank; the sentence is the same on all of them."""


class _Failure(NamedTuple):
    code: ExitCode
    sentence: str


def raise_together(work: Callable[[], T]) -> T:
    """This rank's result of ``work``, which must not wait for another rank. Collective.

    Where ``work`` fails on a rank, each rank raises:

    1. a rank with a bug its own exception, with its traceback;
    2. the others RankError, which names the first rank with a bug and its exception;
    3. where there is no bug, all the same UserError or RankError: the sentence of the first rank that failed.
    """
    result, error = _attempt(work)
    failures = [cast("_Failure | None", found) for found in gather_objects(_failure(error))]
    if any(failures):
        _raise_on_all(failures, error)
    return cast("T", result)


def on_every_rank(work: Callable[[], T]) -> list[T]:
    """Run ``work`` on each rank and return everyone's result in order of rank. Collective.

    ``work`` may raise any Exception and must not wait for another rank. Raises RankError on all ranks if it failed on
    one, with the sentence of the first that failed and the number of the others, from that rank's own exception.
    """
    result, error = _attempt(work)
    outcomes = [cast("tuple[T, _Failure | None]", outcome) for outcome in gather_objects((result, _failure(error)))]
    failed = [(index, failure) for index, (_, failure) in enumerate(outcomes) if failure is not None]
    if failed:
        index, first = failed[0]
        others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
        raise RankError(f"rank {index}{others}: {first.sentence}", exit_code=first.code) from error
    return [result for result, _ in outcomes]


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 alone; every rank gets its result, or raises its error as RankError. Collective."""
    return cast("T", on_every_rank(lambda: work() if rank() == 0 else None)[0])


def require_same_on_ranks(facts: Mapping[str, object]) -> None:
    """Raise UserError on all ranks where a rank's ``facts``, plain values by name, are not the first's. Collective.

    The ranks exchange a hash, and the facts only where hashes differ.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    if len(set(gather_objects(digest))) == 1:
        return
    first, *others = [cast("Mapping[str, object]", facts) for facts in gather_objects(dict(facts))]
    for index, theirs in enumerate(others, start=1):
        odd = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if odd:
            values = f"{first.get(odd[0])} and {theirs.get(odd[0])}"
            more = f" ({len(odd) - 1} more differ)" if len(odd) > 1 else ""
            raise UserError(f"rank 0 and rank {index} differ in {odd[0]}: {values}{more}; start all ranks alike")


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # of any kind: the other ranks are waiting to hear of it
        return None, error


def _failure(error: Exception | None) -> _Failure | None:
    return None if error is None else _Failure(exit_code_of(error), describe(error))


def _raise_on_all(failures: Sequence[_Failure | None], error: Exception | None) -> NoReturn:
    """See ``raise_together``."""
    bugs = [index for index, failure in enumerate(failures) if failure is not None and failure.code == ExitCode.FAILED]
    if error is not None and rank() in bugs:
        raise error
    index = bugs[0] if bugs else next(index for index, failure in enumerate(failures) if failure is not None)
    first = cast("_Failure", failures[index])
    if bugs:
        raise RankError(f"rank {index} ended with {first.sentence}; its traceback is in its own log")
    sentence = first.sentence if len(set(failures)) == 1 else f"rank {index}: {first.sentence}"
    if first.code is ExitCode.USAGE:
        raise UserError(sentence) from error
    raise RankError(sentence, exit_code=first.code) from error
