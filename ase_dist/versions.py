"""Versions of packages as run folders, checkpoints, exports and the check of a cluster record them."""

from __future__ import annotations

import sys
from importlib import metadata

import ase_dist

PACKAGES = ("ase-dist", "torch", "torchvision", "deepspeed", "timm", "numpy", "safetensors")  # what a run depends on


def version_of(package: str) -> str | None:
    """The version of a package, None where it is missing.

    Of a package that is imported its own ``__version__``: torch's names the build too (``2.14.1+cu130``). So this
    package has one also where it is not installed but runs from a checkout.
    """
    module = ase_dist if package == "ase-dist" else sys.modules.get(package)
    try:
        return str(getattr(module, "__version__", None) or metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def versions_of(*packages: str) -> dict[str, str]:
    """The versions of those of ``packages`` that there are."""
    return {package: version for package in packages if (version := version_of(package)) is not None}
