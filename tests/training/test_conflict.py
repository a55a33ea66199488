"""Cosines between the tasks' gradients: against one backward pass a task, over ranks, in a run, and refusals."""

import json
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from ase_dist.moe import MoEFFN
from ase_dist.training.loop.conflict import gradient_conflict
from ase_dist.training.record.metrics import read_metrics
from tests.moe.conftest import FFN, randomise
from tests.training.conftest import start_world
from tests.training.tiny_runs import said, tiny_run

MEASURE = ("eval.gradient_conflict_every=2", "train.max_steps=3", "checkpoint.every=0")


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (
            MoEFFN(FFN(), num_experts=6, k=2, num_shared=2, num_tasks=3, seed=seed) for seed in (0, 1)
        )
        for layer in (self.first, self.second):
            randomise(layer)

    def forward(self, x):
        return self.second(self.first(x).output).output


@pytest.mark.single_gpu
def test_equals_one_backward_pass_a_task():
    model, x = Two(), torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(0))
    losses = {f"task{t}": model(x)[t].square().sum() * (t + 1) for t in range(3)}
    with mock.patch("torch.autograd.grad", side_effect=torch.autograd.grad) as passes:
        got = gradient_conflict(losses, model)
    assert [call.args[0] for call in passes.call_args_list if call.args[0].dim() == 0] == list(losses.values())
    rows = []
    for t in range(3):
        model.zero_grad()
        model(x)[t].square().sum().backward()
        layers = [(model.first, model.second)[i].shared.parameters() for i in (0, 1)]
        rows.append([torch.cat([p.grad.flatten() for p in layer]) for layer in layers])
    cosine = torch.nn.functional.cosine_similarity
    for a in range(3):
        for b in range(3):
            wanted = cosine(torch.cat(rows[a]), torch.cat(rows[b]), dim=0)
            torch.testing.assert_close(got["cosines"][a, b], wanted, rtol=1e-4, atol=1e-5)
    by_layer = torch.stack([torch.stack([cosine(rows[a][i], rows[b][i], dim=0) for a, b in ((0, 1), (0, 2), (1, 2))])
                            for i in (0, 1)])  # fmt: skip
    torch.testing.assert_close(got["cosines_by_layer"], by_layer.mean(dim=1), rtol=1e-4, atol=1e-5)
    assert got["conflicting"] == (by_layer < 0).float().mean()


@pytest.mark.single_gpu
def test_tasks_that_want_the_opposite_and_a_task_without_gradient():
    model, x = Two(), torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(0))
    loss = model(x).square().mean()
    got = gradient_conflict({"a": loss, "b": -loss, "c": torch.zeros((), requires_grad=True) * 1}, model)
    torch.testing.assert_close(got["cosines"][0, 1], torch.tensor(-1.0))
    assert not got["cosines"][2].any() and got["conflicting"] == pytest.approx(1 / 3)


def runs(rank, folder):
    scenes = Path((folder / "scenes").read_text())
    for dispatch in ("gather", "all_to_all"):
        more = ("train.batch_size=2", "model.moe.ep_size=2", f"model.moe.dispatch={dispatch}")
        tiny_run(scenes, folder / dispatch, *MEASURE, *more, config="z2")


def measured(path):
    return {
        line["step"]: line["cosines"] for line in read_metrics(path / "metrics.jsonl") if line["kind"] == "conflict"
    }


@pytest.mark.multi_gpu
def test_a_run_measures_the_same_on_one_rank_and_on_two_that_share_experts(scenes, tmp_path):
    (tmp_path / "scenes").write_text(str(scenes))
    finish = start_world(runs, tmp_path, size=2)
    tiny_run(scenes, tmp_path / "one", *MEASURE)
    tiny_run(scenes, tmp_path / "plain", "train.max_steps=3", "checkpoint.every=0")
    assert finish().codes == [0, 0]
    one = measured(tmp_path / "one")
    assert list(one) == [1, 2] and len(one[1]) == 5
    for dispatch in ("gather", "all_to_all"):
        for step, cosines in measured(tmp_path / dispatch).items():
            torch.testing.assert_close(torch.tensor(cosines), torch.tensor(one[step]), rtol=1e-2, atol=2e-3)
    losses = [[line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if line["kind"] == "train"]
              for name in ("one", "plain")]  # fmt: skip
    assert losses[0] == losses[1]  # measuring changes nothing


@pytest.mark.single_gpu
def test_the_measurement_is_not_counted_as_training(scenes, tmp_path):
    def slow(*arguments):
        time.sleep(3)
        return gradient_conflict(*arguments)

    with mock.patch("ase_dist.training.loop.trainer.gradient_conflict", slow):
        tiny_run(scenes, tmp_path / "slow", *MEASURE)
    assert json.loads((tmp_path / "slow" / "summary.json").read_text())["train_seconds"] < 6  # of two measurements


@pytest.mark.single_gpu
def test_shared_logits_grow_from_zero_to_their_full_size(scenes, tmp_path):
    tiny_run(scenes, tmp_path / "warm", "model.moe.shared_logit_warmup=2", "checkpoint.every=0", "train.max_steps=4")
    tiny_run(scenes, tmp_path / "cold", "checkpoint.every=0", "train.max_steps=4")
    warm, cold = (
        [line["shared_gate"][0][0] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "shared_gate" in line]
        for name in ("warm", "cold")
    )
    assert warm[0] != cold[0] and abs(warm[2] - cold[2]) < abs(warm[0] - cold[0])


@pytest.mark.single_gpu
@pytest.mark.parametrize(
    ("overrides", "config", "sentence"),
    [
        (["model.moe.num_shared=0"], "z0", "there are no shared experts"),
        (["model.moe.enabled=false"], "z0", "there are no shared experts"),
        (["tasks=[edge]"], "z0", "one task alone"),
        ([], "z3", "ZeRO 3"),
        (["model.checkpoint_activations=recompute"], "z0", "checkpoint_activations=none"),
    ],
)
def test_what_cannot_be_measured_is_refused(overrides, config, sentence, scenes, tmp_path):
    assert sentence in str(said(scenes, tmp_path / "no", "eval.gradient_conflict_every=1", *overrides, config=config))
