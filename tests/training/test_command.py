"""The command as a person starts it: three launchers, quick answers, one sentence for a mistake, restarts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ase_dist import command
from ase_dist.config import load_settings, setting_keys, to_yaml
from ase_dist.training import restarts
from ase_dist.training.guards import ExitCode
from ase_dist.training.runtime import free_port
from tests.training.tiny_runs import ROOT, TINY, losses, same_bits, trained

TRAIN = str(ROOT / "launch" / "train.py")
Z2 = ("--deepspeed_config", str(ROOT / "ds_configs" / "z2.json"))


def python(*arguments, env=None):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=200, check=False, env=env, cwd=ROOT
    )


# ---------------------------------------------------------------------------------------------------------------------
# Quick answers


@pytest.mark.single_gpu
@pytest.mark.parametrize("flag", ["--help", "--print-config", "--print-keys"])
def test_quick_answers_import_no_torch(flag):
    """The time is that of this process, without waiting for others on the machine."""
    program = (
        "import runpy, sys, time\n"
        f"sys.argv = ['train.py', {flag!r}]\n"
        f"try: runpy.run_path({TRAIN!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'deepspeed', 'numpy', 'timm'} & sys.modules.keys()\n"
        "sys.stderr.write(f'{sorted(heavy)} {time.process_time()}')"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    heavy, seconds = done.stderr.rsplit(" ", 1)
    assert heavy == "[]" and float(seconds) < 2
    wanted = {"--help": "--deepspeed_config", "--print-config": to_yaml(load_settings()), "--print-keys": "model.moe.k"}
    assert wanted[flag] in done.stdout


@pytest.mark.single_gpu
def test_every_key_is_printed(capsys):
    assert command.main(["--print-keys"]) == 0
    assert capsys.readouterr().out.split() == setting_keys()


@pytest.mark.single_gpu
def test_options_and_settings_may_be_mixed(capsys):
    assert command.main(["seed=3", "--print-config", "train.lr=0.5", "--local_rank=0", "--deepspeed"]) == 0
    assert capsys.readouterr().out == to_yaml(load_settings(None, ["seed=3", "train.lr=0.5"]))


@pytest.mark.single_gpu
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian.lr=1"], "there is no such setting, did you mean 'train'?"),
        (["--config", "pascal_ase_16_3_1"], "did you mean 'pascal_ase_16_3_1_4'?"),
        (["tasks=[semsg]"], "scenes has no task 'semsg', wanted some of"),
        (["--deepspeed_config", "none.json"], "--deepspeed_config: cannot read 'none.json'"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_code(arguments, words, capsys):
    assert command.main(arguments) == ExitCode.USAGE
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and words in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Three ways to start, all at once


@pytest.fixture(scope="module")
def started(scenes, tmp_path_factory):
    """By way of starting: exit code, standard error, output folder, the folder in which ops would be compiled."""
    folder = tmp_path_factory.mktemp("starts")
    tools = Path(sys.executable).parent
    launchers = {
        "python": [sys.executable, TRAIN],
        "torchrun": [str(tools / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()), TRAIN],
        "deepspeed": [str(tools / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), TRAIN],
        "dry": [sys.executable, TRAIN, "--dry-run"],
    }
    processes = {}
    for name, launcher in launchers.items():
        half = "train.batch_size=4" if name in ("python", "dry") else "train.batch_size=2"
        ops, output = folder / f"{name}_ops", folder / name
        ops.mkdir()
        arguments = [*launcher, *Z2, *TINY, half, f"data.root={scenes}", f"output={output}"]
        errors = (folder / f"{name}.err").open("w+")
        processes[name] = (subprocess.Popen(arguments, stdout=errors, stderr=errors, env=bare(tools, ops)), output, ops)
    codes = {name: process.wait(timeout=280) for name, (process, _, _) in processes.items()}
    return {name: (codes[name], (folder / f"{name}.err").read_text(), *processes[name][1:]) for name in launchers}


def bare(tools, ops):
    """An environment as on a machine without a compiler, and with nothing of a launcher."""
    kept = {key: value for key, value in os.environ.items() if key in ("HOME", "LANG", "OMP_NUM_THREADS", "TMPDIR")}
    return {**kept, "PATH": str(tools), "TORCH_EXTENSIONS_DIR": str(ops), "PYTHONPATH": str(ROOT)}


@pytest.mark.multi_gpu
@pytest.mark.parametrize("way", ["python", "torchrun", "deepspeed"])
def test_every_way_of_starting_trains(started, way):
    code, errors, output, _ = started[way]
    assert code == 0, errors[-3000:]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["step"] == 6 and summary["world_size"] == (1 if way == "python" else 2)
    assert (output / "plots" / "losses.png").stat().st_size > 0
    assert json.loads((output / "env.json").read_text())["torch_threads"] == 1


@pytest.mark.multi_gpu
@pytest.mark.parametrize("way", ["python", "torchrun", "deepspeed", "dry"])
def test_nothing_is_compiled(started, way):
    code, _, _, ops = started[way]
    assert code == 0 and [*ops.rglob("*")] == []


@pytest.mark.multi_gpu
def test_both_launchers_compute_the_same(started):
    (_, _, one, _), (_, _, other, _) = started["torchrun"], started["deepspeed"]
    assert losses(one) == losses(other)
    assert same_bits(trained(one, 6), trained(other, 6)) == []


@pytest.mark.single_gpu
def test_a_dry_run_writes_nothing(started):
    code, errors, output, _ = started["dry"]
    assert code == 0 and not output.exists()
    assert "one batch, forward and backward" in errors and "task embedding" in errors


# ---------------------------------------------------------------------------------------------------------------------
# Restarts


@pytest.mark.single_gpu
def test_final_codes_are_those_of_the_guards():
    again = {ExitCode.FAILED, ExitCode.SILENT}
    assert {int(code) for code in ExitCode} - restarts.FINAL_CODES == again


def child(folder, *codes):
    """A program that counts its starts in ``folder``, notes its last argument and ends with the next of ``codes``."""
    program = folder / "child.py"
    program.write_text(
        "import os, signal, sys, time\n"
        f"count = {str(folder / 'starts')!r}\n"
        "open(count, 'a').write(sys.argv[-1] + '\\n')\n"
        f"code = {list(codes)}[len(open(count).readlines()) - 1]\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "if code == 'wait': time.sleep(60)\n"
        "if code < 0: os.kill(os.getpid(), -code)\n"
        "sys.exit(code)\n"
    )
    return [str(program), "resume=never"]


def starts(folder):
    return (folder / "starts").read_text().split()


@pytest.mark.single_gpu
@pytest.mark.parametrize(
    ("codes", "restarts_allowed", "count", "end"),
    [([1, -9, 0], 5, 3, 0), ([77, 77, 77], 1, 2, 77), ([2], 5, 1, 2), ([75], 5, 1, 75), ([-9, -9], 1, 2, 137)],
)
def test_a_crash_is_started_again(tmp_path, monkeypatch, codes, restarts_allowed, count, end):
    monkeypatch.setattr(restarts, "PAUSE", 0.0)
    settings = load_settings(None, [f"output={tmp_path / 'run'}", "resume=never"])
    assert restarts.supervise(child(tmp_path, *codes), settings, restarts=restarts_allowed) == end
    assert starts(tmp_path) == ["resume=never", *["resume=auto"] * (count - 1)]


@pytest.mark.single_gpu
def test_a_signal_goes_on_to_the_child_and_ends_it(tmp_path):
    arguments = child(tmp_path, "wait")
    program = (
        "from ase_dist.training.restarts import supervise\nfrom ase_dist.config import load_settings\n"
        f"raise SystemExit(supervise({arguments!r}, load_settings(None, []), restarts=5))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    while not (tmp_path / "starts").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=30) == ExitCode.STOPPED
    assert len(starts(tmp_path)) == 1


@pytest.mark.single_gpu
def test_restarts_are_refused_under_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun --max-restarts"):
        restarts.supervise(["x"], load_settings(), restarts=1)


@pytest.mark.single_gpu
def test_the_supervisor_is_not_started_again_by_its_child():
    argv = ["a=1", "--max-restarts", "3", "--config", "scenes", "--max-restarts=4"]
    assert command._without_option(argv, "--max-restarts") == ["a=1", "--config", "scenes"]
