"""Text that was made elsewhere (names of files and runs, errors) as it is shown: without control characters.

A name may hold a line break, which would forge a line of a log, or an escape sequence, which a terminal obeys.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from contextlib import suppress
from typing import TextIO

# control characters, line and paragraph separators, marks that reverse the direction of writing, and surrogates, which
# UTF-8 cannot encode
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_UNPRINTABLE_IN_LINES = re.compile(_UNPRINTABLE.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))
MARK = "\ufffd"  # Unicode's replacement character


def printable(text: str, *, lines: bool = False) -> str:
    """``text`` with ``MARK`` for each character that is not shown; with ``lines``, tabs and newlines stay."""
    return (_UNPRINTABLE_IN_LINES if lines else _UNPRINTABLE).sub(MARK, text)


def say(sentence: str) -> None:
    """Write one line to the standard error; nothing happens where that is closed, or a file on a full disk."""
    try:
        sys.stderr.write(f"{printable(sentence)}\n")
        sys.stderr.flush()
    except (OSError, ValueError):  # ValueError: it is closed
        pass


def show(text: str) -> None:
    """Write a command's result to the standard output.

    Nothing more is written where its reader has ended, as ``head`` does. Raises OSError, which names the standard
    output, where that is a file on a full disk.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _refuse_output(error)


def _refuse_output(error: OSError) -> None:
    # Python would write what is left once more at its end, print a traceback and change the exit code
    with suppress(OSError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123  (no path of a user)
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    if error.errno != errno.EPIPE:
        error.filename = "the standard output"
        raise error


class PrintableFormatter(logging.Formatter):
    """A message is one printable line. Where its template begins with a newline it is a table, and keeps its lines."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, and the traceback where there is one."""
        return printable(super().format(record), lines=True)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        """The line without the traceback, which ``format`` adds."""
        record.message = printable(record.message, lines=str(record.msg).startswith("\n"))
        return super().formatMessage(record)


class OutputHandler(logging.StreamHandler):  # type: ignore[type-arg]  # takes none before Python 3.11
    """A stream's log lines. An error of writing is told where the stream is the standard output, see ``show``."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        """Tell mistakes in the call that logs."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif self.stream is sys.stdout:
            _refuse_output(error)


def log_messages(stream: TextIO | None = None) -> None:
    """Send the log's messages to ``stream``, the standard error where None, one printable line each."""
    handler = OutputHandler(stream)
    handler.setFormatter(PrintableFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
