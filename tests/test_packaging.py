"""What is shipped: package data, versions, and text that is at home on every machine."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ase_dist

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

pytestmark = pytest.mark.single_gpu

ROOT = Path(__file__).parents[1]
PACKAGE = Path(ase_dist.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PATTERNS = PROJECT["tool"]["setuptools"]["package-data"]["ase_dist"]
LARGEST = 5_000_000  # bytes, of a file that every clone and every install carries
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|tmp/\w+|mnt|opt|scratch|Users)/\w|\b[A-Z]:\\\w")


@pytest.fixture(scope="module")
def tracked():
    """The tracked files, skipping where this is no git checkout."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=False)
    names = [name for name in listed.stdout.decode().split("\0") if name]
    if listed.returncode or "pyproject.toml" not in names:
        pytest.skip(f"{ROOT} is not a git checkout of its own")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def texts(paths):
    """(path, text) of the files that are text: those without a zero byte."""
    for path in paths:
        data = path.read_bytes()
        if b"\0" not in data:
            yield path.relative_to(ROOT), data.decode("utf-8")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_package_data_matches_files(pattern):
    if pattern.startswith("models/pretrained/") and not (PACKAGE / "models" / "pretrained").is_dir():
        pytest.skip("this checkout ships no backbone")
    assert list(PACKAGE.glob(pattern))


def test_every_data_file_of_the_package_is_shipped(tracked):
    shipped = {path for pattern in PATTERNS for path in PACKAGE.glob(pattern)}
    data = {path for path in tracked if path.is_relative_to(ROOT / "ase_dist") and path.suffix != ".py"}
    assert data - shipped == set()


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert ase_dist.__version__ == PROJECT["project"]["version"] == citation["version"]


def test_the_license_is_the_one_that_is_named():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["project"]["license"] == citation["license"] == "Apache-2.0"
    for name in PROJECT["project"]["license-files"]:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "Apache License\n" in text
        assert "END OF TERMS AND CONDITIONS" in text


def test_text_is_ascii_and_names_no_machine(tracked):
    found = [f"{path}:{number}" for path, text in texts(tracked) for number, line in enumerate(text.splitlines(), 1)
             if not line.isascii() or MACHINE_PATH.search(line)]  # fmt: skip
    assert found == []


@pytest.mark.parametrize(
    ("line", "is_machine_path"),
    [
        ("root = '/" + "home/ann/data'", True),
        ("cd /" + "work/main", True),
        ("C:" + "\\Users", True),
        ("/" + "tmp/env/bin/python", True),
        ("/tmp/x", False),
        ("https://example.org/home/ann", False),
        ("runs/tmp/x", False),
        ("~/.cache/ase_dist", False),
    ],
)
def test_machine_paths_are_recognised(line, is_machine_path):
    assert bool(MACHINE_PATH.search(line)) == is_machine_path


def test_no_file_is_too_large(tracked):
    assert [path for path in tracked if path.stat().st_size > LARGEST] == []
