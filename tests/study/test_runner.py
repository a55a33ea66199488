"""Runs of a study as real processes: several at once, a failing one, a signal in the middle, and going on after it."""

import dataclasses
import json
import logging
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ase_dist.study.jobs import jobs_of
from ase_dist.study.runner import Runner, Slots
from ase_dist.study.variants import Variant

pytestmark = pytest.mark.single_gpu

LAUNCH = Path(__file__).parents[2] / "launch" / "study.py"
SECONDS = 240


def runner_for(preset, out, names, *, jobs=2, steps=2):
    preset = dataclasses.replace(preset, steps=steps)
    variants = [Variant(name, name, "mtl_vit_lora") for name in names]
    return Runner(jobs_of(variants, preset, seeds=1, out=out), Slots(jobs, ("0", "1")))


def test_two_at_once_of_which_one_fails(toy, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="ase_dist")
    runner = runner_for(toy, tmp_path, ["good", "bad"])
    bad = runner.waiting[1]
    tree = {**bad.settings.model_dump(mode="json"), "resume": str(tmp_path / "nowhere")}
    runner.waiting[1] = dataclasses.replace(bad, settings=type(bad.settings).model_validate(tree))
    assert runner.run() == ["bad/seed_0"]
    good = tmp_path / "runs" / "good" / "seed_0"
    assert json.loads((good / "summary.json").read_text())["exit"] == "done"
    assert not (good / "checkpoints").exists()
    assert "failed bad/seed_0, exit code 2: error: resume" in caplog.text
    assert runner_for(toy, tmp_path, ["good", "bad"]).waiting[0].variant == "bad"


def test_a_signal_saves_the_runs_and_the_same_command_goes_on(toy, tmp_path):
    runner = runner_for(toy, tmp_path, ["long"], jobs=1, steps=100000)
    folder = tmp_path / "runs" / "long" / "seed_0"
    script = (
        "import pickle, sys; from ase_dist.study.runner import Runner, Slots\n"
        "runner = Runner(pickle.loads(sys.stdin.buffer.read()), Slots()); runner.run(); sys.exit(75 * runner.stopped)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    process.stdin.write(pickle.dumps(runner.waiting))
    process.stdin.close()
    deadline = time.monotonic() + SECONDS
    while not (folder / "metrics.jsonl").is_file() or '"kind":"train"' not in (folder / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 75
    assert json.loads((folder / "summary.json").read_text())["exit"] == "stopped"
    assert list((folder / "checkpoints").glob("step_*"))
    assert runner_for(toy, tmp_path, ["long"], jobs=1, steps=100000).waiting


def test_help_needs_no_torch_and_a_wrong_name_is_one_sentence():
    script = (
        "import runpy, sys; sys.argv = ['study.py', '--help']\n"
        "try:\n    runpy.run_path({launch!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert 'torch' not in sys.modules\n    sys.exit(end.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script.format(launch=str(LAUNCH))], capture_output=True, text=True,
                          timeout=SECONDS, check=False)  # fmt: skip
    assert done.returncode == 0 and "naive_vs_ase" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, LAUNCH, "tabel1"], capture_output=True, text=True, timeout=SECONDS,
                          check=False)  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: study: there is no 'tabel1', did you mean 'table1'")
