"""The command as a person starts it: three launchers, quick answers, one sentence for a mistake, restarts."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import psutil
import pytest

from ase_dist.commands import train as command
from ase_dist.config import setting_keys
from ase_dist.errors import ExitCode, UserError
from ase_dist.read_config import load_settings, to_yaml
from ase_dist.training.process import restarts
from ase_dist.training.process.finite import NonFiniteError
from ase_dist.training.process.runtime import JoinError, free_port
from ase_dist.training.state.checkpoint import SaveError
from tests.training.conftest import start_world
from tests.training.tiny_runs import ROOT, TINY, checkpoint, losses, metric_lines, same_bits, trained

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


@pytest.mark.single_gpu
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("train.txt: no such list"), ExitCode.USAGE),
        (SaveError("step 3 was not saved"), ExitCode.NOT_SAVED),
        (NonFiniteError("step 3 is not finite"), ExitCode.NON_FINITE),
        (JoinError("rank 0 of 2 could not join"), ExitCode.SILENT),
    ],
)
def test_what_ends_a_run_is_one_sentence_and_its_code(error, code, capsys):
    with mock.patch("ase_dist.training.loop.run.run", side_effect=error):
        assert command.main([]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


# ---------------------------------------------------------------------------------------------------------------------
# Three ways to start, all at once; in two of them a rank is killed, and two are asked to stop

STEPS, FIRST = 40, "step_4"  # enough steps after the first checkpoint for a kill to come before the last
LONG = (f"train.max_steps={STEPS}", "checkpoint.every=4")
ENDLESS = ("train.max_steps=1000000", "train.schedule=constant", "checkpoint.every=4", "checkpoint.keep=1000")
SECONDS = 450  # for all of them together, on a machine that has other things to do


class Started:
    """A run that a launcher has started in a session of its own; its output goes to a file."""

    def __init__(self, folder, name, launcher, *options):
        self.output, self.ops, self.text = folder / name, folder / f"{name}_ops", folder / f"{name}.err"
        self.ops.mkdir()
        self.was_killed = self.seconds_to_stop = None
        tools = Path(sys.executable).parent
        arguments = [*launcher, TRAIN, *Z2, *TINY, *options, f"output={self.output}"]
        with self.text.open("w") as file:
            self.process = subprocess.Popen(arguments, stdout=file, stderr=file, env=bare(tools, self.ops),
                                            start_new_session=True)  # fmt: skip

    def kill(self, rank):
        """SIGKILL to a rank once there is a checkpoint to go on from."""
        self.wait_for(self.output / "checkpoints" / FIRST / "manifest.json")
        self.was_killed = json.loads((self.output / f"rank_{rank}.beat").read_text())["pid"]
        os.kill(self.was_killed, signal.SIGKILL)

    def stop(self, *, group, number=signal.SIGTERM):
        """A signal to the launcher, or to its process group as a terminal and a scheduler send it; until all is over.

        ``deepspeed`` itself ends at once, its ranks when they have saved.
        """
        self.wait_for(self.output / "checkpoints" / f"step_{STEPS}" / "manifest.json")
        family, began = psutil.Process(self.process.pid).children(recursive=True), time.monotonic()
        os.killpg(self.process.pid, number) if group else self.process.terminate()
        self.end()
        _, alive = psutil.wait_procs(family, timeout=SECONDS)
        for process in alive:
            process.kill()
        assert not alive
        self.seconds_to_stop = time.monotonic() - began

    def end(self):
        self.process.wait(timeout=SECONDS)

    def clear(self):
        """Leave nothing behind where a test fails half-way: ranks of torchrun are in sessions of their own."""
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid)
            for process in [*family.children(recursive=True), family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()

    def wait_for(self, path, *, lines=0):
        """Until the file is there and has so many lines."""
        deadline = time.monotonic() + SECONDS
        while not (path.is_file() and path.read_text().count("\n") >= lines):
            assert self.process.poll() is None and time.monotonic() < deadline, self.text.read_text()[-3000:]
            time.sleep(0.005)


@pytest.fixture(scope="module")
def started(scenes, tmp_path_factory):
    """What was started, by name, after all of it has ended."""
    folder = tmp_path_factory.mktemp("starts")
    tools, data = Path(sys.executable).parent, f"data.root={scenes}"
    torchrun = [str(tools / "torchrun"), "--nproc_per_node", "2", "--max-restarts", "3", "--master_port"]
    deepspeed = [str(tools / "deepspeed"), "--num_gpus", "2", "--master_port"]
    half = "train.batch_size=2"
    runs = {
        "python": Started(folder, "python", [sys.executable], "--max-restarts", "2", *LONG, data),
        "torchrun": Started(folder, "torchrun", [*torchrun, str(free_port())], *ENDLESS, half, data),
        "deepspeed": Started(folder, "deepspeed", [*deepspeed, str(free_port())], *ENDLESS, half, data),
    }

    def kill_and_stop(run):
        run.kill(1)
        run.stop(group=False)

    tasks = [
        partial(runs["python"].kill, 0),
        partial(kill_and_stop, runs["torchrun"]),
        partial(runs["deepspeed"].stop, group=True),
    ]
    try:
        with ThreadPoolExecutor(len(tasks)) as pool:
            for done in [pool.submit(task) for task in tasks]:
                done.result()
        for run in runs.values():
            run.end()
    finally:
        for run in runs.values():
            run.clear()
    return runs


def bare(tools, ops):
    """An environment as on a machine without a compiler, and with nothing of a launcher."""
    kept = {key: value for key, value in os.environ.items() if key in ("HOME", "LANG", "OMP_NUM_THREADS", "TMPDIR")}
    return {**kept, "PATH": str(tools), "TORCH_EXTENSIONS_DIR": str(ops), "PYTHONPATH": str(ROOT)}


WAYS = ("python", "torchrun", "deepspeed")
LAUNCHERS = WAYS[1:]


@pytest.mark.multi_gpu
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_starting_trains(started, way):
    run = started[way]
    summary = json.loads((run.output / "summary.json").read_text())
    assert summary["step"] >= STEPS and summary["world_size"] == (1 if way == "python" else 2)
    assert json.loads((run.output / "env.json").read_text())["torch_threads"] == 1


@pytest.mark.multi_gpu
def test_a_run_that_is_done_ends_with_zero_and_plots(started):
    run = started["python"]
    assert run.process.returncode == 0, run.text.read_text()[-3000:]
    assert json.loads((run.output / "summary.json").read_text())["step"] == STEPS
    assert (run.output / "plots" / "losses.png").stat().st_size > 0


@pytest.mark.multi_gpu
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_compiled(started, way):
    assert [*started[way].ops.rglob("*")] == []


@pytest.mark.multi_gpu
@pytest.mark.parametrize("way", ["python", "torchrun"])
def test_after_a_rank_was_killed_the_command_goes_on_by_itself(started, way):
    """From the newest checkpoint: nothing is lost but the steps since."""
    run = started[way]
    resumed = re.findall(r"resumed at step (\d+) from", (run.output / "train.log").read_text())
    last = json.loads((run.output / "summary.json").read_text())["step"]
    assert run.was_killed and len(resumed) == 1 and 4 <= int(resumed[0]) < last and int(resumed[0]) % 4 == 0
    assert [*metric_lines(run.output)] == [*range(1, last + 1)]


@pytest.mark.multi_gpu
def test_both_launchers_compute_the_same(started):
    """Though a rank of one of them was killed on the way."""
    one, other = (
        {step: values for step, values in losses(started[way].output).items() if step <= STEPS} for way in LAUNCHERS
    )
    assert one == other and len(one) == STEPS
    assert same_bits(*(trained(started[way].output, STEPS) for way in LAUNCHERS)) == []


@pytest.mark.multi_gpu
@pytest.mark.nightly
@pytest.mark.parametrize(("way", "code"), [("torchrun", 1), ("deepspeed", -signal.SIGINT)])
def test_ctrl_c_ends_with_a_checkpoint_and_no_traceback_of_ours(scenes, tmp_path, way, code):
    """SIGINT to the process group, as a terminal sends it; the launchers' own tracebacks name none of our files."""
    tools = Path(sys.executable).parent
    launcher = {"torchrun": ["--nproc_per_node", "2"], "deepspeed": ["--num_gpus", "2"]}[way]
    words = [str(tools / way), *launcher, "--master_port", str(free_port())]
    run = Started(tmp_path, way, words, *ENDLESS, "train.batch_size=2", f"data.root={scenes}")
    try:
        run.stop(group=True, number=signal.SIGINT)
    finally:
        run.clear()
    assert run.process.returncode == code
    text = run.text.read_text()
    assert "stopped by a signal at step" in text and str(ROOT / "ase_dist") not in text.partition("Traceback")[2]
    assert json.loads((run.output / "summary.json").read_text())["exit"] == "stopped"


@pytest.mark.multi_gpu
@pytest.mark.parametrize("way", LAUNCHERS)
def test_a_launcher_that_is_asked_to_stop_leaves_a_checkpoint(started, way):
    run = started[way]
    assert run.process.returncode != 0 and run.seconds_to_stop < 100, run.text.read_text()[-3000:]
    summary = json.loads((run.output / "summary.json").read_text())
    assert summary["exit"] == "stopped"
    assert (run.output / "checkpoints" / "latest").read_text() == f"step_{summary['step']}\n"
    assert checkpoint(run.output, summary["step"])
    go_on = f"or: torchrun --nproc_per_node 2 -m ase_dist train --resume {run.output}\n"
    assert re.search(rf"stopped by a signal at step \d+, .*{go_on}", (run.output / "rank_1.log").read_text())


def dry(rank, folder):
    with (folder / "said").open("w") as said:
        os.dup2(said.fileno(), sys.stderr.fileno())
    options = [*Z2, *TINY, f"data.root={(folder / 'scenes').read_text()}", f"output={folder / 'run'}"]
    return command.main(["--dry-run", *options])


@pytest.mark.single_gpu
def test_a_dry_run_writes_nothing(scenes, tmp_path):
    (tmp_path / "scenes").write_text(str(scenes))
    assert start_world(dry, tmp_path, seconds=300)().results == [0]
    assert not (tmp_path / "run").exists()
    said = (tmp_path / "said").read_text()
    assert "one batch, forward and backward" in said and "task embedding" in said


# ---------------------------------------------------------------------------------------------------------------------
# Restarts


@pytest.mark.single_gpu
def test_other_codes_are_final():
    of_predict = {ExitCode.SKIPPED}
    again = {ExitCode.FAILED, ExitCode.IO_ERROR, ExitCode.SILENT}
    assert set(ExitCode) - restarts.FINAL_CODES - of_predict == again


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
    [
        ([1, -9, 0], 5, 3, 0),
        ([77, 77, 77], 1, 2, 77),
        ([71, 71, 0], 5, 3, 0),
        ([2], 5, 1, 2),
        ([75], 5, 1, 75),
        ([-9, -9], 1, 2, 137),
    ],
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
        "from ase_dist.training.process.restarts import supervise\nfrom ase_dist.read_config import load_settings\n"
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
