"""What DeepSpeed's own ``engine.save_checkpoint`` writes of ``ASEMoE`` comes back bit for bit, or is refused."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ase_dist.moe import ASEMoE, deepspeed_compat
from ase_dist.moe.engine_names import from_engine_names, to_engine_names
from tests.moe.conftest import FFN, randomise
from tests.training.conftest import start_world

TASKS, DIM, STEPS = 3, 12, 3
OPTIONS = {"num_experts": 6, "k": 2, "num_shared": 1, "rank": 2, "num_tasks": TASKS}  # 5 routed: a padded slot at ep 2
CASES = [(stage, ep_size, "lora") for ep_size in (1, 2) for stage in (0, 1, 2)] + [(2, 2, "ffn")]


class Model(nn.Module):
    """Layers with experts and a head; the second one's path has the word in it that DeepSpeed looks for."""

    def __init__(self, **options):
        super().__init__()
        self.first = ASEMoE(FFN(seed=1), seed=1, **OPTIONS, **options)
        self.experts_of_task = nn.ModuleDict({"expert": ASEMoE(FFN(seed=2), seed=2, **OPTIONS, **options)})
        self.head = nn.Linear(DIM, 4)

    def forward(self, x):
        for layer in (self.first, self.experts_of_task["expert"]):
            output, aux, _ = layer(x)
            x = x + output
        return self.head(x).square().mean() + aux


def engine_of(stage, ep_size, experts, *, seed):
    """An engine whose every weight depends on ``seed``."""
    import deepspeed

    torch.manual_seed(seed)
    model = Model(ep_size=ep_size, experts=experts)
    with torch.no_grad():
        for parameter in model.parameters():  # the frozen ones too
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    group = {"name": "all", "params": [p for p in model.parameters() if p.requires_grad]}
    config = {
        "train_micro_batch_size_per_gpu": 1, "steps_per_print": 2**31, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "contiguous_gradients": True},
    }  # fmt: skip
    optimizer = torch.optim.AdamW(deepspeed_compat.optimizer_groups([group]), lr=0.01, weight_decay=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def steps(engine, numbers):
    """The losses of some steps."""
    losses = []
    for number in numbers:
        generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
        loss = engine(torch.randn(TASKS, 5, DIM, generator=generator))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def everything(engine):
    """Weights, masters and moments of this rank, the frozen base too."""
    found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            found |= {
                f"{name}/{kind}": deepspeed_compat.read_master(engine, p, kind)
                for kind in ("weight", *deepspeed_compat.MOMENTS)
            }
    return found


def saved_and_loaded(folder, stage, ep_size, experts):
    """Names that differ between a run that went on and one that was loaded, before and after the next step."""
    engine = engine_of(stage, ep_size, experts, seed=1)
    steps(engine, range(STEPS))
    engine.save_checkpoint(str(folder))
    before, losses, after = everything(engine), steps(engine, [STEPS]), everything(engine)
    other = engine_of(stage, ep_size, experts, seed=2)
    fresh = everything(other)
    other.load_checkpoint(str(folder))
    loaded = everything(other)
    odd = [name for name in before if not torch.equal(before[name], loaded[name])]
    odd += ["loss"] if steps(other, [STEPS]) != losses else []
    odd += [f"{name} afterwards" for name, tensor in everything(other).items() if not torch.equal(tensor, after[name])]
    return {"odd": odd, "same as fresh": [name for name in before if torch.equal(before[name], fresh[name])]}


def scenario(rank, folder):
    import deepspeed

    os.environ["LOCAL_RANK"] = str(rank)
    deepspeed_compat.skip_cpu_communication_build()
    deepspeed.init_distributed("gloo", verbose=False)
    found = {str(case): saved_and_loaded(folder / "_".join(map(str, case)), *case) for case in CASES}
    try:
        engine_of(0, 1, "lora", seed=2).load_checkpoint(str(folder / "0_2_lora"))
    except ValueError as error:
        found["other"] = str(error)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    ended = start_world(scenario, tmp_path_factory.mktemp("engine"), size=2, seconds=200)()
    assert ended.codes == [0, 0]
    return ended.results


@pytest.mark.multi_gpu
@pytest.mark.parametrize("case", CASES)
def test_the_engines_own_checkpoint_brings_everything_back(world, case):
    for result in world:
        assert result[str(case)]["odd"] == []
        assert not [name for name in result[str(case)]["same as fresh"] if "ffn" not in name], "nothing to bring back"


@pytest.mark.multi_gpu
def test_another_expert_parallel_size_is_refused_alike(world):
    first, second = (result["other"] for result in world)
    assert first == second
    assert "saved with ep_size=2, this layer has ep_size=1" in first and "\n" not in first


@pytest.mark.single_gpu
@pytest.mark.parametrize("prefix", ["", "blocks.3.mlp."])
def test_names_go_there_and_back(prefix):
    layer = ASEMoE(FFN(), **OPTIONS)
    own = layer.state_dict(prefix=prefix)
    state = dict(own)
    to_engine_names(state, prefix=prefix, ep_size=1)
    kept = [name for name in state if "expert" not in name or "moe.gate.wg.weight" in name]
    assert not any("routed" in name for name in kept) and any("router" in name for name in kept)
    if not prefix:  # as the engine stores the experts of a layer that is the whole model
        state = {f".{name}" if "deepspeed_experts" in name else name: tensor for name, tensor in state.items()}
    from_engine_names(state, prefix=prefix, ep_size=1)
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in own.items())


@pytest.mark.single_gpu
def test_without_an_engine_names_are_the_layers_own():
    one, other = (ASEMoE(FFN(seed=seed), seed=seed, **OPTIONS) for seed in (1, 2))
    assert {name.split(".")[0] for name in one.state_dict()} == {"router", "base", "routed", "shared"}
    randomise(one)
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
