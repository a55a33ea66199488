"""What a run says of itself: the table of an evaluation, and the load of experts whatever the gating mode is called."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ase_dist.config import Settings
from ase_dist.data.dataset import RecordDataset
from ase_dist.moe import MoEFFN
from ase_dist.moe.gating import Gates, dense
from ase_dist.registries import GATINGS
from ase_dist.tasks import PASCAL_TASKS
from ase_dist.training.process.runtime import World
from ase_dist.training.record.reports import MicroStep, SpanStatistics, result_table, start_tables
from tests.moe.conftest import FFN

pytestmark = pytest.mark.single_gpu
TASKS = (PASCAL_TASKS["semseg"], PASCAL_TASKS["edge"])
TRIVIAL = {"semseg": {"miou": 3.5}, "edge": {"bce": 0.05}}
NOW = {"semseg": {"miou": 26.6}, "edge": {"bce": 0.04, "ods_f": 41.2}}


def rows(first):
    """The cells of each row, the columns being two or more spaces apart."""
    lines = result_table("t", TASKS, NOW, TRIVIAL, first).splitlines()[4:-1]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_ods_has_a_row_of_its_own_without_a_trivial_value():
    assert rows(None) == [
        ["Semantic segmentation", "mIoU %", "higher", "3.5", "-", "26.6"],
        ["Edges", "BCE", "lower", "0.05", "-", "0.04"],
        ["Edges", "odsF (tolerance 0.0075) %", "higher", "-", "-", "41.2"],
    ]


def test_the_first_evaluation_may_have_been_without_it():
    first = {"semseg": {"miou": 8.0}, "edge": {"bce": 0.06}}
    assert [row[4] for row in rows(first)] == ["8", "0.06", "-"]


def half(logits_TN, *, k, num_shared):
    """A mode that ignores k: the first half of the routed experts and all shared ones are active."""
    active_TN = torch.ones_like(logits_TN, dtype=torch.bool)
    active_TN[..., 2:4] = False
    return Gates(logits_TN.sigmoid() * active_TN, active_TN, logits_TN.softmax(dim=-1))


@pytest.mark.parametrize(
    ("mode", "load"), [(dense, [1.0] * 6), (half, [1.0, 1.0, 0.0, 0.0, 1.0, 1.0])], ids=["dense", "half"]
)
def test_the_load_of_a_mode_of_ones_own_is_the_share_of_tokens(mode, load, monkeypatch):
    """An expert that is active for every token has load 1, under k=1 and under a name that says nothing."""
    monkeypatch.setitem(GATINGS, "of_ones_own", mode)
    layer = MoEFFN(FFN(8, 16), num_experts=6, k=1, num_shared=2, rank=2, num_tasks=2, gating="of_ones_own")
    output = layer(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)))
    world = World(0, 1, 0, 1, torch.device("cpu"), native_bf16=False)
    span = SpanStatistics(TASKS, world, layers=[layer])
    losses = {task.name: torch.tensor(1.0) for task in TASKS}
    counts, gates = output.expert_counts[None], output.mean_gates[None]
    for _ in range(3):
        span.add(MicroStep(losses, torch.tensor(2.0), torch.tensor(0.0), counts, gates, ["a.jpg"]))
    span.seconds = 1.0
    values = span.take()
    assert torch.equal(values["expert_load"], torch.tensor([[load, load]]))
    torch.testing.assert_close(values["shared_gate"], output.mean_gates[None, :, 4:].sum(dim=-1))


def test_the_trainer_is_imported_without_matplotlib():
    program = "import ase_dist.training.loop.run, sys; assert 'matplotlib' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_start_tables_say_how_experts_are_computed_and_why():
    options = {"num_experts": 64, "k": 2, "num_shared": 0, "num_tasks": 1, "gating": "topk"}
    layers = [MoEFFN(FFN(), **options) for _ in range(3)]
    loader = SimpleNamespace(dataset=RecordDataset("train", [PASCAL_TASKS["edge"]], ["one"], cache_in_memory=False))
    components = SimpleNamespace(
        settings=Settings(), tasks=[PASCAL_TASKS["edge"]], train_loader=loader, eval_loader=loader, total_steps=1,
        world=SimpleNamespace(size=1, device=torch.device("cpu")),
        config=SimpleNamespace(zero_stage=0, why_type="measured"),
        engine=SimpleNamespace(module=nn.ModuleList(layers)), parameters=SimpleNamespace(as_rows=list),
        balancer=SimpleNamespace(describe=lambda: "fixed weights"),
    )  # fmt: skip
    said = "LoRA experts     3 layers grouped (a token costs 256 columns with all experts, 72 with its own)"
    lines = start_tables(components).splitlines()
    assert said in lines and "balancing        fixed weights" in lines
    assert any("fp32 (measured), " in line or "bf16 (measured), " in line for line in lines)
