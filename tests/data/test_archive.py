"""Archives unpacked whole or not at all: every way out of the folder is refused by the member's name."""

import io
import tarfile

import numpy as np
import pytest

from ase_dist.data import archive
from ase_dist.data.archive import unpack
from ase_dist.errors import UserError

pytestmark = pytest.mark.single_gpu

FILES = {"PASCAL_MT/a/1.txt": b"one", "PASCAL_MT/a/2.bin": bytes(3000), "PASCAL_MT/empty": b""}


def entry(name, content=b"x", **facts):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in facts.items():
        setattr(member, key, value)
    return member, content


def write(path, entries, *, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for member, content in entries:
            tar.addfile(member, io.BytesIO(content))
    return path


def good():
    return [entry(name, content, mtime=1234567890) for name, content in FILES.items()]


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tgz", "w:gz"), ("a.tar.gz", "w:gz"), ("a.tar", "w"), ("a.tar.xz", "w:xz")]
)
def test_bytes_and_times_are_taken_and_nothing_else(tmp_path, name, mode):
    folder = entry("PASCAL_MT/a", b"", type=tarfile.DIRTYPE)
    program = entry("./PASCAL_MT/run.sh", b"echo", mode=0o4777, uid=12345)
    path = write(tmp_path / name, [folder, *good(), folder, program], mode=mode)
    unpack(path, tmp_path / "out")
    for file, content in FILES.items():
        assert (tmp_path / "out" / file).read_bytes() == content
        assert (tmp_path / "out" / file).stat().st_mtime == 1234567890
    assert (tmp_path / "out/PASCAL_MT/run.sh").stat().st_mode & 0o7111 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out"])


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc"}


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ([entry("../evil")], "leads out"),
        ([entry("PASCAL_MT/../../evil")], "leads out"),
        ([entry("/tmp/evil")], "no relative path"),
        ([entry("a\\..\\evil")], "no relative path"),
        ([entry("evil", b"", **LINK)], "is a link to '/etc'"),
        ([entry("evil", b"", type=tarfile.LNKTYPE, linkname="PASCAL_MT/a/1.txt")], "is a link"),
        ([entry("evil", b"", type=tarfile.CHRTYPE)], "neither a file nor a folder"),
        ([entry("evil", b"", type=tarfile.FIFOTYPE)], "neither a file nor a folder"),
        ([entry("evil", b"1"), entry("evil", b"2")], "comes twice"),
        ([entry("evil", b"1"), entry("./evil", b"2")], "comes twice"),
        ([entry("evil", b"", type=tarfile.DIRTYPE), entry("evil", b"2")], "comes twice"),
        ([entry("evil", b"1"), entry("evil/more", b"2")], "was a file before"),
        ([entry("evil/" * 40 + "x")], "lies in 40 folders"),
        ([entry("evil/" * 2000 + "x")], "lies in 2000 folders"),
        ([entry("evil" * 100)], "a part of more than 255 bytes"),
        ([entry("evil", bytes(5000))], "has 5000 bytes, more than the 4000"),
        ([entry("b", bytes(3000)), entry("evil", bytes(3000))], "makes it 9003 bytes unpacked, more than 9000"),
    ],
)
def test_members_that_are_refused(tmp_path, monkeypatch, one_sentence, bad, why):
    monkeypatch.setattr(archive, "LARGEST_FILE", 4000)
    monkeypatch.setattr(archive, "LARGEST_TOTAL", 9000)
    path = write(tmp_path / "a.tgz", [*good(), *bad])
    with pytest.raises(ValueError, match="evil") as raised:
        unpack(path, tmp_path / "sub/out")
    one_sentence(raised, path, why, "nothing was unpacked")
    assert not list((tmp_path / "sub").iterdir())
    assert {found.name for found in tmp_path.iterdir()} == {"a.tgz", "sub"}


@pytest.mark.parametrize("name", ["", ".", "./"])
def test_a_file_without_a_name_is_refused(tmp_path, one_sentence, name):
    path = write(tmp_path / "a.tgz", [*good(), entry(name)])
    with pytest.raises(UserError, match="has no name") as raised:
        unpack(path, tmp_path / "out")
    one_sentence(raised, path, "nothing was unpacked")


def test_a_folder_without_a_name_is_the_folder_itself(tmp_path):
    unpack(write(tmp_path / "a.tgz", [entry("./", b"", type=tarfile.DIRTYPE), *good()]), tmp_path / "out")
    assert (tmp_path / "out/PASCAL_MT/empty").exists()


def header(kind, size, name="././@LongLink"):
    """512 bytes with any size, a negative one too (GNU's binary form), which tarfile would not write."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (
        (size % 256**12 | 0x80 << 88).to_bytes(12, "big") if size >= 0 else (256**12 + size).to_bytes(12, "big")
    )
    block[156:157] = kind
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (header(tarfile.GNUTYPE_LONGNAME, 1 << 30) + bytes(4096), "a header of 1073741824 bytes"),
        (header(tarfile.XHDTYPE, 1 << 30) + bytes(4096), "a header of 1073741824 bytes"),
        (header(tarfile.REGTYPE, -512, "x") + bytes(4096), "a header says -512 bytes"),
        (header(tarfile.GNUTYPE_LONGNAME, -512) + bytes(4096), "a header says -512 bytes"),
        ((header(tarfile.GNUTYPE_LONGNAME, 1) + b"a".ljust(512, b"\0")) * 3000, "headers of headers without end"),
    ],
)
@pytest.mark.timeout(20)
def test_headers_that_ask_for_too_much_are_refused_before_it_is_read(tmp_path, one_sentence, content, why):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=why) as raised:
        unpack(tmp_path / "a.tar", tmp_path / "out")
    one_sentence(raised, tmp_path / "a.tar", "fetch it again")


def test_a_negative_size_in_a_long_header_and_a_sparse_file_are_refused(tmp_path):
    negative = entry("x", b"", pax_headers={"size": "-1024"})
    with pytest.raises(UserError, match="has -1024 bytes"):
        unpack(write(tmp_path / "a.tar", [negative], mode="w"), tmp_path / "out")
    sparse = entry("evil", b"", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "1000000"})
    with pytest.raises(UserError, match="a file with holes"):
        unpack(write(tmp_path / "b.tar", [sparse], mode="w"), tmp_path / "out")


def test_a_truncated_archive_is_never_taken_for_a_whole_one(tmp_path, one_sentence):
    noise = np.random.default_rng(0).bytes(2000)
    path = write(tmp_path / "a.tgz", [*good(), entry("PASCAL_MT/noise", noise)])
    whole = path.read_bytes()
    for keep in (*range(1, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="unreadable archive") as raised:
            unpack(path, tmp_path / "out")
        one_sentence(raised, path, "fetch it again")
        assert [found.name for found in tmp_path.iterdir()] == ["a.tgz"]


def test_a_changed_byte_is_found_by_the_checksum(tmp_path, one_sentence):
    path = write(tmp_path / "a.tgz", [*good(), entry("PASCAL_MT/noise", np.random.default_rng(0).bytes(2000))])
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="unreadable archive") as raised:
        unpack(path, tmp_path / "out")
    one_sentence(raised, path)


def test_a_damaged_header_is_not_the_end(tmp_path):
    path = write(tmp_path / "a.tar", good(), mode="w")
    damaged = bytearray(path.read_bytes())
    damaged[1024 + 148] ^= 1  # the second member's checksum
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="header is damaged"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a tar archive", bytes(2048)])
def test_foreign_and_empty_files(tmp_path, one_sentence, content):
    (tmp_path / "a.tgz").write_bytes(content)
    with pytest.raises(ValueError, match="unreadable archive") as raised:
        unpack(tmp_path / "a.tgz", tmp_path / "out")
    one_sentence(raised, "wanted a whole .tar")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = write(tmp_path / "a.tgz", good())
    monkeypatch.setattr(archive.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        unpack(path, tmp_path / "out")
    assert [found.name for found in tmp_path.iterdir()] == ["a.tgz"]
