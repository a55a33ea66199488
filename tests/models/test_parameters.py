"""The parameter table: every parameter in one group, the sums of an obvious count."""

import json

import pytest
import torch
from torch import nn

from ase_dist.models.parameters import GROUPS, parameter_groups, parameter_table
from ase_dist.moe import MoEFFN
from ase_dist.moe.sharding import Shard

pytestmark = pytest.mark.single_gpu


@pytest.mark.parametrize("layer", ["plain", "deepspeed"])
def test_groups_by_owner_agree_with_an_obvious_count(layer, model_for):
    model = model_for(layer=layer, moe={"every_n_blocks": 2, "adapt": ["fc1"]})
    table = parameter_table(model)
    D, H, r, tasks = 32, 128, 2, 5
    lora = 4 * (D + 3 * D) + 4 * (D + D)
    assert table.groups["lora"].total == 2 * lora + 4 * (D + H) * 2 + 4 * (H + D)  # rank 4; fc1, fc2; the other fc2
    assert table.groups["routed"].total == 3 * r * (D + H)
    assert table.groups["shared"].total == 1 * r * (D + H)
    assert table.groups["router"].total == tasks * 4 * D
    assert table.groups["task_embedding"].total == tasks * D
    assert table.groups["head"].total == sum(p.numel() for p in model.heads.parameters())
    assert table.groups["backbone"].trained == 0
    assert table.all.total == sum(p.numel() for p in model.parameters())
    assert table.all.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert table.all.bytes == 4 * table.all.total
    assert parameter_groups(model).keys() == dict(model.named_parameters()).keys()


def test_half_precision_halves_the_bytes(model_for):
    model = model_for(head="linear")
    full = parameter_table(model).all
    half = parameter_table(model.bfloat16()).all
    assert (half.bytes * 2, half.total) == (full.bytes, full.total)


def test_sharded_experts_count_once_and_padding_does_not():
    def layer(shard):
        base = nn.Module()
        base.fc1, base.act, base.fc2 = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)
        return MoEFFN(base, num_experts=16, k=3, num_shared=1, rank=4, num_tasks=2, shard=shard)

    whole = parameter_table(layer(Shard(15))).groups["routed"]
    for index in range(2):
        part = parameter_table(layer(Shard(15, index=index, count=2))).groups["routed"]
        assert part.total == part.trained == whole.total == 15 * 4 * (4 + 8 + 8 + 4)
        assert part.bytes * 15 == whole.bytes * 8, "eight slots on each rank"


def test_rows_and_dictionary(model_for):
    table = parameter_table(model_for(moe={"enabled": False}))
    rows = table.as_rows()
    assert [row[0] for row in rows] == ["backbone", "lora", "head", "task embedding", "all"]
    assert rows[-1][1] == f"{table.all.total:,}" and rows[-1][3].endswith(" MB")
    plain = json.loads(json.dumps(table.as_dict()))
    assert list(plain) == [*GROUPS, "all"] and plain["routed"] == {"total": 0, "trained": 0, "bytes": 0}


def test_an_unknown_module_is_backbone():
    assert parameter_groups(nn.Sequential(nn.Linear(2, 2))) == {"0.weight": "backbone", "0.bias": "backbone"}
    assert parameter_table(torch.nn.Identity()).all.total == 0
