"""One changed file given to a reader; and thousands of them in a process of their own, counted.

    python -m tests.fuzz.trial mask.png --count 5000 --seed 7

prints one line of JSON: inputs tried, how many were read and how many refused in a sentence, tracebacks, hangs. What
ends the process itself is the parent's to count (see ``run``); the input that did it is left in the folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

from ase_dist.errors import LONGEST_SENTENCE, ExitCode, RunError, UserError, exit_code_of, has_traceback
from tests.fuzz.mutations import drawn, mutated
from tests.fuzz.readers import READERS, Reader, with_hash

SECONDS = 20  # that one input may take


def attempt(reader: Reader, folder: Path, target: str, content: bytes) -> str:
    """Read the folder with ``content`` in place of one file, which is put back: "read" or "sentence".

    Raises AssertionError for a sentence that does not name the file, and whatever a reader may not raise.
    """
    path = folder / target
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        reader.read(folder)
    except (UserError, RunError, OSError) as error:
        assert not has_traceback(error) and exit_code_of(error) in (ExitCode.USAGE, ExitCode.IO_ERROR), repr(error)
        said = str(error)
        named = (str(folder), path.name, "DeepSpeed JSON", "hostfile")  # a run has one of the last two
        assert any(name in said for name in named), f"no file is named in: {said[:500]}"
        assert "\n" not in said and len(said) < 4 * LONGEST_SENTENCE, f"no sentence: {said[:800]}"
        return "sentence"
    else:
        return "read"
    finally:
        path.write_bytes(whole)


def changed(reader: Reader, whole: bytes, changes, *, rehash: bool) -> bytes:
    """``whole`` with ``changes``, and with a right hash of its own where it has one and ``rehash``."""
    content = mutated(whole, changes)
    return with_hash(content, reader.own_hash) if reader.own_hash and rehash else content


class HangError(BaseException):
    """An input took longer than it may."""


def _hang(number: int, frame: object) -> None:
    raise HangError


def run_here(name: str, *, count: int, seed: int, folder: Path, start: int = 0) -> Counter[str]:
    """Try inputs ``start`` to ``count`` of ``seed``; the last one is in ``folder``.current, failing ones beside it."""
    reader, counts = READERS[name], Counter[str]()
    signal.signal(signal.SIGALRM, _hang)
    place = folder / "valid"
    place.mkdir(parents=True, exist_ok=True)
    reader.make(place)
    wholes = {target: (place / target).read_bytes() for target in reader.targets}
    assert attempt(reader, place, reader.targets[0], wholes[reader.targets[0]]) == "read"
    for number in range(start, count):
        rng = random.Random(f"{name} {seed} {number}")
        target = rng.choice(reader.targets)
        content = changed(reader, wholes[target], drawn(rng), rehash=rng.random() < 0.5)
        (folder / "current").write_bytes(content)
        (folder / "number").write_text(str(number))
        signal.alarm(SECONDS)
        try:
            counts[attempt(reader, place, target, content)] += 1
        except HangError:
            counts["hangs"] += 1
            (folder / f"hang_{number}").write_bytes(content)
        except Exception as error:
            counts["tracebacks"] += 1
            (folder / f"traceback_{number}").write_bytes(content)
            if counts["tracebacks"] <= 5:
                where = traceback.extract_tb(error.__traceback__)[-1]
                sys.stderr.write(f"{name} {number} {target}: {error!r:.300} at {where.filename}:{where.lineno}\n")
        finally:
            signal.alarm(0)
            (place / target).write_bytes(wholes[target])
        counts["inputs"] += 1
    return counts


def run(name: str, *, count: int, seed: int, folder: Path) -> Counter[str]:
    """``run_here`` in a process of its own, started again after an input that ended it: a crash."""
    counts, start = Counter[str](), 0
    while start < count:
        command = [sys.executable, "-m", "tests.fuzz.trial", name, "--count", str(count), "--seed", str(seed)]
        work = folder / f"from_{start}"
        command += ["--start", str(start), "--folder", str(work)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        sys.stderr.write(done.stderr[-3000:])
        if done.returncode == 0:
            return counts + Counter(json.loads(done.stdout.splitlines()[-1]))
        number = int((work / "number").read_text()) if (work / "number").is_file() else start
        counts += Counter(crashes=1, inputs=number + 1 - start)
        start = number + 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=sorted(READERS))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("ase_dist").setLevel(logging.ERROR)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    counts = run_here(given.reader, count=given.count, seed=given.seed, folder=folder, start=given.start)
    sys.stdout.write(json.dumps(counts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
