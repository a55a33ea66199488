"""Hosts that lack what commands are used to: a user without an entry or a home folder, no /proc, few open files."""

import os
import resource
import shutil
import subprocess
import sys
from unittest import mock

import pytest
from PIL import Image

from ase_dist.cluster import facts
from ase_dist.errors import ExitCode
from tests.deployment.conftest import export, photo  # noqa: F401
from tests.training.tiny_runs import ROOT, TINY, checkpoint

pytestmark = pytest.mark.single_gpu
# Inside, the user id is one that no host knows; outside it is still this one, which may read the environment.
NOBODY = ("unshare", "--user", "--map-user=54321", "--map-group=54321")
WITHOUT_PROC = (
    *("unshare", "--user", "--map-root-user", "--mount"),
    *("sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"),
)


def ase_dist(*arguments, surroundings=(), without=(), files=None):
    """``python -m ase_dist`` there; skips the test where namespaces are not allowed."""
    if surroundings:
        if shutil.which(surroundings[0]) is None:
            pytest.skip("there is no unshare")
        tried = subprocess.run([*surroundings, "true"], capture_output=True, text=True, check=False)
        if tried.returncode:
            pytest.skip(f"user namespaces are not allowed here: {tried.stderr.strip()}")
    return subprocess.run(
        [*surroundings, sys.executable, "-m", "ase_dist", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in without},
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None,
    )


def test_a_user_without_entry_and_home_trains(scenes, tmp_path):
    options = [*TINY, f"data.root={scenes}", f"output={tmp_path / 'run'}", "train.max_steps=1"]
    done = ase_dist("train", *options, surroundings=NOBODY, without=("HOME", "XDG_CACHE_HOME"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert checkpoint(tmp_path / "run", 1) and "Traceback" not in done.stderr


def test_a_user_without_home_is_told_what_has_no_place():
    done = ase_dist("make_scenes", "--train", 1, surroundings=NOBODY, without=("HOME", "XDG_CACHE_HOME"))
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.startswith("error: the user id 54321 has no home folder (HOME is not set")
    assert done.stderr.count("\n") == 1 and "XDG_CACHE_HOME" in done.stderr


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_a_user_without_entry_has_a_number_for_the_cluster_check(error, monkeypatch):
    monkeypatch.setattr(facts.getpass, "getuser", mock.Mock(side_effect=error))
    assert facts.gather(facts.Question()).user == str(os.getuid())


@pytest.mark.parametrize(
    ("without", "sentence"),
    [
        (("HOME",), "error: the user id 54321 has no home folder"),
        ((), "error: ssh: this host knows no user of the id 54321"),
    ],
)
def test_a_container_of_a_user_without_entry_is_told(without, sentence, tmp_path):
    done = subprocess.run(
        [*NOBODY, sys.executable, "-m", "ase_dist.cluster.container", "--cluster", tmp_path, "worker", "--slots", "1"],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in without},
    )  # fmt: skip
    assert done.returncode == ExitCode.USAGE and done.stderr.splitlines()[-1].startswith(sentence), done.stderr
    assert "Traceback" not in done.stderr


def test_without_proc_training_is_refused_in_a_sentence(tmp_path):
    done = ase_dist("train", *TINY, f"output={tmp_path / 'run'}", surroundings=WITHOUT_PROC)
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.splitlines()[-1].startswith("error: this process sees no /proc, which DeepSpeed needs; mount it")
    assert "Traceback" not in done.stderr


def test_sixty_four_open_files_are_enough_to_predict(export, tmp_path):  # noqa: F811
    (tmp_path / "in").mkdir()
    for number in range(40):
        Image.fromarray(photo(24, 24, seed=number)).save(tmp_path / "in" / f"{number}.png")
    done = ase_dist("predict", export, tmp_path / "in", "--out", tmp_path / "out", "--device", "cpu", files=64)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([*(tmp_path / "out").glob("*.npz")]) == 40
