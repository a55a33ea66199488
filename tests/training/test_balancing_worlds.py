"""The weights of balancing are those of one process: on 2 and 4 ranks, experts shared or not, in micro-steps, bf16."""

from pathlib import Path

import pytest
import torch

from tests.training.conftest import start_world
from tests.training.tiny_runs import metric_lines, saved_meta, tiny_run

pytestmark = pytest.mark.multi_gpu

SHORT = ("train.max_steps=3", "checkpoint.every=2", "data.limit_val=1", "train.deterministic=true")
SHORT += ("model.moe.aux_losses={}",)  # which are of a micro-step each
METHODS = ("famo", "gradnorm", "aligned_mtl")
EP = "model.moe.ep_size=2"
# name of a run in a world of 2: method, DeepSpeed's JSON, changes
IN_TWO = {
    **{method: (method, "z2", (EP, "model.moe.dispatch=all_to_all", "train.batch_size=2")) for method in METHODS},
    "gls_ep_1": ("gls", "z1", ("train.batch_size=2",)),
    "aligned_mtl_ep_1": ("aligned_mtl", "z1", ("train.batch_size=1", "train.gradient_accumulation_steps=2")),
    "aligned_mtl_z3": ("aligned_mtl", "z3", ("train.batch_size=2",)),
}


def balanced(scenes, output, method, *overrides, config="z0"):
    tiny_run(scenes, output, *SHORT, f"train.balancing.method={method}", *overrides, config=config)


def two(rank, folder):
    scenes = Path((folder / "scenes").read_text())
    for name, (method, config, changes) in IN_TWO.items():
        balanced(scenes, folder / "two" / name, method, *changes, config=config)


def four(rank, folder):
    scenes = Path((folder / "scenes").read_text())
    balanced(scenes, folder / "four" / "aligned_mtl", "aligned_mtl", EP, "train.batch_size=1", config="z2")
    source = folder / "two" / "gradnorm" / "checkpoints" / "step_2"
    balanced(
        scenes, folder / "four" / "gradnorm", "gradnorm", EP, "train.batch_size=1", f"resume={source}", config="z0"
    )
    more = ("train.batch_size=1", "train.balancing.on=representation")
    balanced(scenes, folder / "four" / "representation", "aligned_mtl", *more, config="z1")


@pytest.fixture(scope="module")
def folder(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("balancing")
    (folder / "scenes").write_text(str(scenes))
    for worker, size in ((two, 2), (four, 4)):
        (folder / "rendezvous").unlink(missing_ok=True)
        assert start_world(worker, folder, size=size, seconds=240)().codes == [0] * size
    for method in (*METHODS, "gls"):
        balanced(scenes, folder / "one" / method, method)
    balanced(scenes, folder / "one" / "representation", "aligned_mtl", "train.balancing.on=representation")
    micro = ("train.batch_size=1", "train.gradient_accumulation_steps=4")
    balanced(scenes, folder / "one" / "gls_micro", "gls", *micro)
    balanced(scenes, folder / "one" / "famo_micro", "famo", *micro)
    return folder


def weights(path):
    return {step: list(line["task_weights"].values()) for step, line in metric_lines(path).items()}


CASES = [
    *((f"two/{name}", method) for name, (method, _, _) in IN_TWO.items()),
    ("four/aligned_mtl", "aligned_mtl"),
    ("four/representation", "representation"),
    ("one/gls_micro", "gls"),
    ("one/famo_micro", "famo"),
]


@pytest.mark.parametrize(("name", "one"), CASES)
def test_any_world_has_the_weights_of_one_process(folder, name, one):
    found, wanted = weights(folder / name), weights(folder / "one" / one)
    assert found.keys() == wanted.keys() and len(wanted) == 3
    for step, values in wanted.items():
        torch.testing.assert_close(torch.tensor(found[step]), torch.tensor(values), rtol=2e-4, atol=1e-5)
    assert torch.tensor(wanted[1]).sub(torch.tensor(wanted[3])).abs().max() > 1e-3, "else the test could not fail"


def test_another_world_goes_on_with_what_was_learned(folder):
    found, wanted = weights(folder / "four" / "gradnorm"), weights(folder / "one" / "gradnorm")
    assert list(found) == [3]
    torch.testing.assert_close(torch.tensor(found[3]), torch.tensor(wanted[3]), rtol=2e-4, atol=1e-5)
    state = saved_meta(folder / "four" / "gradnorm", 3)["balancing"]["state"]
    assert set(state["weight.steps"].values()) == {3.0}
