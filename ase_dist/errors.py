"""How a command ends: exit codes, the errors that become one sentence, and pydantic's refusals in words.

``UserError`` and ``RunError`` are told in one sentence. Every other exception is a bug, of this package or of an
extension: it keeps its traceback and ends the command with 1.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from ase_dist.printable import printable

if TYPE_CHECKING:
    from pydantic import ValidationError

LONGEST_USER = 1500  # characters of a sentence of our own
LONGEST_SENTENCE = 400  # characters of an error that are passed on; safetensors and pydantic can write pages


def _numbers(names: str) -> frozenset[int]:
    """The operating system's numbers of errors, of those that it has."""
    return frozenset(getattr(errno, name) for name in names.split() if hasattr(errno, name))


DISK_FULL = _numbers("ENOSPC EDQUOT EFBIG")
# what a user has named and the operating system refuses
REFUSED = _numbers("ENOENT EACCES EPERM EROFS ENOTDIR EISDIR EEXIST ENOTEMPTY ENAMETOOLONG ELOOP EXDEV ETXTBSY")
# a network file system that is not there for a moment; the same call may work a minute later
TEMPORARY = _numbers(
    "EIO EREMOTEIO ESTALE ETIMEDOUT ETIME EAGAIN EINTR EBUSY ENOLCK ENOLINK ENETDOWN ENETUNREACH ENETRESET "
    "ECONNREFUSED ECONNRESET ECONNABORTED ENOTCONN EHOSTDOWN EHOSTUNREACH ESHUTDOWN ECOMM EPROTO"
)


class ExitCode(IntEnum):
    """Exit status of a command.

    ====  ==========================================================================================================
    0     done
    1     a bug, of this package or of an extension: the traceback is on the terminal, in train.log and rank_N.log;
          also where a thread that never yields was ended (see ``Watchdog``), and where export --check finds other
          metrics
    2     settings, data or checkpoints are not usable: the sentence says what to change
    3     predict: some files could not be read and were skipped
    71    a file or a connection failed for a moment, as on a network file system, or a loader process died: the same
          command may work now
    74    a checkpoint or a result could not be saved (disk full, read-only); the ones before it are untouched
    75    stopped by a signal, after saving: the same command goes on from there
    76    a loss or a gradient was not finite, and the policy was to stop or the skips were used up
    77    no progress within the time limit: a rank is dead, stuck or silent; stacks are in rank_N.log
    130   interrupted (Ctrl-C) while nothing was there to be saved; by another signal n it is 128 + n (143: SIGTERM)
    ====  ==========================================================================================================

    ``--max-restarts`` and the Slurm script start again after 1, 71 and 77, and after a process that was killed.
    """

    DONE = 0
    FAILED = 1
    USAGE = 2
    SKIPPED = 3
    IO_ERROR = 71
    NOT_SAVED = 74
    STOPPED = 75
    NON_FINITE = 76
    SILENT = 77
    INTERRUPTED = 130


class UserError(ValueError):
    """A mistake that the user can mend: settings, options, files or shapes that do not fit.

    The message is one sentence: what, what was got, what was wanted, what to try. Of one longer than ``LONGEST_USER``
    characters, which quotes what was got at length, the middle is left out.
    """

    def __init__(self, sentence: str) -> None:
        if len(sentence) > LONGEST_USER:
            sentence = f"{sentence[: LONGEST_USER - 300]}...{sentence[-290:]}"
        super().__init__(sentence)


class RunError(RuntimeError):
    """What ends a command, is no mistake in its settings and is told in one sentence: a full disk, a lost rank."""

    def __init__(self, sentence: str, *, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def exit_code_of(error: BaseException) -> ExitCode:
    """The code that a command ends with where ``error`` ends it."""
    if isinstance(error, RunError):
        return error.exit_code
    if isinstance(error, UserError):
        return ExitCode.USAGE
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    number = _error_number(error)
    if number in TEMPORARY or isinstance(error, TimeoutError):
        return ExitCode.IO_ERROR
    if number in DISK_FULL:
        return ExitCode.NOT_SAVED
    return ExitCode.USAGE if number in REFUSED else ExitCode.FAILED


def _error_number(error: BaseException) -> int | None:
    """The operating system's number of an error; libraries written in Rust, as safetensors is, have it in the text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\bos error (\d+)|\bOs \{ code: (\d+)", str(error)) if isinstance(error, Exception) else None
    return int(found[1] or found[2]) if found else None


def has_traceback(error: BaseException) -> bool:
    """Whether the traceback of ``error`` is shown: a bug's or a failing device's, not that of what a sentence tells."""
    if isinstance(error, (UserError, RunError)):
        return exit_code_of(error) is ExitCode.FAILED and error.__cause__ is not None
    return exit_code_of(error) in (ExitCode.FAILED, ExitCode.IO_ERROR)


def describe(error: BaseException) -> str:
    """An exception as the tail of a sentence: our own sentences as they are, others in one line, not too long."""
    if isinstance(error, (UserError, RunError)):
        return printable(str(error))
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        text = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
    return printable(text if len(text) <= LONGEST_SENTENCE else f"{text[:LONGEST_SENTENCE]}...")


def file_error(error: Exception, sentence: str) -> UserError | RunError:
    """What to raise instead of a file's ``error``, with a ``sentence`` that says more.

    A UserError where the user has to do something about it, else a RunError of the same exit code.
    """
    code = exit_code_of(error)
    return (
        RunError(sentence, exit_code=code) if code in (ExitCode.IO_ERROR, ExitCode.NOT_SAVED) else UserError(sentence)
    )


def out_error(error: OSError, out: object) -> UserError | RunError:
    """``file_error`` of a folder that --out names and that cannot be written to."""
    return file_error(error, f"--out: cannot write to {str(out)!r} ({error.strerror or error}); name another")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """``, did you mean 'x'?`` for the closest of ``names``, or an empty string: the tail of an error message."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


class Problem(NamedTuple):
    """The first thing wrong with a tree of values."""

    kind: str  # pydantic's name of it, such as "extra_forbidden"
    keys: tuple[str, ...]  # from the top down to the value; none where the whole is wrong
    got: Any
    why: str  # a clause: "wanted a whole number"

    @property
    def where(self) -> str:
        """The keys joined by dots."""
        return ".".join(self.keys)


# What is wanted, by pydantic's name of the problem; {gt} and its like are of the problem itself.
WANTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list such as [a, b]"),
    **dict.fromkeys(
        ("dict_type", "model_type", "model_attributes_type", "mapping_type"), "names with values, such as {{a: 1}}"
    ),
    "string_type": "text",
    "missing": "a value",
    "none_required": "null",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
}
_ALTERNATIVE = re.compile(r"literal\[.*\]|bool|int|float|str|none|\[key\]")  # what pydantic puts after the last key


def first_problem(error: ValidationError) -> Problem:
    """The first problem of a validation; a validator's own ValueError gives its words unchanged.

    Of a value that is none of several alternatives, ``why`` names what any of them wants.
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    keys = _keys_of(first["loc"])
    if first["type"] == "value_error":
        return Problem(first["type"], keys, first["input"], str(first["ctx"]["error"]))
    same = [each for each in problems if _keys_of(each["loc"]) == keys and each["type"] in WANTED]
    wanted = [WANTED[each["type"]].format(**each.get("ctx", {})) for each in same]
    why = f"wanted {' or '.join(dict.fromkeys(wanted))}" if wanted else first["msg"][0].lower() + first["msg"][1:]
    return Problem(first["type"], keys, first["input"], why)


def _keys_of(place: tuple[int | str, ...]) -> tuple[str, ...]:
    keys = tuple(map(str, place))
    return keys[:-1] if len(keys) > 1 and _ALTERNATIVE.fullmatch(keys[-1]) else keys
