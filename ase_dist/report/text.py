"""Numbers, sizes and times as the page writes them."""

from __future__ import annotations

import math

DASH = "\u2013"
MINUS = "\u2212"
UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")
COUNTS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def significant(value: float | None, digits: int = 4) -> str:
    """A number with ``digits`` significant digits, trailing zeros kept; a dash for what is not finite."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    whole = math.floor(math.log10(abs(value))) + 1
    found = f"{value:,.{max(0, digits - whole)}f}" if -3 <= whole <= 9 else f"{value:.{digits - 1}e}"
    return signed(found)


def brief(value: float) -> str:
    """A round number, such as a tick's, without trailing zeros."""
    return signed(f"{value:.6g}")


def signed(number: str) -> str:
    """A number's text with a minus sign as wide as a plus in place of a hyphen."""
    return number.replace("-", MINUS, 1) if number.startswith("-") else number


def size(count: float | None) -> str:
    """Bytes in the unit that suits, 1 kB = 1000 bytes."""
    if count is None or not math.isfinite(count):
        return DASH
    power = min(len(UNITS) - 1, max(0, int(math.log10(max(abs(count), 1)) // 3)))
    return f"{count:.0f} bytes" if power == 0 else f"{count / 1000**power:.3g} {UNITS[power]}"


def many(count: float | None) -> str:
    """A large count with a letter: 3.77 M."""
    if count is None or not math.isfinite(count):
        return DASH
    for unit, letter in COUNTS:
        if abs(count) >= unit:
            return f"{count / unit:.3g} {letter}"
    return f"{count:g}"


def plural(count: int, word: str, many_words: str | None = None) -> str:
    """ "1 step", "40 steps"; a count of thousands is grouped."""
    return f"{count:,} {word if count == 1 else many_words or word + 's'}"
