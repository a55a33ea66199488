"""LoRA experts computed for a token's own experts only: the same function as for all at once; and when it is chosen."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ase_dist.moe import MoEFFN
from ase_dist.moe.experts import LoRAExperts, RoutedTokens
from ase_dist.moe.forms import FormCost
from tests.moe.conftest import FFN, randomise
from tests.moe.test_layer import ADAPTS, MODES, layer_gradients, make, reference_gradients, tokens

pytestmark = pytest.mark.single_gpu


@pytest.fixture
def grouped_always(monkeypatch):
    monkeypatch.setattr(FormCost, "cheaper", lambda self: "grouped" if self.active else "dense")


@pytest.mark.usefixtures("grouped_always")
@pytest.mark.parametrize("adapt", ADAPTS, ids="+".join)
@pytest.mark.parametrize(("gating", "N", "k", "S", "r"), MODES)
def test_equals_the_per_token_reference(gating, N, k, S, r, adapt):
    layer = make(gating, N, k, S, r, adapt=adapt, alpha=2.0)
    output, grads = layer_gradients(layer, tokens())
    wanted, wanted_grads = reference_gradients(layer, tokens(), FFN().double(), gating=gating, k=k, num_shared=S,
                                               scale=2.0 / r)  # fmt: skip
    torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-12)
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def both_forms(monkeypatch, x, *, dtype=torch.float64, change=lambda layer: None, **options):
    found = []
    for form in ("grouped", "dense"):
        monkeypatch.setattr(FormCost, "cheaper", lambda self, form=form: form)
        layer = MoEFFN(FFN().to(dtype), num_experts=9, k=2, num_shared=1, rank=3, num_tasks=3, **options)
        randomise(layer)
        change(layer)
        found.append(layer_gradients(layer, x.to(dtype)))
    return found


def favour_one(layer):
    """All tokens to expert 4 and another one: most experts have none."""
    with torch.no_grad():
        layer.router.weight[:, 4] = 0
        layer.router.weight[:, [0, 1, 2, 3, 5, 6]] = -torch.ones(12, dtype=layer.router.weight.dtype)


@pytest.mark.parametrize("change", [favour_one, lambda layer: layer.router.weight.data.zero_()])
def test_experts_without_tokens_get_zero_gradients(change, monkeypatch):
    (output, grads), (wanted, wanted_grads) = both_forms(monkeypatch, tokens().abs(), change=change)
    torch.testing.assert_close(output, wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-10, atol=1e-11)
    assert any(not grads["fc1.A"][e].any() for e in range(8))


def test_no_tokens_at_all(monkeypatch):
    (output, grads), _ = both_forms(monkeypatch, tokens()[:, :0])
    assert output.shape == (3, 0, 12) and not any(g.any() for g in grads.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_lower_precision_differs_by_its_rounding_only(dtype, tolerance, monkeypatch):
    (output, grads), (wanted, wanted_grads) = both_forms(monkeypatch, tokens(), dtype=dtype)
    for got, want in [(output, wanted), *((grads[name], wanted_grads[name]) for name in grads)]:
        assert (got.double() - want.double()).norm() <= tolerance * want.double().norm()


@pytest.mark.usefixtures("grouped_always")
@pytest.mark.parametrize("hooked", [False, True])
def test_second_derivatives_are_those_of_the_dense_form(hooked, monkeypatch):
    def penalty(layer):
        x = tokens().requires_grad_()
        (first,) = torch.autograd.grad(layer(x).output.square().sum(), x, create_graph=True)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return torch.autograd.grad(first.square().sum(), leaves, allow_unused=True, materialize_grads=True)

    def build():
        layer = make("ase", 6, 2, 1, 3)
        if hooked:
            layer.base.fc1.register_forward_hook(lambda *_: None)
        return layer

    got = penalty(build())
    monkeypatch.setattr(FormCost, "cheaper", lambda self: "dense")
    torch.testing.assert_close(got, penalty(build()), rtol=1e-9, atol=1e-11)


def test_autocast_casts_the_pairs_as_the_dense_form(monkeypatch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = both_forms(monkeypatch, tokens(), dtype=torch.float32)
    assert found[0][0].dtype == found[1][0].dtype
    torch.testing.assert_close(*(output.float() for output, _ in found), rtol=5e-2, atol=5e-2)


@pytest.mark.usefixtures("grouped_always")
@pytest.mark.parametrize("experts", ["lora", "ffn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_no_value_is_read_from_the_device(device, dtype, experts):
    """Fake tensors have none: what reads one raises. Forward, backward and router losses, meta as an accelerator."""
    layer = MoEFFN(FFN().to(dtype), num_experts=9, k=2, num_shared=1, rank=3, num_tasks=3, experts=experts)
    with FakeTensorMode():
        for module in layer.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                fake = torch.empty(p.shape, dtype=p.dtype, device=device)
                setattr(module, name, nn.Parameter(fake, requires_grad=p.requires_grad))
        x = torch.empty(3, 7, 12, dtype=dtype, device=device, requires_grad=True)
        result = layer(x)
        (result.output.sum() + result.aux_loss).backward()
        assert x.grad.shape == x.shape and all(p.grad is not None for p in layer.routed.parameters())


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="this torch compiles plain operations, as it exports them")
@pytest.mark.usefixtures("grouped_always")
@pytest.mark.parametrize("experts", ["lora", "ffn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_compile_as_one_graph(experts, dtype):
    """Also in float32, for which torch's own grouped product has no shape rule (2.14)."""
    layer = MoEFFN(FFN().to(dtype), num_experts=9, k=2, num_shared=1, rank=3, num_tasks=3, experts=experts)
    randomise(layer)
    x = tokens(dtype)
    routing = layer.router(x, [0, 1, 2])[1]

    form = layer.form if experts == "lora" else None
    act = layer.act if form is None else form.act

    def compute(x_TD, gates_TN, active_TN):
        return layer.routed.compute(RoutedTokens(x_TD, gates_TN, active_TN, 2), form, act,
                                    routed=layer.routed.tensors(), shared=layer.shared.tensors())  # fmt: skip

    leaves = [t.detach().flatten(0, 1).requires_grad_() for t in (x, routing.gates)]
    given = (*leaves, routing.active.flatten(0, 1))
    leaves += [*layer.routed.parameters(), *layer.shared.parameters()]
    found = []
    for function in (compute, torch.compile(compute, backend="aot_eager", fullgraph=True)):
        output = function(*given)
        found.append([output.detach(), *torch.autograd.grad(output.square().sum(), leaves)])
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    for eager, compiled in zip(*found, strict=True):
        assert (eager - compiled).norm() <= tolerance * eager.norm()


# ---------------------------------------------------------------------------------------------------------------------
# The choice


@pytest.mark.parametrize(
    ("N", "k", "S", "r", "on_cpu", "on_accelerator"),
    [
        (16, 3, 1, 4, "dense", "dense"),
        (128, 24, 8, 1, "dense", "dense"),
        (64, 4, 0, 4, "grouped", "dense"),
        (64, 4, 0, 16, "grouped", "grouped"),
        (256, 4, 0, 16, "grouped", "grouped"),
        (4, 0, 4, 64, "dense", "dense"),
    ],
)
def test_the_cheaper_form_is_taken(N, k, S, r, on_cpu, on_accelerator):
    gating = "ase" if S else "topk"
    layer = MoEFFN(FFN(), num_experts=N, k=k, num_shared=S, rank=r, num_tasks=2, gating=gating)
    assert layer.form_cost("cpu").cheaper() == on_cpu
    assert layer.form_cost("cuda").cheaper() == layer.form_cost("meta").cheaper() == on_accelerator


def test_what_is_chosen_is_what_runs(monkeypatch):
    ran = []
    compute = LoRAExperts._compute_grouped
    monkeypatch.setattr(LoRAExperts, "_compute_grouped", lambda *a, **o: ran.append(1) or compute(*a, **o))
    for N in (16, 256):
        layer = MoEFFN(FFN(), num_experts=N, k=2, num_shared=0, rank=2, num_tasks=3, gating="topk")
        layer(tokens(torch.float32))
        assert len(ran) == (layer.form_cost("cpu").cheaper() == "grouped")
    assert ran


def test_the_cost_of_a_token_does_not_grow_with_the_number_of_experts():
    """FLOPs forward on an accelerator: the routers' alone differ between 64 and 256 experts of rank 16."""
    flops = {}
    for N in (64, 256):
        layer = MoEFFN(FFN(), num_experts=N, k=4, num_shared=0, rank=16, num_tasks=3, gating="topk").to("meta")
        with FlopCounterMode(display=False) as counter:
            layer(torch.empty(3, 7, 12, device="meta"))
        flops[N] = counter.get_total_flops()
    assert flops[256] - flops[64] == 2 * 21 * 12 * (256 - 64)
    assert flops[64] == 2 * 21 * (12 * 64 + 2 * 12 * 20 + 4 * 16 * 2 * (12 + 20))


def test_the_start_up_table_names_the_choice_and_its_reason():
    said = FormCost(routed=256, active=4, rank=16, device_type="cpu").describe()
    assert said == "grouped (a token costs 4,096 columns with all experts, 192 with its own)"
    assert FormCost(routed=15, active=3, rank=4, device_type="cpu").describe().startswith("dense (a token costs 60")
