"""The place of prepared data sets, the lock that one maker holds, and how progress is told."""

from __future__ import annotations

import logging
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest

from ase_dist.data import cache
from ase_dist.data.cache import cache_folder, locked, track_progress

pytestmark = pytest.mark.single_gpu

WORDS = {"doing": "packing", "did": "packed", "things": "images", "where": "into PLACE"}
HOLD = """
import sys
from pathlib import Path
from ase_dist.data.cache import locked

with locked(Path(sys.argv[1])):
    sys.stdout.write("held\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""


def test_the_default_place_is_the_users_cache(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ase_dist"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/ase_dist"


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, caplog) -> None:
    terminal = StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(cache.sys, "stderr", terminal)
    track_progress([1, 0, 2], 3, **WORDS)
    assert "Packing images" in terminal.getvalue() and "100%" in terminal.getvalue()
    terminal.isatty = lambda: False
    monkeypatch.setattr(cache, "LOG_EVERY", -1.0)
    with caplog.at_level(logging.INFO):
        track_progress([2, 1], 3, **WORDS)
    assert "packing 3 images into PLACE" in caplog.text
    assert "packed 2 of 3 images" in caplog.text and "packed 3 images" in caplog.text


def test_a_lock_is_waited_for_and_dies_with_its_holder(tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "new" / "set"
    command = [sys.executable, "-c", HOLD, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        said = []

        def told(message, *_):
            """Comes between the refusal and the wait."""
            said.append(message)
            holder.kill()

        monkeypatch.setattr(cache.log, "info", told)
        with locked(place):
            assert "waiting" in said[0]
    assert not place.exists()
