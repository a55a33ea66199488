"""Versions of packages that are imported, installed and missing, and of this one."""

from importlib import metadata

import torch

import ase_dist
from ase_dist.versions import PACKAGES, version_of, versions_of


def test_an_imported_package_tells_its_build() -> None:
    assert version_of("torch") == str(torch.__version__)


def test_an_installed_package_by_its_metadata() -> None:
    assert version_of("pillow") == metadata.version("pillow")  # its module has another name


def test_this_package_under_both_its_names() -> None:
    assert versions_of("ase-dist", "ase_dist") == dict.fromkeys(("ase-dist", "ase_dist"), ase_dist.__version__)


def test_a_missing_package() -> None:
    assert version_of("no-such-package") is None
    assert versions_of("torch", "no-such-package").keys() == {"torch"}


def test_a_run_depends_on_what_is_installed() -> None:
    assert versions_of(*PACKAGES).keys() == set(PACKAGES)
