"""What commands share: the text of their help with and without a checkout, and how they refuse."""

from pathlib import Path

import pytest

from ase_dist.commands.cli import USAGE, refuse, script_of, without_checkout

pytestmark = pytest.mark.single_gpu


def test_scripts_lie_in_launch():
    assert script_of("cluster check") == Path("launch/cluster/check.py")


@pytest.mark.parametrize(
    ("checkout", "package"),
    [
        ("python launch/plan.py --world 64", "python -m ase_dist plan --world 64"),
        ("python launch/cluster/check.py hosts", "python -m ase_dist cluster check hosts"),
        (
            "deepspeed launch/train.py --deepspeed_config ds_configs/z2_bf16.json",
            "deepspeed --module ase_dist train --deepspeed_config z2_bf16",
        ),
        ("torchrun --nproc_per_node 2 launch/train.py", "torchrun --nproc_per_node 2 -m ase_dist train"),
        ('job="launch/train.py seed=1"', 'job="--module ase_dist train seed=1"'),
        ("data.root=PASCAL_MT", "data.root=PASCAL_MT"),
    ],
)
def test_examples_work_without_a_checkout(checkout, package):
    assert without_checkout(checkout) == package


def test_a_refusal_is_one_sentence_and_a_code(capsys):
    assert refuse(ValueError("--steps: got 0, wanted 1 or more")) == USAGE
    assert refuse("not saved", code=74) == 74
    assert capsys.readouterr().err == "error: --steps: got 0, wanted 1 or more\nerror: not saved\n"
