"""The layer against the per-token reference, outputs and every gradient, over a grid; and its contract."""

import pytest
import torch
from torch import nn

from ase_dist.moe import ASEMoE, MoEFFN, global_state, load_global_state
from ase_dist.moe.losses import ROUTER_LOSSES
from ase_dist.ops import modes
from tests.moe.conftest import FFN, randomise, reference_layer

pytestmark = pytest.mark.single_gpu

MODES = [  # gating, N, k, S, r
    ("ase", 6, 2, 1, 3),
    ("ase", 8, 3, 2, 1),
    ("ase", 5, 0, 2, 2),
    ("ase", 5, 3, 0, 2),
    ("naive", 6, 2, 1, 2),
    ("renormalised", 6, 2, 1, 2),
    ("separate", 7, 2, 2, 2),
    ("separate", 6, 0, 2, 2),
    ("naive", 7, 1, 3, 4),
    ("topk", 6, 4, 0, 2),
    ("topk", 4, 1, 0, 1),
    ("dense", 5, 2, 1, 2),
]
ADAPTS = [("fc1", "fc2"), ("fc1",), ("fc2",), ("bypass",), ("fc1", "bypass")]


def make(gating, N, k, S, r, *, dtype=torch.float64, **options):
    layer = MoEFFN(FFN().to(dtype), num_experts=N, k=k, num_shared=S, rank=r, num_tasks=3, gating=gating, **options)
    randomise(layer)
    return layer


def tokens(dtype=torch.float64, *, seed=3):
    return torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(output, leaves, *, seed=5):
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(output, leaves, direction.to(output.dtype), allow_unused=True)


def layer_gradients(layer, x):
    """Output and gradients of the layer with respect to x and its tensors in global order."""
    x = x.clone().requires_grad_()
    output = layer(x).output
    leaves = {"router": [layer.router.weight]}
    for name, routed in layer.routed.tensors().items():
        leaves[name] = [routed] + ([layer.shared.tensors()[name]] if layer.shared else [])
    flat = [x] + [leaf for parts in leaves.values() for leaf in parts]
    grads = dict(zip(map(id, flat), gradients(output, flat), strict=True))
    by_name = {name: torch.cat([_or_zero(grads[id(p)], p) for p in parts]) for name, parts in leaves.items()}
    return output.detach(), {"x": grads[id(x)], **by_name}


def _or_zero(grad, like):
    return torch.zeros_like(like) if grad is None else grad


def reference_gradients(layer, x, base, **options):
    x = x.clone().requires_grad_()
    state = {name: tensor.clone().requires_grad_() for name, tensor in global_state(layer).items()}
    output = reference_layer(x, base, state, **options)
    grads = gradients(output, [x, *state.values()])
    named = zip(["x", *state], [x, *state.values()], grads, strict=True)
    return output.detach(), {name: _or_zero(grad, leaf) for name, leaf, grad in named}


@pytest.mark.parametrize("form", ["cpu", "accelerator"])
@pytest.mark.parametrize("adapt", ADAPTS, ids="+".join)
@pytest.mark.parametrize(("gating", "N", "k", "S", "r"), MODES)
def test_equals_the_per_token_reference(gating, N, k, S, r, adapt, form, monkeypatch):
    monkeypatch.setattr(modes, "stacks_products", lambda x: form == "accelerator")
    layer = make(gating, N, k, S, r, adapt=adapt, alpha=2.0)
    output, grads = layer_gradients(layer, tokens())
    wanted, wanted_grads = reference_gradients(layer, tokens(), FFN().double(), gating=gating, k=k, num_shared=S,
                                               scale=2.0 / r)  # fmt: skip
    torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-12)
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("gating", "N", "k", "S", "r"), MODES)
def test_ffn_experts_equal_the_per_token_reference(gating, N, k, S, r):
    layer = make(gating, N, k, S, r, experts="ffn", hidden=8)
    output, grads = layer_gradients(layer, tokens())
    wanted, wanted_grads = reference_gradients(layer, tokens(), FFN().double(), gating=gating, k=k, num_shared=S)
    torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-12)
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("experts", ["lora", "ffn"])
@pytest.mark.parametrize(("gating", "N", "k", "S", "r"), MODES)
def test_what_is_exported_computes_the_same_in_plain_operations(gating, N, k, S, r, experts, monkeypatch):
    layer = make(gating, N, k, S, r, experts=experts, hidden=8)
    output, grads = layer_gradients(layer, tokens())
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    plain, plain_grads = layer_gradients(layer, tokens())
    torch.testing.assert_close(plain, output, rtol=1e-10, atol=1e-12)
    for name, grad in plain_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("experts", ["lora", "ffn"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_lower_precision_differs_by_its_rounding_only(dtype, tolerance, experts):
    layer = make("ase", 6, 2, 1, 3, dtype=dtype, experts=experts, hidden=8)
    exact = make("ase", 6, 2, 1, 3, experts=experts, hidden=8)
    load_global_state(exact, global_state(layer))
    exact.load_state_dict({name: tensor.double() for name, tensor in layer.state_dict().items()})
    output, grads = layer_gradients(layer, tokens(dtype))
    wanted, wanted_grads = layer_gradients(exact, tokens(dtype).double())
    for got, want in [(output, wanted)] + [(grads[name], wanted_grads[name]) for name in wanted_grads]:
        assert (got.double() - want).norm() <= tolerance * want.norm()


def test_gates_of_ase_sum_to_one_and_are_zero_where_inactive():
    layer = make("ase", 8, 3, 2, 1)
    gates = layer.gates(tokens())
    torch.testing.assert_close(gates.sum(dim=-1), torch.ones(3, 7, dtype=torch.float64), rtol=0, atol=1e-12)
    assert ((gates > 0).sum(dim=-1) == 5).all()
    assert (gates[..., -2:] > 0).all()


def test_exactly_k_are_active_under_ties():
    layer = make("ase", 8, 3, 2, 1)
    with torch.no_grad():
        layer.router.weight.zero_()
    assert ((layer.gates(tokens()) > 0).sum(dim=-1) == 5).all()


def test_huge_logits_do_not_overflow():
    layer = make("ase", 8, 3, 2, 1, dtype=torch.float32)
    with torch.no_grad():
        layer.router.weight.mul_(1e4)
    gates = layer.gates(tokens(torch.float32))
    assert gates.isfinite().all()
    torch.testing.assert_close(gates.sum(dim=-1), torch.ones(3, 7))


@pytest.mark.parametrize("bias", [True, False])
def test_an_untouched_layer_is_its_base_exactly(bias):
    base = FFN(bias=bias)
    x = tokens(torch.float32)
    wanted = base(x)
    output, _, counts = ASEMoE(base, 16, num_tasks=3)(x)
    assert torch.equal(output, wanted)
    assert counts.sum() == 3 * 7 * 4


def test_untouched_ffn_experts_of_full_width_are_copies_of_the_base():
    base = FFN()
    x = tokens(torch.float32)
    layer = MoEFFN(base, num_experts=6, k=2, num_tasks=3, experts="ffn", hidden=20)
    torch.testing.assert_close(layer(x).output, base(x))


def test_one_task_by_index_and_a_list_of_tasks_equal_their_rows():
    layer = ASEMoE(FFN(), 8, k=2, num_tasks=3)
    randomise(layer)
    x = tokens(torch.float32)
    output, _, counts = layer(x)
    one, _, one_counts = layer(x[2].view(1, 7, 12), task=2)
    assert one.shape == (1, 7, 12) and one_counts.shape == (8,)
    torch.testing.assert_close(one[0], output[2])
    assert torch.equal(one_counts, counts[2])
    two, _, two_counts = layer(x[[2, 0]], task=[2, 0])
    torch.testing.assert_close(two, output[[2, 0]])
    assert torch.equal(two_counts, counts[[2, 0]])
    torch.testing.assert_close(layer.gates(x[2], task=2), layer.gates(x)[2])


def test_permuting_tokens_permutes_outputs():
    layer = make("ase", 8, 3, 2, 1)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(tokens()[:, order]).output, layer(tokens()).output[:, order])


def test_leading_shape_is_kept_and_empty_input_works():
    layer = make("ase", 8, 3, 2, 1)
    assert layer(tokens().view(3, 1, 7, 12)).output.shape == (3, 1, 7, 12)
    result = layer(tokens()[:, :0].requires_grad_())
    assert result.output.shape == (3, 0, 12) and result.aux_loss.isfinite()
    (result.output.sum() + result.aux_loss).backward()
    assert all(not p.grad.any() for p in layer.routed.parameters())


def test_a_generic_base_and_autocast_give_the_fused_result():
    class Wrapped(nn.Linear):
        pass

    layer, generic = make("ase", 6, 2, 1, 3, dtype=torch.float32), make("ase", 6, 2, 1, 3, dtype=torch.float32)
    for name in ("fc1", "fc2"):
        getattr(generic.base, name).__class__ = Wrapped
    x = tokens(torch.float32)
    for got, want in zip(layer_gradients(generic, x)[1].values(), layer_gradients(layer, x)[1].values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x).output
    torch.testing.assert_close(output.float(), layer(x).output, rtol=0.1, atol=0.1)


def test_equals_peft_with_one_expert_of_gate_one():
    peft = pytest.importorskip("peft")
    base = FFN()
    layer = MoEFFN(FFN(), num_experts=1, k=0, num_shared=1, rank=4, alpha=8.0, num_tasks=1)
    randomise(layer)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["fc1", "fc2"], lora_dropout=0.0, bias="none")
    lora = peft.get_peft_model(base, config)
    state = global_state(layer)
    for name in ("fc1", "fc2"):
        module = getattr(lora.base_model.model, name)
        module.lora_A["default"].weight.data.copy_(state[f"{name}.A"][0])
        module.lora_B["default"].weight.data.copy_(state[f"{name}.B"][0])
    x = tokens(torch.float32)[:1]
    output, grads = layer_gradients(layer, x)
    torch.testing.assert_close(output, lora(x))
    weights = {f"{n}.{m}": getattr(getattr(lora.base_model.model, n), f"lora_{m}")["default"].weight
               for n in ("fc1", "fc2") for m in "AB"}  # fmt: skip
    for name, grad in zip(weights, gradients(lora(x), list(weights.values())), strict=True):
        torch.testing.assert_close(grads[name][0], grad, rtol=1e-4, atol=1e-5)


def test_the_base_is_frozen_and_the_rest_is_trained():
    layer = ASEMoE(FFN(), 6, k=2, num_tasks=3)
    frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
    assert frozen == {f"base.{n}.{p}" for n in ("fc1", "fc2") for p in ("weight", "bias")}
    assert not any("expert" in name for name in layer.state_dict())


def test_initialisation_does_not_depend_on_the_number_of_experts_before():
    small = global_state(MoEFFN(FFN(), num_experts=4, k=2, num_shared=0, num_tasks=2, seed=3))
    large = global_state(MoEFFN(FFN(), num_experts=9, k=2, num_shared=0, num_tasks=2, seed=3))
    assert torch.equal(small["fc1.A"], large["fc1.A"][:4])
    assert not torch.equal(large["fc1.A"][0], large["fc1.A"][1])
    assert not large["fc1.B"].any()


@pytest.mark.parametrize("kind", [MoEFFN, ASEMoE])
def test_layers_without_a_seed_are_different_and_repeat_with_torch_s(kind):
    def two():
        torch.manual_seed(7)
        bases = FFN(), FFN()
        return [global_state(kind(base, num_experts=4, k=2, num_tasks=2)) for base in bases]

    (one, other), again = two(), two()
    for name in ("router", "fc1.A"):
        assert not torch.equal(one[name], other[name])
        assert torch.equal(one[name], again[0][name]) and torch.equal(other[name], again[1][name])
    with torch.device("meta"):
        assert kind(FFN(), num_experts=4, k=2, num_tasks=2).router.weight.is_meta


def test_global_state_round_trip_and_refusal():
    layer, other = make("ase", 6, 2, 1, 3), make("ase", 6, 2, 1, 3)
    randomise(other, seed=9)
    load_global_state(other, global_state(layer))
    assert torch.equal(layer(tokens()).output, other(tokens()).output)
    before = global_state(other)
    with pytest.raises(ValueError, match=r"'fc1.A': got \(5, 3, 12\), wanted \(6, 3, 12\)"):
        load_global_state(other, {**before, "fc1.A": before["fc1.A"][:5]})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gating": "asee"}, "did you mean 'ase'"),
        ({"k": 6}, r"k: got 6, wanted 0 to num_experts - num_shared = 5"),
        ({"gating": "topk", "num_shared": 1}, "no shared experts; set num_shared=0"),
        ({"num_shared": 7}, "num_shared: got 7"),
        ({"adapt": ("fc3",)}, "adapt: got 'fc3'"),
        ({"adapt": ()}, "one or more"),
        ({"rank": 0}, "rank >= 1"),
        ({"experts": "loar"}, "wanted 'lora' or 'ffn'"),
        ({"experts": "ffn", "hidden": 99}, "hidden: got 99"),
        ({"aux_losses": {"mutual": 1.0}}, "did you mean 'mutual_information'"),
        ({"aux_losses": {"z": -1.0}}, "wanted a finite number >= 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        MoEFFN(FFN(), **{"num_experts": 6, "k": 2, "num_tasks": 3, **options})


def test_a_base_with_another_forward_is_refused():
    gated = FFN()
    gated.fc2 = nn.Linear(10, 12)
    with pytest.raises(ValueError, match="which half is the gate"):
        MoEFFN(gated)
    normed = FFN()
    normed.norm = nn.LayerNorm(20)  # which its forward does not use
    with pytest.raises(ValueError, match="computes something else"):
        MoEFFN(normed)
    with pytest.raises(ValueError, match="has no fc1"):
        MoEFFN(nn.Linear(3, 3))


def test_inputs_of_another_shape_are_refused():
    layer = MoEFFN(FFN(), num_experts=6, k=2, num_tasks=3)
    with pytest.raises(ValueError, match=r"wanted \[3 tasks, ..., 12\]"):
        layer(torch.zeros(2, 7, 12))
    with pytest.raises(ValueError, match="indices from 0 to 2"):
        layer(torch.zeros(7, 12), task=3)


def test_parallelism_without_a_process_group_is_refused():
    with pytest.raises(ValueError, match="without a process group"):
        ASEMoE(FFN(), ep_size=2)
    with pytest.raises(ValueError, match="'local' needs ep_size=1"):
        ASEMoE(FFN(), ep_size=2, dispatch="local")
    with pytest.raises(ValueError, match="did you mean 'gather'"):
        ASEMoE(FFN(), dispatch="gathr")


@pytest.mark.parametrize(("gating", "N", "k", "S", "r"), MODES)
@pytest.mark.parametrize("loss", list(ROUTER_LOSSES))
def test_every_mode_trains_with_every_router_loss(gating, N, k, S, r, loss):
    layer = make(gating, N, k, S, r, aux_losses={loss: 0.1})
    randomise(layer)
    result = layer(tokens())
    (result.output.square().mean() + result.aux_loss).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
