"""The command that packs: archives, exit codes and sentences, verification, real photographs."""

import logging
import tarfile

import numpy as np
import pytest
from PIL import Image

from ase_dist.data.packed import prepare, shard
from ase_dist.data.packed.dataset import PackedDataset
from ase_dist.data.packed.prepare import check_only
from ase_dist.data.packed.verify import verify
from ase_dist.data.pascal_context import PascalContext
from ase_dist.tasks import select_tasks
from tests.data.packing import ALL, archive, command, contents, packed_names, request

pytestmark = pytest.mark.single_gpu


# --- archives --------------------------------------------------------------------------------------------------------


def test_an_archive_is_packed_like_its_folder(six, pack, tmp_path, counted, caplog):
    tgz = archive(six.root, tmp_path / "PASCALContext.tar.gz")
    reference = pack(six.root, out=tmp_path / "reference")
    place = pack(tgz)
    bins = {name: content for name, content in contents(place).items() if name.endswith(".bin")}
    assert bins == {name: content for name, content in contents(reference).items() if name.endswith(".bin")}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"PASCAL_MT", "reference", "packed"}
    counted.clear()
    caplog.clear()  # another test may have turned the log on
    with caplog.at_level(logging.INFO):
        pack(tgz)
    assert not counted and "unpacking" not in caplog.text

    six.semseg("t0", np.full((12, 16), 9))
    archive(six.root, tgz)
    pack(tgz)
    assert (PackedDataset(place, "train", ALL, data="pascal_context")[0].labels["semseg"] == 9).all()


def test_an_archive_with_faults_is_kept_unpacked_until_it_is_packed(six, pack, tmp_path, monkeypatch):
    six.path("sal_distill/t0.png").write_bytes(b"")
    tgz = archive(six.root, tmp_path / "PASCAL_MT.tgz")
    with pytest.raises(ValueError, match="1 cannot be used"):
        pack(tgz)
    label = next(tmp_path.glob(".packed.unpacked-*/PASCALContext/sal_distill/t0.png"))
    monkeypatch.setattr(prepare, "unpack", None)  # not again
    Image.fromarray(np.zeros((12, 16), np.uint8)).save(label)
    assert len(packed_names(pack(tgz))) == 5
    assert not list(tmp_path.glob(".packed.unpacked-*"))


def test_a_bad_archive_is_refused_and_leaves_nothing(six, pack, tmp_path, one_sentence):
    tgz = tmp_path / "PASCAL_MT.tgz"
    with tarfile.open(tgz, "w:gz") as tar:
        tar.add(six.root, arcname="PASCAL_MT")
        member = tarfile.TarInfo("../evil")
        tar.addfile(member)
    with pytest.raises(ValueError, match=r"'\.\./evil'") as raised:
        pack(tgz)
    one_sentence(raised, tgz)
    assert {path.name for path in tmp_path.iterdir()} == {"PASCAL_MT", "PASCAL_MT.tgz", ".packed.lock"}


def test_checking_an_archive_leaves_nothing(six, tmp_path):
    tgz = archive(six.root, tmp_path / "PASCAL_MT.tgz")
    assert check_only(request(tgz), tmp_path / "packed") == 6
    assert {path.name for path in tmp_path.iterdir()} == {"PASCAL_MT", "PASCAL_MT.tgz"}


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_packs_checks_and_verifies(six, tmp_path, caplog):
    place = tmp_path / "packed"
    with caplog.at_level(logging.INFO):
        assert command(six.root, "--subset", "--check-only") == 0
        assert "6 images are whole" in caplog.text
        assert not place.exists()
        assert command(six.root, "--subset", "--out", place, "--workers", "1") == 0
        assert f"data.root={place}" in caplog.text
        assert command(place, "--check-only") == 0
        assert "8 packed files are whole" in caplog.text


def test_verifying_names_the_damaged_file_which_can_be_made_again(six, pack, counted, capsys):
    place = pack(six.root)
    content = bytearray((place / "train-001.bin").read_bytes())
    content[100] ^= 1
    (place / "train-001.bin").write_bytes(content)
    assert command(place) == 2
    assert "1 of 8 packed files are damaged (train-001.bin)" in capsys.readouterr().err
    (place / "train-001.bin").unlink()
    counted.clear()
    pack(six.root)
    assert counted == ["train-001.bin"]
    assert verify(place) == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "semseg,edges"], "did you mean 'edge'"),
        (["--workers", "0", "--subset"], "--workers: got 0"),
        ([], "--subset"),
    ],
)
def test_the_command_names_mistakes(six, capsys, options, said, tmp_path):
    assert command(six.root, "--out", tmp_path / "packed", *options) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


def test_an_interrupted_command_says_so(six, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "prepare", interrupted)
    assert command(six.root, "--out", tmp_path / "packed") == 130
    assert capsys.readouterr().err == "error: interrupted; the same command goes on from here\n"


# --- real photographs ------------------------------------------------------------------------------------------------


@pytest.mark.shared_data
def test_photographs_packed_are_the_photographs(photographs, tmp_path):
    tasks = select_tasks("pascal_context", ("semseg", "human_parts", "saliency", "edge"))
    place = tmp_path / "packed"
    small = PascalContext(photographs, "val", tasks, limit=12)
    root = tmp_path / "ccp"
    for split, names in (("train", small.names[:8]), ("val", small.names[8:])):
        for path in [path for name in names for path in shard.needed_files(small, name)]:
            target = root / path.relative_to(photographs)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
        (root / "ImageSets/Context").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Context/{split}.txt").write_text("\n".join(names))
    prepare.prepare(request(root, tasks=tuple(task.name for task in tasks)), place)
    for split in ("train", "val"):
        plain, packed = PascalContext(root, split, tasks), PackedDataset(place, split, tasks, data="pascal_context")
        for a, b in ((plain[i], packed[i]) for i in range(len(plain))):
            np.testing.assert_array_equal(a.image, b.image)
            for task, label in a.labels.items():
                np.testing.assert_array_equal(label, b.labels[task])
