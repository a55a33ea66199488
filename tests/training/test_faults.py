"""Faults of reference 7, 8 and 9, and ranks that differ: the run does as promised, the weights stay whole."""

import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from ase_dist import collectives
from ase_dist.errors import ExitCode, UserError
from ase_dist.models.multitask import MultiTaskViT
from ase_dist.training.loop import trainer
from ase_dist.training.process import watchdog
from ase_dist.training.state.checkpoint import CheckpointStore
from ase_dist.training.state.run_state import RunState
from tests.training.conftest import start_world
from tests.training.tiny_runs import (
    before_step,
    checkpoint,
    losses,
    metric_lines,
    not_finite,
    said,
    same_bits,
    saved_meta,
    tiny_run,
    trained,
)

HALF = "train.batch_size=2"
SHARDED = ("model.moe.ep_size=2", "model.moe.dispatch=all_to_all")
EVERY = ("checkpoint.every=1", "checkpoint.keep=9")
STAGES = ("z0", "z0_unclipped", "z1", "z2", "z2_offload", "z2_bf16", "z3")
EXPERT_ALONE = ("z0", "z2")
FAULTS = {2: "image", 3: "label", 4: "router", 5: "gradient"}


def start(worker, scenes, folder, *, size):
    (folder / "scenes").write_text(str(scenes))
    return start_world(worker, folder, size=size, seconds=200)


def end(finish, *, codes):
    ended = finish()
    assert ended.codes == codes
    return ended.results


def scenes_of(folder):
    return Path((folder / "scenes").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# 7: NaN, in one process


def nan_at_every_stage(rank, folder):
    scenes, skip, found = scenes_of(folder), "guard.non_finite=skip", {}
    for name in STAGES:
        options = ["train.gradient_clipping=0"] if "unclipped" in name else []
        options += ["train.bf16=true"] if "bf16" in name else []
        config = name.removesuffix("_unclipped")
        with not_finite(FAULTS):
            tiny_run(scenes, folder / name, skip, *EVERY, *options, config=config)
        with not_finite({2: "gradient"}):
            found[name] = said(scenes, folder / f"{name}_stopped", *EVERY, *options, config=config)
    with not_finite(FAULTS):
        found["too many"] = said(scenes, folder / "too_many", skip, "guard.max_skips=3", *EVERY)
    two = ("train.batch_size=2", "train.gradient_accumulation_steps=2", "train.max_steps=4")
    with not_finite({4: "image"}):  # the second half of step 2
        tiny_run(scenes, folder / "accumulated", skip, *EVERY, *two, config="z2")
    return found


@pytest.fixture(scope="module")
def nan_alone(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nan")
    return folder, end(start(nan_at_every_stage, scenes, folder, size=1), codes=[0])[0]


@pytest.mark.single_gpu
@pytest.mark.parametrize("name", STAGES)
def test_nan_never_reaches_a_weight(nan_alone, name):
    folder, _ = nan_alone
    first, last = trained(folder / name, 1), trained(folder / name, 6)
    assert all(tensor.isfinite().all() for tensor in last.values())
    for step in FAULTS:
        assert same_bits(trained(folder / name, step), first) == [], f"step {step} was taken"
    assert same_bits(first, last), "and the next one was"


@pytest.mark.single_gpu
@pytest.mark.parametrize("name", STAGES)
def test_skipped_steps_are_told(nan_alone, name):
    folder, _ = nan_alone
    log = (folder / name / "train.log").read_text()
    assert re.search(r"step 2 is not finite \(rank 0: .*semseg nan.*, batch \['\w+'.*; skipped", log)
    assert re.search(r"step 3 is not finite \(rank 0: normals nan, batch", log)
    assert re.search(r"step 4 is not finite \(rank 0: .*aux_loss nan", log)
    assert re.search(r"step 5 is not finite \(rank 0: gradient nan, batch", log)
    assert [*metric_lines(folder / name)] == [1, 6]


@pytest.mark.single_gpu
@pytest.mark.parametrize("name", STAGES)
def test_the_default_is_to_stop(nan_alone, name):
    folder, found = nan_alone
    assert found[name].startswith("NonFiniteError: step 2 is not finite (rank 0: gradient nan")
    assert [path.name for path in sorted((folder / f"{name}_stopped" / "checkpoints").glob("step_*"))] == ["step_1"]


@pytest.mark.single_gpu
def test_too_many_skips_in_a_row_end_the_run(nan_alone):
    _, found = nan_alone
    assert "step 5 is not finite" in found["too many"] and "more than 3 such steps in a row" in found["too many"]


@pytest.mark.single_gpu
def test_one_bad_micro_step_skips_the_whole_step(nan_alone):
    folder, _ = nan_alone
    assert same_bits(trained(folder / "accumulated", 1), trained(folder / "accumulated", 2)) == []
    assert [*metric_lines(folder / "accumulated")] == [1, 3, 4]


def evaluation_fails(rank, folder):
    scenes, once = scenes_of(folder), ("checkpoint.every=0",)
    broken = mock.patch.object(trainer, "evaluate", side_effect=RuntimeError("no memory left"))
    with broken:
        sentence = said(scenes, folder / "failed", *once)
    left = checkpoint(folder / "failed", 6)
    tiny_run(scenes, folder / "failed", *once)
    saved, save = [], CheckpointStore.save

    def counted(store, step, *arguments, **options):
        saved.append(step)
        return save(store, step, *arguments, **options)

    with mock.patch.object(CheckpointStore, "save", counted):
        tiny_run(scenes, folder / "whole", "checkpoint.every=2", "eval.every=3")
    return sentence, same_bits(left, checkpoint(folder / "failed", 6)), saved


def evaluation_draws(rank, folder):
    scenes, options = scenes_of(folder), ("eval.every=3", "model.drop_path=0.2")
    tiny_run(scenes, folder / "still", *options)
    with mock.patch.object(trainer, "evaluate", then(lambda: torch.rand(3), trainer.evaluate)):
        tiny_run(scenes, folder / "draws", *options)
    return same_bits(checkpoint(folder / "draws", 6), checkpoint(folder / "still", 6))


@pytest.mark.single_gpu
def test_an_evaluation_that_fails_costs_no_step_and_no_step_is_written_twice(scenes, tmp_path):
    [(sentence, differing, saved)] = end(start(evaluation_fails, scenes, tmp_path, size=1), codes=[0])
    assert sentence == "RuntimeError: no memory left" and differing == []
    assert [*metric_lines(tmp_path / "failed", "eval")] == [6]
    assert metric_lines(tmp_path / "failed", "eval")[6] == metric_lines(tmp_path / "whole", "eval")[6]
    assert saved == [2, 3, 4, 6], "3 is the best so far; 6 is saved before its evaluation, which joins it"
    for name in ("failed", "whole"):
        history = saved_meta(tmp_path / name, 6)["history"]
        assert history["evaluated_at"] == 6 and history["latest"].keys() == history["trivial"].keys()


@pytest.mark.single_gpu
def test_an_evaluation_that_draws_random_numbers_changes_no_step(scenes, tmp_path):
    """Else a resumed run, which begins with the state from before the evaluation, would not be the same one."""
    assert end(start(evaluation_draws, scenes, tmp_path, size=1), codes=[0]) == [[]]


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks: NaN on one of them, signals, and what they must agree upon


def two_ranks(rank, folder):
    scenes = scenes_of(folder)
    return {**nan_on_one(rank, folder, scenes), **signals(rank, folder, scenes), **differences(rank, folder, scenes)}


def nan_on_one(rank, folder, scenes):
    found = {}
    for name, options in {"z0": (), "z1": (), "z2": (), "sharded": SHARDED, "z3": ()}.items():
        stage = "z2" if name == "sharded" else name
        with not_finite({2: "label", 3: "gradient"} if rank == 1 else {}):
            tiny_run(scenes, folder / name, HALF, *EVERY, *options, "guard.non_finite=skip", "train.max_steps=4",
                     config=stage)  # fmt: skip
    for name in EXPERT_ALONE:
        options = (*SHARDED, "guard.non_finite=skip", "train.max_steps=3", "train.gradient_clipping=0")
        with not_finite({2: "expert"} if rank == 1 else {}):
            tiny_run(scenes, folder / f"expert_{name}", HALF, *EVERY, *options, config=name)
    with not_finite({2: "label"} if rank == 1 else {}):
        found["stopped"] = said(scenes, folder / "nan", HALF, *EVERY)
    return found


def send(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def then(action, real):
    """``real``, after ``action``."""

    def both(*arguments, **options):
        action()
        return real(*arguments, **options)

    return both


def signals(rank, folder, scenes):
    """Exit codes of runs that get SIGTERM at different moments, each resumed afterwards; "whole" got none."""
    codes = {}
    options = (HALF, "eval.every=2", "model.drop_path=0.2", "checkpoint.every=0")

    def interrupted(name, context):
        with context:
            codes[name] = tiny_run(scenes, folder / name, *options)
        codes[f"{name} at"] = (folder / name / "checkpoints" / "latest").read_text().strip()
        collectives.barrier()
        codes[f"{name} again"] = tiny_run(scenes, folder / name, *options)

    codes["whole"] = tiny_run(scenes, folder / "whole", *options)
    interrupted("one", before_step({3: send} if rank == 1 else {}))
    interrupted("all", before_step({3: send}))
    interrupted("twice", before_step({3: lambda batch: (send(), send())}))
    evaluating = mock.patch.object(trainer, "evaluate", then(send, trainer.evaluate))
    interrupted("evaluating", evaluating if rank == 1 else before_step({}))
    saving = mock.patch.object(RunState, "_shards", then(send, RunState._shards))
    with saving if rank == 0 else before_step({}):
        codes["saving"] = tiny_run(scenes, folder / "saving", *options[:-1], "checkpoint.every=3")
    codes["saving again"] = tiny_run(scenes, folder / "saving", *options[:-1], "checkpoint.every=3")
    return codes


def differences(rank, folder, scenes):
    """What this rank says where rank 1 was started with something else."""
    fingerprint = mock.patch("ase_dist.training.loop.components.data_fingerprint", lambda dataset: f"copy {rank}")
    absent = mock.patch("ase_dist.training.loop.components.build_train_loader", partial(refuse_on_one, rank))
    with fingerprint:
        other_data = said(scenes, folder / "other", HALF)
    with absent:
        no_data = said(scenes, folder / "other", HALF)
    step_1 = folder / "z2" / "checkpoints" / "step_1"
    return {
        "settings": said(scenes, folder / "other", HALF, f"train.lr={1 + rank}e-3"),
        "json": said(scenes, folder / "other", HALF, config=("z1", "z2")[rank]),
        "data": other_data,
        "no data": no_data,
        "experts": said(scenes, folder / "other", HALF, "model.moe.rank=3", f"resume={step_1}"),
        "heads": said(scenes, folder / "other", HALF, "tasks=[semseg, edge]", f"resume={step_1}"),
        "backbone": said(scenes, folder / "other", HALF, "seed=1", f"resume={step_1}"),
        "used": said(scenes, folder / "whole", HALF, "resume=never"),
    }


def refuse_on_one(here, *arguments, **options):
    from ase_dist.data.loader import build_train_loader

    if here == 1:
        raise UserError("train.txt: no such list")
    return build_train_loader(*arguments, **options)


@pytest.fixture(scope="module")
def pair(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return folder, end(start(two_ranks, scenes, folder, size=2), codes=[0, 0])


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", ["z0", "z1", "z2", "sharded", "z3"])
def test_nan_on_one_rank_skips_the_step_on_all(pair, name):
    folder, _ = pair
    first = trained(folder / name, 1)
    assert same_bits(first, trained(folder / name, 2)) == same_bits(first, trained(folder / name, 3)) == []
    assert all(tensor.isfinite().all() for tensor in trained(folder / name, 4).values())
    log = (folder / name / "train.log").read_text()
    assert re.search(r"step 2 is not finite \(rank 1: normals nan, batch \['\w+', '\w+'\]\); skipped", log)
    assert [*losses(folder / name)] == [1, 4]


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", EXPERT_ALONE)
def test_nan_in_one_ranks_experts_skips_the_step_on_all(pair, name):
    """No loss and no gradient of the other rank shows it."""
    output = pair[0] / f"expert_{name}"
    first, second, third = (trained(output, step) for step in (1, 2, 3))
    assert same_bits(first, second) == [] and same_bits(first, third)
    assert all(tensor.isfinite().all() for tensor in third.values())
    assert "step 2 is not finite (rank 0: gradient nan" in (output / "train.log").read_text()


@pytest.mark.multi_gpu
def test_nan_on_one_rank_stops_all_with_one_sentence(pair):
    _, (first, second) = pair
    assert first["stopped"] == second["stopped"]
    assert first["stopped"].startswith("NonFiniteError: step 2 is not finite (rank 1: normals nan, batch [")


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("name", "step"), [("one", "step_3"), ("all", "step_3"), ("twice", "step_3"), ("evaluating", "step_2")]
)
def test_a_signal_leaves_one_checkpoint_and_nothing_is_lost(pair, name, step):
    folder, results = pair
    for codes in results:
        assert codes[name] == ExitCode.STOPPED and codes[f"{name} again"] == 0
        assert codes[f"{name} at"] == step
    assert same_bits(checkpoint(folder / name, 6), checkpoint(folder / "whole", 6)) == []
    assert metric_lines(folder / name, "eval") == metric_lines(folder / "whole", "eval")


@pytest.mark.multi_gpu
def test_a_signal_while_saving(pair):
    folder, results = pair
    assert [codes["saving"] for codes in results] == [ExitCode.STOPPED] * 2
    assert [codes["saving again"] for codes in results] == [0, 0]
    assert same_bits(trained(folder / "saving", 6), trained(folder / "whole", 6)) == []


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("settings", "UserError: rank 0 and rank 1 differ in train.lr: 0.001 and 0.002"),
        ("json", "UserError: rank 0 and rank 1 differ in the DeepSpeed JSON"),
        ("data", "UserError: rank 0 and rank 1 differ in training data: copy 0 and copy 1"),
        ("no data", "UserError: rank 1: train.txt: no such list"),
        ("experts", "is of another run: model.moe.rank is 4 there and 3 here"),
        ("heads", """ "edge", "normals"] there and ["semseg", "edge"] here"""),
        ("backbone", "is of another run: seed is 0 there and 1 here"),
        ("used", "already holds the metrics of a run and resume is 'never'"),
    ],
)
def test_all_ranks_refuse_alike(pair, what, words):
    _, (first, second) = pair
    assert words in first[what]
    assert first[what] == second[what]


# ---------------------------------------------------------------------------------------------------------------------
# 9: a peer dies or sleeps

LIMIT = 12.0


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in_forward(rank, folder):
    with mock.patch.object(MultiTaskViT, "forward", then(kill, MultiTaskViT.forward)) if rank else before_step({}):
        peer(folder)


def dies_in_backward(rank, folder):
    forward = MultiTaskViT.forward

    def fatal(model, *arguments, **options):
        output = forward(model, *arguments, **options)
        output.predictions["edge"].register_hook(kill)
        return output

    with mock.patch.object(MultiTaskViT, "forward", fatal) if rank else before_step({}):
        peer(folder)


def dies_in_all_to_all(rank, folder):
    real = collectives.start_all_to_all_rows
    with mock.patch.object(collectives, "start_all_to_all_rows", then(kill, real)) if rank else before_step({}):
        peer(folder, *SHARDED)


def sleeps(rank, folder):
    with before_step({2: lambda batch: time.sleep(60)} if rank else {}):
        peer(folder, "guard.timeout=4")


def peer(folder, *options):
    tiny_run(scenes_of(folder), folder / "run", HALF, f"guard.timeout={LIMIT}", *options)


def dies_and_the_other_hangs_at_its_end(rank, folder):
    try:
        with mock.patch.object(watchdog, "END_GRACE", 2.0):
            dies_in_forward(rank, folder)
    finally:
        time.sleep(150)


PEERS = (dies_in_forward, dies_in_backward, dies_in_all_to_all, sleeps, dies_and_the_other_hangs_at_its_end)


@pytest.fixture(scope="module")
def peers(scenes, tmp_path_factory):
    folders = {worker: tmp_path_factory.mktemp(worker.__name__) for worker in PEERS}
    started = {worker: (time.monotonic(), start(worker, scenes, folders[worker], size=2)) for worker in PEERS}
    ended = {}
    for worker, (began, finish) in started.items():
        codes = finish().codes
        ended[worker] = (codes, (folders[worker] / "run" / "rank_0.log").read_text(), time.monotonic() - began)
    return ended


@pytest.mark.multi_gpu
@pytest.mark.parametrize("worker", PEERS)
def test_the_others_end_and_name_the_rank(peers, worker):
    codes, log, seconds = peers[worker]
    assert codes[0] in (ExitCode.FAILED, ExitCode.SILENT) and seconds < 100
    if worker is sleeps:
        assert codes[1] == ExitCode.SILENT
        # dead, silent or behind: both ranks' time is up at once; what it began last is as fresh as its last beat
        assert re.search(r"rank 1 on \S+ (is dead|gave no sign of life|is behind).*the last thing", log), log
    else:
        if worker is dies_and_the_other_hangs_at_its_end:
            assert "in dies_and_the_other_hangs_at_its_end" in log, "the stack that shows what it hangs in"
        assert codes[1] == -signal.SIGKILL
        assert re.search(r"rank 1 on \S+ is dead, the last thing it was known to begin is", log)
