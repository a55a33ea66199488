"""What a gating mode must keep to: the rules of ``Gates``, told when a layer is built with one that breaks them."""

import pytest
import torch

from ase_dist.moe import MoEFFN
from ase_dist.moe.gating import Gates, check_gating, joint, top_routed
from ase_dist.ops.modes import autocast
from ase_dist.registries import GATINGS
from tests.moe.conftest import FFN

pytestmark = pytest.mark.single_gpu


def test_the_active_routed_experts_are_k_or_all_of_a_dense_mode():
    found = {name: check_gating(name, num_experts=6, k=2, num_shared=int(name != "topk")) for name in GATINGS}
    assert found == {name: 5 if name == "dense" else 2 for name in GATINGS}
    assert check_gating("separate", num_experts=4, k=0, num_shared=4) == 0


def leaky(logits_TN, *, k, num_shared):
    found = joint(logits_TN, k=k, num_shared=num_shared)
    return found._replace(gates=found.gates + 0.1)


def lopsided(logits_TN, *, k, num_shared):
    active_TN = logits_TN > 0
    active_TN[:, logits_TN.shape[1] - num_shared :] = True
    return Gates(logits_TN.softmax(dim=-1) * active_TN, active_TN, logits_TN.softmax(dim=-1))


def unshared(logits_TN, *, k, num_shared):
    return joint(logits_TN, k=k, num_shared=0)


def narrow(logits_TN, *, k, num_shared):
    return Gates(*(tensor[:, 1:] for tensor in joint(logits_TN, k=k, num_shared=num_shared)))


@pytest.mark.parametrize(
    ("mode", "rule"),
    [(leaky, "0 where an expert is inactive"), (lopsided, "as many active routed experts"),
     (unshared, "shared experts, the last, are active"), (narrow, "as large as the logits")],
)  # fmt: skip
def test_a_mode_that_breaks_a_rule_is_refused(mode, rule, monkeypatch):
    monkeypatch.setitem(GATINGS, "mine", mode)
    with pytest.raises(ValueError, match=rf"^gating: 'mine' breaks a rule .*{rule}"):
        MoEFFN(FFN(), num_experts=6, k=2, gating="mine")


def test_a_mode_of_ones_own_trains(monkeypatch):
    def sigmoid(logits_TN, *, k, num_shared):
        active_TN = top_routed(logits_TN, k=k, num_shared=num_shared)
        return Gates(logits_TN.sigmoid() * active_TN, active_TN, logits_TN.softmax(dim=-1))

    monkeypatch.setitem(GATINGS, "mine", sigmoid)
    layer = MoEFFN(FFN(), num_experts=6, k=2, num_tasks=2, gating="mine")
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    found = layer(x)
    (found.output.square().mean() + found.aux_loss).backward()
    torch.testing.assert_close(layer.gates(x).count_nonzero(dim=-1), torch.full((2, 5), 3))
    assert layer.router.weight.grad is not None and layer.routed.fc2_B.grad.abs().sum() > 0


@pytest.mark.parametrize("around", [None, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.bfloat16, torch.float16])
def test_autocast_is_as_wanted_inside_and_as_before_outside(around, wanted):
    def mode():
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None

    with torch.autocast("cpu", dtype=around, enabled=around is not None):
        with autocast("cpu", wanted):
            assert mode() == wanted
        assert mode() == around
