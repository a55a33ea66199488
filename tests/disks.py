"""Disks that are full: small file systems in memory, where mounting is allowed, and the error itself."""

import errno
import os
import subprocess
from contextlib import contextmanager

import pytest


def no_space():
    """The error of a full disk, as a system call raises it."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def small_disk(folder, *, kilobytes):
    """A file system of so many bytes at ``folder``, which is made; multiples of 4 kB."""
    folder.mkdir(parents=True)
    size = f"size={kilobytes}k"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
