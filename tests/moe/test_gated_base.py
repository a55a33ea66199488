"""Gated FFNs under a layer: fc2(norm(act(gate(x)) * up(x))), one token and one expert at a time as the reference."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from torch import nn
from torch.nn import functional as F

from ase_dist.models.lora import add_lora
from ase_dist.moe import (
    FFN,
    ASEMoE,
    GatedFFN,
    MoEFFN,
    TaskFFN,
    global_state,
    load_adapters,
    load_global_state,
    save_adapters,
    set_tasks,
)
from ase_dist.moe.forms import FormCost
from ase_dist.ops import modes
from tests.moe.conftest import randomise, reference_gates

pytestmark = pytest.mark.single_gpu

WIDTH, HIDDEN, TASKS = 6, 10, 2


class LlamaFFN(nn.Module):
    """As in transformers: gate_proj, up_proj, down_proj without biases, act_fn."""

    def __init__(self, **options):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(HIDDEN, WIDTH, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def own_names(norm=None):
    gate, up, fc2 = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
    return GatedFFN(gate, nn.GELU("tanh"), up, fc2, norm=norm)


# the base, and what gives gate, up and the rest of it from x
BASES = {
    "swiglu": lambda: SwiGLU(WIDTH, HIDDEN),
    "swiglu, norm": lambda: SwiGLU(WIDTH, HIDDEN, norm_layer=nn.LayerNorm),
    "packed": lambda: SwiGLUPacked(WIDTH, 2 * HIDDEN),
    "glu, gate last, norm": lambda: GluMlp(WIDTH, 2 * HIDDEN, norm_layer=nn.LayerNorm),
    "llama": LlamaFFN,
    "own names, one bias": own_names,
    "plain, norm": lambda: Mlp(WIDTH, HIDDEN, norm_layer=nn.LayerNorm),
}


def make_base(name, *, seed=0):
    torch.manual_seed(seed)
    base = BASES[name]().double()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.5)
    return base


def make(name, kind=MoEFFN, **options):
    settings = {"num_experts": 5, "k": 2, "num_shared": 1, "rank": 2, "num_tasks": TASKS, "seed": 0} | options
    layer = kind(make_base(name), **settings)
    randomise(layer, std=0.5)
    return layer


def tokens(*, seed=3):
    return torch.randn(TASKS, 7, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves(base, x):
    """Gate and up of one token, or fc1's output and None; by the parts' own names."""
    for gate, up in (("fc1_g", "fc1_x"), ("gate_proj", "up_proj"), ("gate", "up")):
        if hasattr(base, up):
            return getattr(base, gate)(x), getattr(base, up)(x)
    both = base.fc1(x)
    if not hasattr(base, "gate_last"):
        return both, None
    first, second = both[:HIDDEN], both[HIDDEN:]
    return (second, first) if base.gate_last else (first, second)


def reference(layer, base, x_tTD, *, gating="ase", k=2, num_shared=1):
    state, out = {"router": layer.router.weight}, []
    for name, tensor in layer.routed.tensors().items():
        state[name] = tensor if layer.shared is None else torch.cat([tensor, layer.shared.tensors()[name]])
    act = getattr(base, "act_fn", None) or base.act
    last = getattr(base, "down_proj", None) or base.fc2
    norm = getattr(base, "norm", None) or (lambda h: h)
    for t, v in ((t, v) for t, stream in enumerate(x_tTD) for v in stream):
        gates = reference_gates(state["router"][t] @ v, gating=gating, k=k, num_shared=num_shared)

        def delta(place, u, gates=gates):
            if f"{place}.A" not in state:
                return 0
            pairs = zip(gates, state[f"{place}.A"], state[f"{place}.B"], strict=True)
            return sum(layer.scale * g * (b @ (a @ u)) for g, a, b in pairs)

        gate, up = halves(base, v)
        both = delta("fc1", v)  # of what fc1 gives: gate and up, in the order of the base
        if up is None:
            h = act(gate + both)
        else:
            gate_first = not getattr(base, "gate_last", False)
            of_gate, of_up = (0, 0) if isinstance(both, int) else (both[:HIDDEN], both[HIDDEN:])
            of_gate, of_up = (of_gate, of_up) if gate_first else (of_up, of_gate)
            h = act(gate + of_gate + delta("gate", v)) * (up + of_up + delta("up", v))
        h = norm(h)
        out.append(last(h) + delta("fc2", h) + delta("bypass", v))
    return torch.stack(out).view_as(x_tTD)


def step(layer, call, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    (y * direction).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


def choose_form(monkeypatch, form):
    monkeypatch.setattr(modes, "stacks_products", lambda x: form == "stacked")
    if form == "grouped":
        monkeypatch.setattr(FormCost, "cheaper", lambda cost: "grouped" if cost.active else "dense")


@pytest.mark.parametrize("form", ["chunks", "stacked", "grouped"])
@pytest.mark.parametrize("name", BASES)
def test_every_form_is_the_loop_over_tokens_and_experts(name, form, monkeypatch):
    choose_form(monkeypatch, form)
    adapts = [("fc1", "fc2"), ("fc2",), ("fc1", "bypass")]
    if "plain" not in name:
        adapts += [("gate", "up", "fc2"), ("gate",), ("up", "fc2", "bypass"), ("up", "gate")]
    for adapt in adapts:
        layer = make(name, adapt=adapt, alpha=3.0)
        have = step(layer, lambda x, layer=layer: layer(x).output, tokens())
        want = step(layer, lambda x, layer=layer: reference(layer, layer.base, x), tokens())
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", BASES)
def test_an_untouched_layer_is_its_base(name):
    base = make_base(name)
    wanted = copy.deepcopy(base)(tokens())
    torch.testing.assert_close(MoEFFN(base, num_experts=4, k=2, num_tasks=TASKS)(tokens()).output, wanted)


@pytest.mark.parametrize("form", ["chunks", "stacked", "grouped"])
def test_second_derivatives(form, monkeypatch):
    choose_form(monkeypatch, form)
    layer, x = make("swiglu, norm", adapt=("gate", "up", "fc2")), tokens().requires_grad_()
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    results = []
    for call in (lambda: layer(x).output, lambda: reference(layer, layer.base, x)):
        first = torch.autograd.grad(call().pow(3).sum(), trained, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), trained))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", ["chunks", "stacked"])
def test_a_base_that_is_trained_too_gets_its_gradients(form, monkeypatch):
    choose_form(monkeypatch, form)
    for trained in ("norm.weight", "fc1_x.weight", ""):
        layer = make("swiglu, norm", adapt=("gate", "fc2"))
        for name, parameter in layer.base.named_parameters():
            parameter.requires_grad_(name == trained or not trained)
        have = step(layer, lambda x, layer=layer: layer(x).output, tokens())
        want = step(layer, lambda x, layer=layer: reference(layer, layer.base, x), tokens())
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", ["chunks", "stacked", "grouped"])
def test_hooks_and_changes_of_the_bases_linears_are_seen(form, monkeypatch):
    choose_form(monkeypatch, form)
    layer, seen = make("llama"), []
    before = layer(tokens()).output
    handle = layer.base.up_proj.register_forward_hook(lambda module, inputs, output: seen.append(output) or 2 * output)
    doubled = layer(tokens()).output
    handle.remove()
    torch.testing.assert_close(layer(tokens()).output, before)
    with torch.no_grad():
        layer.base.up_proj.weight.mul_(2)
    torch.testing.assert_close(layer(tokens()).output, doubled)
    assert len(seen) == 1
    layer.base.gate_proj = nn.Linear(WIDTH, HIDDEN, dtype=torch.float64).requires_grad_(False)
    torch.testing.assert_close(layer(tokens()).output, reference(layer, layer.base, tokens()))


def test_the_joined_weight_is_made_once_and_is_in_no_copy():
    layer = make("llama")
    with torch.inference_mode():
        layer(tokens())
    first = step(layer, lambda x: layer(x).output, tokens())
    memory = layer.form.fc1.weight
    layer(tokens())
    assert layer.form.fc1.weight.data_ptr() == memory.data_ptr()
    assert len(pickle.dumps(layer)) < len(pickle.dumps(make("llama"))) + 100
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(step(twin, lambda x: twin(x).output, tokens()), first)
    assert twin.form.base is twin.base and set(layer.state_dict()) == set(make("llama").state_dict())
    layer.half().double()
    torch.testing.assert_close(layer(tokens()).output, reference(layer, layer.base, tokens()))


@pytest.mark.parametrize("name", ["swiglu", "packed", "llama", "own names, one bias"])
@pytest.mark.parametrize("hidden", [HIDDEN, 4])
def test_ffn_experts_are_gated_ffns_too(name, hidden):
    base = make_base(name)
    whole = copy.deepcopy(base)
    layer = MoEFFN(base, num_experts=5, k=2, num_shared=1, num_tasks=TASKS, experts="ffn", hidden=hidden, seed=0)
    if hidden == HIDDEN:  # each is a copy of the base, and the gates sum to 1
        torch.testing.assert_close(layer.double()(tokens()).output, whole(tokens()))
    randomise(layer.double(), std=0.5)
    have = step(layer, lambda x: layer(x).output, tokens())

    def by_loop(x_tTD):
        own, both, out = global_state_with_graph(layer), [], []
        for t, v in ((t, v) for t, stream in enumerate(x_tTD) for v in stream):
            gates = reference_gates(layer.router.weight[t] @ v, gating="ase", k=2, num_shared=1)
            total = 0
            for g, w1, b1, w2, b2 in zip(gates, *own.values(), strict=True):
                both = w1 @ v + b1
                gate, up = both[:hidden], both[hidden:]
                total = total + g * (w2 @ (layer.act(gate) * up) + b2)
            out.append(total)
        return torch.stack(out).view_as(x_tTD)

    torch.testing.assert_close(have, step(layer, by_loop, tokens()), rtol=1e-10, atol=1e-11)


def global_state_with_graph(layer):
    return {n: torch.cat([t, layer.shared.tensors()[n]]) for n, t in layer.routed.tensors().items()}


def test_state_and_adapters_travel(tmp_path):
    layer, other = make("llama", adapt=("gate", "up", "fc2")), make("llama", adapt=("gate", "up", "fc2"), seed=5)
    state = global_state(layer)
    assert state["gate.B"].shape == (5, HIDDEN, 2) and state["up.A"].shape == (5, 2, WIDTH)
    randomise(other, seed=7)
    load_global_state(other, state)
    torch.testing.assert_close(other(tokens()).output, layer(tokens()).output)
    randomise(other, seed=7)
    model, twin = (nn.ModuleDict({"mlp": TaskFFN(each)}) for each in (layer, other))
    save_adapters(model, tmp_path / "adapters.safetensors")
    load_adapters(twin, tmp_path / "adapters.safetensors")
    torch.testing.assert_close(other(tokens()).output, layer(tokens()).output)
    packed = nn.ModuleDict({"mlp": TaskFFN(make("packed"))})
    with pytest.raises(ValueError, match="adapt is"):
        load_adapters(packed, tmp_path / "adapters.safetensors")


@pytest.mark.parametrize("kind", [MoEFFN, ASEMoE])
def test_as_a_module_of_another_model_compiled_and_under_autocast(kind):
    layer = make("llama", kind, adapt=("gate", "up", "fc2")).float()
    model = nn.Sequential(TaskFFN(layer))
    set_tasks(model, range(TASKS))
    x = tokens().float()
    torch.testing.assert_close(model(x), reference(layer, layer.base, x), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x)
    assert (half.float() - model(x)).norm() < 0.05 * model(x).norm()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("experts", ["lora", "ffn"])
def test_the_exported_program_gives_the_same_numbers(experts, tmp_path):
    layer = make("llama", experts=experts, hidden=4).float().eval()

    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x).output

    x = tokens().float()
    program = torch.export.export(Output(), (x,))
    torch.export.save(program, tmp_path / "layer.pt2")
    found = torch.export.load(tmp_path / "layer.pt2").module()(x)
    torch.testing.assert_close(found, layer(x).output, rtol=1e-5, atol=1e-6)
    assert not [node for node in program.graph.nodes if "ase_dist" in str(node.target)]  # plain operations alone


def test_lora_goes_on_the_linears_without_experts():
    layer = make("swiglu", adapt=("gate",))
    assert layer.linears_without_experts() == ["fc1_x", "fc2"]
    assert make("packed", adapt=("gate",)).linears_without_experts() == ["fc2"]
    assert make("llama", adapt=("fc1",)).linears_without_experts() == ["down_proj"]
    assert make("llama", adapt=("bypass",)).linears_without_experts() == []
    add_lora(layer.base.double(), rank=2, alpha=None, seed=0, only=layer.linears_without_experts())
    with torch.no_grad():
        layer.base.fc1_x.lora_B.normal_()
    have = step(layer, lambda x: layer(x).output, tokens())
    torch.testing.assert_close(have, step(layer, lambda x: reference(layer, layer.base, x), tokens()))


def test_what_computes_something_else_is_refused():
    class Other(LlamaFFN):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    class Unsaid(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 2 * HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, WIDTH)

    for base, sentence in (
        (Other(), r"Other computes something else.*GatedFFN"),
        (Unsaid(), "nothing says which half is the gate"),
        (SwiGLU(WIDTH, HIDDEN, drop=0.1), "dropout would be skipped"),
        (GluMlp(WIDTH, 2 * HIDDEN, use_conv=True), "1x1 convolution"),
        (GatedFFN(nn.Linear(WIDTH, 4), nn.SiLU(), nn.Linear(WIDTH, 5), nn.Linear(4, WIDTH)), "other widths"),
        (FFN(nn.Linear(WIDTH, 4), nn.SiLU(), nn.Linear(5, WIDTH)), "wanted as many"),
    ):
        with pytest.raises(ValueError, match=sentence):
            MoEFFN(base, num_experts=4, k=2)
    with pytest.raises(ValueError, match="fc1 is gate and up together"):
        make("llama", adapt=("fc1", "gate"))
    with pytest.raises(ValueError, match="gate and up are of a gated FFN"):
        make("plain, norm", adapt=("gate",))
    with pytest.raises(ValueError, match="its norm is over all of them"):
        make("swiglu, norm", experts="ffn")


def test_one_expert_of_gate_1_is_pefts_lora():
    peft = pytest.importorskip("peft")
    theirs = nn.ModuleDict({"mlp": make_base("llama")})
    layer = MoEFFN(make_base("llama"), num_experts=1, k=0, num_shared=1, rank=2, alpha=6.0, num_tasks=1, gating="naive",
                   adapt=("gate", "up", "fc2"))  # fmt: skip
    randomise(layer, std=0.5)
    names = {"gate": "gate_proj", "up": "up_proj", "fc2": "down_proj"}
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=list(names.values()))
    adapted = peft.inject_adapter_in_model(config, theirs)["mlp"].double()
    ours = layer.shared.tensors()
    with torch.no_grad():
        for place, name in names.items():
            linear = getattr(adapted, name)
            linear.lora_A.default.weight.copy_(ours[f"{place}.A"][0])
            linear.lora_B.default.weight.copy_(ours[f"{place}.B"][0])
    x, leaf = tokens()[0].requires_grad_(), tokens()[0].requires_grad_()
    y, wanted = layer(x, task=0).output, adapted(leaf)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad, rtol=1e-11, atol=1e-11)
    for place, name in names.items():
        linear = getattr(adapted, name)
        torch.testing.assert_close(ours[f"{place}.A"].grad[0], linear.lora_A.default.weight.grad)
        torch.testing.assert_close(ours[f"{place}.B"].grad[0], linear.lora_B.default.weight.grad)


def test_silu_and_others_have_their_formula():
    """The gradient by formula, and by autograd where the activation is another one: of gate and up alike."""
    from ase_dist.ops.activations import GatedActivation, activation_and_gradient, recompute_activation

    h = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 4, dtype=torch.float64)
    for act in (nn.SiLU(), nn.GELU(), F.silu, nn.Mish()):
        for gate_last in (False, True):
            activation = GatedActivation(act, gate_last=gate_last)
            first, second = h.chunk(2, dim=-1)
            y = first * act(second) if gate_last else act(first) * second
            (want,) = torch.autograd.grad(y, h, grad)
            again, pull_back = recompute_activation(h.detach(), activation, differentiate=True)
            torch.testing.assert_close((again, pull_back(grad)), (y.detach(), want))
            torch.testing.assert_close(activation_and_gradient(h.detach(), grad, activation), (y.detach(), want))


def test_the_page_about_it_runs():
    page = (Path(__file__).parents[2] / "docs" / "gated_ffn.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {})
