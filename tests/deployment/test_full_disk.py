"""A full disk under what is written of a trained model: one sentence, exit code 74, and nothing half written."""

import pytest
from PIL import Image

from ase_dist.commands.predict import main as predict
from ase_dist.commands.report import main as report
from ase_dist.deployment.evaluate_model import write_report
from ase_dist.deployment.exported import load
from ase_dist.deployment.programs import FORMATS, deploy
from ase_dist.errors import ExitCode, RunError
from ase_dist.evaluation.tables import Report
from ase_dist.tasks import select_tasks
from tests.disks import no_space, small_disk

from .conftest import make_export, photo

pytestmark = pytest.mark.single_gpu


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def is_told(raised, *words):
    assert raised.value.exit_code == ExitCode.NOT_SAVED
    assert all(word in str(raised.value) for word in ("No space left on device", *words))


def test_predict(export, tmp_path, capsys):
    Image.fromarray(photo()).save(tmp_path / "one.png")
    with small_disk(tmp_path / "disk", kilobytes=8) as disk:
        arguments = [str(export), str(tmp_path / "one.png"), "--out", str(disk / "out"), "--device", "cpu"]
        assert predict(arguments) == ExitCode.NOT_SAVED
        assert not [name for name in files(disk) if name.endswith(".tmp")]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said == [f"error: --out: cannot write to '{disk / 'out'}' (No space left on device); name another"]


def test_export(tmp_path):
    with small_disk(tmp_path / "disk", kilobytes=16) as disk:
        with pytest.raises(RunError) as raised:
            make_export(disk / "out")
        is_told(raised, f"export: cannot write '{disk / 'out'}'")
        assert files(disk) == []


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_programs(export, tmp_path, name):
    model = load(export)
    with small_disk(tmp_path / "disk", kilobytes=96) as disk:
        with pytest.raises(RunError) as raised:
            deploy(model, disk, formats=[name])
        is_told(raised, f"export: cannot write '{disk / f'model.{name}'}'")
        assert files(disk) == []


def test_an_evaluations_report(tmp_path, monkeypatch):
    tasks = select_tasks("scenes", ["saliency"])
    found = Report("x", {"model": "m"}, tasks, {"saliency": {"miou": 50.0}})
    monkeypatch.setattr("ase_dist.deployment.evaluate_model.write_atomic", lambda *_: (_ for _ in ()).throw(no_space()))
    with pytest.raises(RunError) as raised:
        write_report(found, tmp_path)
    is_told(raised, "--out: cannot write to")


def test_a_page(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with small_disk(tmp_path / "disk", kilobytes=4) as disk:
        assert report([str(tmp_path), "--out", str(disk / "page.html")]) == ExitCode.NOT_SAVED
        assert files(disk) == []
    assert "(No space left on device)" in capsys.readouterr().err


def test_a_disk_that_is_found_full_when_the_bytes_go_there(export, tmp_path, monkeypatch, capsys):
    """As on a network file system: every write goes well, and the error comes with fsync."""
    Image.fromarray(photo()).save(tmp_path / "one.png")
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    model = load(export)

    def full(path):
        raise no_space()

    monkeypatch.setattr("ase_dist.files.fsync", full)
    monkeypatch.setattr("ase_dist.deployment.export.fsync", full)
    arguments = [str(export), str(tmp_path / "one.png"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert predict(arguments) == ExitCode.NOT_SAVED
    assert report([str(tmp_path)]) == ExitCode.NOT_SAVED
    for write in (lambda: make_export(tmp_path / "second"), lambda: deploy(model, tmp_path, formats=["pt2"])):
        with pytest.raises(RunError) as raised:
            write()
        is_told(raised, "export: cannot write")
    assert not [name for name in files(tmp_path) if name.endswith((".tmp", ".html", ".pt2"))]
    assert not (tmp_path / "second").exists()
