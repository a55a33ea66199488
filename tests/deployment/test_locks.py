"""Two processes that write into one folder: the second predict and the second export are refused."""

import subprocess
import sys
import time

import pytest
from PIL import Image

from ase_dist.commands.export import main as export_main
from ase_dist.commands.predict import main as predict_main
from ase_dist.errors import ExitCode

from .conftest import photo

pytestmark = pytest.mark.single_gpu
# Predicts, and exports meanwhile: each waits where it would write, so that it holds its folder.
HOLDER = """
import sys, threading, time
from ase_dist.commands import export, predict
from ase_dist.deployment import predict_folder, programs
model, picture, out, program = sys.argv[1:]
def wait(*arguments, **options):
    print("held", flush=True)
    time.sleep(600)
predict_folder._predict_files = programs._deploy = wait
threading.Thread(target=export.main, args=[[model, program, "--format", "pt2"]], daemon=True).start()
predict.main([model, picture, "--out", out, "--device", "cpu"])
"""


def test_the_second_predict_and_the_second_export_are_refused(export, tmp_path, capsys):
    out, program, picture = tmp_path / "out", tmp_path / "program", tmp_path / "in.png"
    Image.fromarray(photo()).save(picture)
    words = [str(path) for path in (export, picture, out, program)]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, *words], stdout=subprocess.PIPE, text=True)
    try:
        assert [holder.stdout.readline() for _ in range(2)] == ["held\n"] * 2
        for main, arguments, folder, doing in (
            (predict_main, [str(export), str(picture), "--out", str(out), "--device", "cpu"], out, "predicting"),
            (export_main, [str(export), str(program), "--format", "pt2"], program, "exporting"),
        ):
            assert main(arguments) == ExitCode.USAGE
            said = capsys.readouterr().err.splitlines()[-1]
            assert said.startswith(f"error: {str(folder)!r} is in use: process {holder.pid} on "), said
            assert f" has been {doing} there since {time.strftime('%Y-')}" in said
    finally:
        holder.kill()
        holder.wait()
    assert [path.name for path in out.iterdir()] == ["predictions.lock"], "nothing was written"
    assert predict_main([str(export), str(picture), "--out", str(out), "--device", "cpu"]) == 0
    assert (out / "in_sheet.png").is_file() and not (out / "predictions.lock").exists()
