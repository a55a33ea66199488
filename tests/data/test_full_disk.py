"""A full disk while data are packed, unpacked or rendered: one sentence, exit code 74, and the same command goes on."""

import pytest

from ase_dist.errors import ExitCode, RunError
from ase_dist.scenes.make import ensure_scenes
from tests.data.packing import archive, command
from tests.disks import small_disk

pytestmark = pytest.mark.single_gpu


def test_packing(six, tmp_path, capsys):
    with small_disk(tmp_path / "disk", kilobytes=8) as disk:
        assert command(six.root, "--out", disk / "packed", "--subset", "--workers", 1) == ExitCode.NOT_SAVED
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"error: cannot pack {six.root} into {disk / 'packed'}: No space left on device")
    assert command(six.root, "--out", tmp_path / "roomy", "--subset", "--workers", 1) == 0


def test_unpacking(six, tmp_path, capsys):
    tar = archive(six.root, tmp_path / "small.tgz")
    with small_disk(tmp_path / "disk", kilobytes=12) as disk:
        assert command(tar, "--out", disk / "packed", "--subset", "--workers", 1) == ExitCode.NOT_SAVED
        assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
        assert not [path for path in disk.iterdir() if path.is_dir()]


def test_scenes(tmp_path):
    with small_disk(tmp_path / "disk", kilobytes=16) as disk:
        with pytest.raises(RunError, match=r"cannot make the generated scenes .*No space left on device") as raised:
            ensure_scenes(disk, train=3, val=1, size=64, seed=0, workers=1)
        assert raised.value.exit_code == ExitCode.NOT_SAVED
