"""``train.compile``: the same numbers as without, and refused where the blocks change as they run."""

from unittest import mock

import pytest
import torch
from torch import nn

from ase_dist.training.record.metrics import read_metrics
from tests.training.tiny_runs import said, tiny_run

pytestmark = pytest.mark.single_gpu

SHORT = ("train.max_steps=2", "checkpoint.every=0")
COMPILE = nn.Module.compile


def test_a_compiled_run_computes_the_same(scenes, tmp_path):
    compiled = []

    def without_code(module):  # the graphs are captured and run as they are: generating code takes half a minute
        compiled.append(module)
        COMPILE(module, backend="aot_eager")

    with mock.patch.object(nn.Module, "compile", without_code):
        tiny_run(scenes, tmp_path / "compiled", "train.compile=true", *SHORT)
    tiny_run(scenes, tmp_path / "plain", *SHORT)
    torch._dynamo.reset()
    assert len(compiled) == 2  # blocks
    ours, wanted = (
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if line["kind"] == "train"]
        for name in ("compiled", "plain")
    )
    assert ours == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "config", "sentence"),
    [([], "z3", "train.compile: got true with ZeRO 3"),
     (["model.checkpoint_activations=recompute"], "z0", "with model.checkpoint_activations=recompute")],
)  # fmt: skip
def test_blocks_that_change_as_they_run_are_not_compiled(overrides, config, sentence, scenes, tmp_path):
    assert sentence in str(said(scenes, tmp_path, "train.compile=true", *overrides, config=config))
