"""Router losses against their definitions, written out token by token."""

import math

import pytest
import torch

from ase_dist.moe import MoEFFN
from ase_dist.moe.losses import ROUTER_LOSSES
from ase_dist.moe.router import router_statistics
from tests.moe.conftest import FFN, randomise

pytestmark = pytest.mark.single_gpu


def routed(gating="ase", **options):
    layer = MoEFFN(FFN(), num_experts=6, k=2, num_tasks=3, gating=gating, **options).double()
    randomise(layer, std=2.0)
    x = torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return layer, x, *layer.router(x, [0, 1, 2])


def test_mutual_information_by_its_sums():
    _, _, logits, routing = routed()
    loss = ROUTER_LOSSES["mutual_information"](router_statistics(logits, routing, over_ranks=False))
    p = [[sum(logits[t, i].softmax(0)[e].item() for i in range(9)) / 9 / 3 for e in range(6)] for t in range(3)]
    wanted = -sum(
        p[t][e] * math.log(p[t][e] / (sum(p[t]) * sum(row[e] for row in p))) for t in range(3) for e in range(6)
    )
    assert loss.item() == pytest.approx(wanted, rel=1e-9)
    assert -math.log(3) <= loss.item() <= 0


def test_mutual_information_is_extreme_when_each_task_has_its_own_expert():
    probs = torch.eye(3, dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    stats = router_statistics(torch.zeros(3, 1, 3, dtype=torch.float64), routed()[3]._replace(
        probs=probs[:, None], active=probs[:, None].bool(), gates=probs[:, None]), over_ranks=False)  # fmt: skip
    assert stats.squared_lse_t.shape == zero.shape
    assert ROUTER_LOSSES["mutual_information"](stats).item() == pytest.approx(-math.log(3))


def test_the_other_losses_by_their_definitions():
    _, _, logits, routing = routed()
    stats = router_statistics(logits, routing, over_ranks=False)
    importance = routing.gates.mean(dim=(0, 1))
    assert ROUTER_LOSSES["cv_squared"](stats).item() == pytest.approx(
        (importance.var(unbiased=False) / importance.mean() ** 2).item())  # fmt: skip
    share = routing.active.double().sum(dim=(0, 1)) / routing.active.sum()
    assert ROUTER_LOSSES["switch"](stats).item() == pytest.approx(
        6 * (share * logits.softmax(-1).mean(dim=(0, 1))).sum().item())  # fmt: skip
    assert ROUTER_LOSSES["z"](stats).item() == pytest.approx(logits.exp().sum(-1).log().square().mean().item())


@pytest.mark.parametrize("name", list(ROUTER_LOSSES))
def test_every_loss_is_differentiable_and_trains_the_router(name):
    layer, x, *_ = routed(aux_losses={name: 1.0})
    before = layer(x).aux_loss
    before.backward()
    with torch.no_grad():
        layer.router.weight -= 1e-3 * layer.router.weight.grad
    assert layer(x).aux_loss < before


def test_the_layer_weighs_and_adds_the_losses():
    layer, x, logits, routing = routed(aux_losses={"mutual_information": 0.5, "z": 0.25})
    stats = router_statistics(logits, routing, over_ranks=False)
    wanted = 0.5 * ROUTER_LOSSES["mutual_information"](stats) + 0.25 * ROUTER_LOSSES["z"](stats)
    torch.testing.assert_close(layer(x).aux_loss, wanted)
    assert routed(aux_losses={})[0](x).aux_loss == 0


@pytest.mark.parametrize("gating", ["ase", "naive", "renormalised", "separate", "dense"])
def test_counts_and_mean_gates_are_those_of_the_gates(gating):
    layer, x, *_ = routed(gating)
    result, gates = layer(x), layer.gates(x)
    assert torch.equal(result.expert_counts, (gates > 0).sum(dim=1))
    torch.testing.assert_close(result.mean_gates, gates.mean(dim=1))


def test_scaled_shared_logits_are_those_of_a_router_with_scaled_rows():
    layer, x, logits, _ = routed(num_shared=2)
    layer.router.scale_shared_logits(0.0)
    assert not layer.router(x, [0, 1, 2])[0][..., -2:].any()
    layer.router.scale_shared_logits(0.25)
    got, routing = layer.router(x, [0, 1, 2])
    torch.testing.assert_close(got, torch.cat([logits[..., :4], logits[..., 4:] / 4], dim=-1))
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones_like(routing.gates[..., 0]))
    layer.router.scale_shared_logits(1.0)
    assert torch.equal(layer.router(x, [0, 1, 2])[0], logits)


def test_the_scale_reaches_the_gradient_of_shared_rows_alone():
    layer, x, *_ = routed(num_shared=2)
    whole = torch.autograd.grad(layer.router(x, [0, 1, 2])[0].square().sum(), layer.router.weight)[0]
    layer.router.scale_shared_logits(0.5)
    half = torch.autograd.grad(layer.router(x, [0, 1, 2])[0].square().sum(), layer.router.weight)[0]
    torch.testing.assert_close(half, torch.cat([whole[:, :4], whole[:, 4:] / 4], dim=1))
